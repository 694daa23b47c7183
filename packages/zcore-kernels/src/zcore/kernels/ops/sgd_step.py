"""SGD, with momentum or without, over lists of flat tensors, in one pass, as torch.optim.SGD has it.

The formula stands in native/include/zcore/sgd_step.hpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import read_state, write_state
from zcore.kernels.ops.gradients import scaled
from zcore.kernels.ops.pieces import FLOATS, Column, scales
from zcore.kernels.ops.registering import flat_op

__all__ = ["reference", "sgd_step"]


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    *,
    momentum_buffer_scales: Sequence[Tensor] = (),
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool = False,
    is_first: bool = False,
    grad_factor: float = 1.0,
    clip_factor: Tensor | None = None,
) -> None:
    """Step `params` in place; dtypes, `copies` and factors as in `adamw_step`.

    Without `momentum_buffers` there is no momentum. is_first: they hold nothing yet, and become the gradients.
    """
    for index, param in enumerate(params):
        value = param.to(torch.promote_types(param.dtype, torch.float32))
        grad = scaled(grads[index], value.dtype, grad_factor, clip_factor)
        if weight_decay:
            grad = grad + weight_decay * value
        direction = grad
        if momentum_buffers:
            average = grad
            if not is_first:
                average = read_state(momentum_buffers, momentum_buffer_scales, index, value.dtype, is_signed=True)
                average = momentum * average + (1.0 - dampening) * grad
            write_state(momentum_buffers, momentum_buffer_scales, index, average, is_signed=True)
            direction = grad + momentum * average if is_nesterov else average
        value = value - lr * direction
        param.copy_(value)
        if copies:
            copies[index].copy_(value)


sgd_step = flat_op(
    "sgd_step",
    reference,
    columns=(
        Column("params", is_written=True),
        Column("grads"),
        Column("momentum_buffers", (*FLOATS, torch.uint8), is_written=True, is_optional=True),
        Column("copies", is_written=True, is_optional=True),
        scales("momentum_buffer_scales", of="momentum_buffers"),
    ),
    compiled=_cpu.sgd_step,
)
