"""The second pass of LAMB over lists of flat tensors: step by the update, computed again, times a ratio for each piece.

You et al., arXiv 1904.00962, algorithm 2; the formula stands in native/include/zcore/lamb_step.hpp.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import read_state
from zcore.kernels.ops.pieces import Column, scales, state
from zcore.kernels.ops.registering import flat_op

__all__ = ["lamb_apply", "reference"]


def reference(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    ratios: Tensor,  # [num_pieces] fp64
    lr: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
) -> None:
    """Step `params` in place; dtypes and `copies` as in `adamw_step`.

    ratios: norm of a whole parameter over norm of its update, from what `lamb_average` returned.
    """
    for index, param in enumerate(params):
        value = param.to(torch.promote_types(param.dtype, torch.float32))
        average = read_state(exp_avgs, exp_avg_scales, index, value.dtype, is_signed=True)
        square = read_state(exp_avg_sqs, exp_avg_sq_scales, index, value.dtype, is_signed=False)
        update = average / bias_correction1 / (square.sqrt() / bias_correction2**0.5 + eps) + weight_decay * value
        value = value - lr * ratios[index] * update
        param.copy_(value)
        if copies:
            copies[index].copy_(value)


lamb_apply = flat_op(
    "lamb_apply",
    reference,
    columns=(
        Column("params", is_written=True),
        state("exp_avgs", is_signed=True, is_written=False),
        state("exp_avg_sqs", is_signed=False, is_written=False),
        Column("copies", is_written=True, is_optional=True),
        scales("exp_avg_scales", of="exp_avgs", is_written=False),
        scales("exp_avg_sq_scales", of="exp_avg_sqs", is_written=False),
    ),
    compiled=_cpu.lamb_apply,
)
