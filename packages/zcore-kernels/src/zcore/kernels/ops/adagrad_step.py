"""Adagrad over lists of flat tensors, in one pass, as torch.optim.Adagrad has it.

Duchi et al., 2011; the formula stands in native/include/zcore/adagrad_step.hpp. The sum of squares only grows: in codes
of one byte it stops where a square is below half the distance of two codes, some 0.4% of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import read_state, write_state
from zcore.kernels.ops.gradients import scaled
from zcore.kernels.ops.pieces import Column, scales, state
from zcore.kernels.ops.registering import flat_op

__all__ = ["adagrad_step", "reference"]


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    sum_scales: Sequence[Tensor] = (),
    lr: float,
    eps: float,
    weight_decay: float,
    grad_factor: float = 1.0,
    clip_factor: Tensor | None = None,
) -> None:
    """Step `params` in place; dtypes, `copies` and factors as in `adamw_step`. The caller decays `lr`."""
    for index, param in enumerate(params):
        value = param.to(torch.promote_types(param.dtype, torch.float32))
        grad = scaled(grads[index], value.dtype, grad_factor, clip_factor)
        if weight_decay:
            grad = grad + weight_decay * value
        total = read_state(sums, sum_scales, index, value.dtype, is_signed=False) + grad * grad
        value = value - lr * grad / (total.sqrt() + eps)
        param.copy_(value)
        write_state(sums, sum_scales, index, total, is_signed=False)
        if copies:
            copies[index].copy_(value)


adagrad_step = flat_op(
    "adagrad_step",
    reference,
    columns=(
        Column("params", is_written=True),
        Column("grads"),
        state("sums", is_signed=False),
        Column("copies", is_written=True, is_optional=True),
        scales("sum_scales", of="sums"),
    ),
    compiled=_cpu.adagrad_step,
)
