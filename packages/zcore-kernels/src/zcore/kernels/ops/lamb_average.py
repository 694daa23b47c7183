"""The first pass of LAMB over lists of flat tensors: move both averages, and sum the squares that norms are made of.

You et al., arXiv 1904.00962, algorithm 2; the formula stands in native/include/zcore/lamb_step.hpp. What is between the
passes, norms of whole parameters and their ratio, is the caller's, who may have to sum over ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.cuda.stepping import Result
from zcore.kernels.ops.dynamic_code import read_state, write_state
from zcore.kernels.ops.gradients import scaled
from zcore.kernels.ops.pieces import Column, scales, state
from zcore.kernels.ops.registering import flat_op

__all__ = ["lamb_average", "reference"]


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float = 1.0,
    clip_factor: Tensor | None = None,
) -> Tensor:  # [num_pieces, 2] fp64
    """Move the averages in place; returns the sums of squares of each parameter and of its update.

    Dtypes and factors as in `adamw_step`. The squares are of updates from averages not yet rounded.
    """
    device = params[0].device if params else None
    squares = torch.zeros(len(params), 2, dtype=torch.float64, device=device)
    for index, param in enumerate(params):
        value = param.to(torch.promote_types(param.dtype, torch.float32))
        grad = scaled(grads[index], value.dtype, grad_factor, clip_factor)
        average = read_state(exp_avgs, exp_avg_scales, index, value.dtype, is_signed=True).lerp(grad, 1.0 - beta1)
        square = read_state(exp_avg_sqs, exp_avg_sq_scales, index, value.dtype, is_signed=False)
        square = square * beta2 + grad * grad * (1.0 - beta2)
        update = average / bias_correction1 / (square.sqrt() / bias_correction2**0.5 + eps) + weight_decay * value
        squares[index, 0] = value.double().square().sum()
        squares[index, 1] = update.double().square().sum()
        write_state(exp_avgs, exp_avg_scales, index, average, is_signed=True)
        write_state(exp_avg_sqs, exp_avg_sq_scales, index, square, is_signed=False)
    return squares


lamb_average = flat_op(
    "lamb_average",
    reference,
    columns=(
        Column("params"),
        Column("grads"),
        state("exp_avgs", is_signed=True),
        state("exp_avg_sqs", is_signed=False),
        scales("exp_avg_scales", of="exp_avgs"),
        scales("exp_avg_sq_scales", of="exp_avg_sqs"),
    ),
    compiled=_cpu.lamb_average,
    result=Result(2, torch.float64),
)
