"""AdamW and Adam over lists of flat tensors, in one pass; the formula stands in native/include/zcore/adamw_step.hpp.

Decoupled weight decay: arXiv 1711.05101, algorithm 2. Without: arXiv 1412.6980, algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import read_state, write_state
from zcore.kernels.ops.gradients import scaled
from zcore.kernels.ops.pieces import Column, scales, state
from zcore.kernels.ops.registering import flat_op

__all__ = ["adamw_step", "reference"]


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float = 1.0,
    clip_factor: Tensor | None = None,
    is_decoupled: bool = True,
) -> None:
    """Step `params` in place, computing in fp32, or in fp64 where they are.

    States are of any floating dtype, or codes (uint8) with scales, see `dynamic_code`. bias_correction1,
    bias_correction2: 1 - beta^t. grad_factor: what gradients are multiplied by first; clip_factor: and by this, one
    fp32 element, which on a GPU stays there and is waited for by nobody. copies: written with the new parameters in
    their own dtype; may be empty.
    """
    for index, param in enumerate(params):
        value = param.to(torch.promote_types(param.dtype, torch.float32))
        grad = scaled(grads[index], value.dtype, grad_factor, clip_factor)
        if is_decoupled:
            value = value * (1.0 - lr * weight_decay)
        elif weight_decay:
            grad = grad + weight_decay * value
        average = read_state(exp_avgs, exp_avg_scales, index, value.dtype, is_signed=True).lerp(grad, 1.0 - beta1)
        square = read_state(exp_avg_sqs, exp_avg_sq_scales, index, value.dtype, is_signed=False)
        square = square * beta2 + grad * grad * (1.0 - beta2)
        value = value - lr / bias_correction1 * average / (square.sqrt() / bias_correction2**0.5 + eps)
        param.copy_(value)
        write_state(exp_avgs, exp_avg_scales, index, average, is_signed=True)
        write_state(exp_avg_sqs, exp_avg_sq_scales, index, square, is_signed=False)
        if copies:
            copies[index].copy_(value)


adamw_step = flat_op(
    "adamw_step",
    reference,
    columns=(
        Column("params", is_written=True),
        Column("grads"),
        state("exp_avgs", is_signed=True),
        state("exp_avg_sqs", is_signed=False),
        Column("copies", is_written=True, is_optional=True),
        scales("exp_avg_scales", of="exp_avgs"),
        scales("exp_avg_sq_scales", of="exp_avg_sqs"),
    ),
    compiled=_cpu.adamw_step,
)
