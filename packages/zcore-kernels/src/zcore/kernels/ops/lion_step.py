"""Lion over lists of flat tensors, in one pass: steps of the sign of one average mixed with the gradient.

Chen et al., arXiv 2302.06675, algorithm 2; the formula stands in native/include/zcore/lion_step.hpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import read_state, write_state
from zcore.kernels.ops.gradients import scaled
from zcore.kernels.ops.pieces import Column, scales, state
from zcore.kernels.ops.registering import flat_op

__all__ = ["lion_step", "reference"]


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    exp_avg_scales: Sequence[Tensor] = (),
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float = 1.0,
    clip_factor: Tensor | None = None,
) -> None:
    """Step `params` in place; dtypes, `copies` and factors as in `adamw_step`."""
    for index, param in enumerate(params):
        value = param.to(torch.promote_types(param.dtype, torch.float32))
        grad = scaled(grads[index], value.dtype, grad_factor, clip_factor)
        average = read_state(exp_avgs, exp_avg_scales, index, value.dtype, is_signed=True)
        mixed = average.lerp(grad, 1.0 - beta1)
        direction = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is 0, which would hide it
        value = value * (1.0 - lr * weight_decay) - lr * direction
        param.copy_(value)
        write_state(exp_avgs, exp_avg_scales, index, average.lerp(grad, 1.0 - beta2), is_signed=True)
        if copies:
            copies[index].copy_(value)


lion_step = flat_op(
    "lion_step",
    reference,
    columns=(
        Column("params", is_written=True),
        Column("grads"),
        state("exp_avgs", is_signed=True),
        Column("copies", is_written=True, is_optional=True),
        scales("exp_avg_scales", of="exp_avgs"),
    ),
    compiled=_cpu.lion_step,
)
