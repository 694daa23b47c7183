"""grouped_matmul of 8 bits, for weights that are not trained: e4m3 times e4m3, scaled, and written as bf16.

grouped_matmul_fp8(rows, row_scales, weights, weight_scales, counts) -> out

    rows            [total, in] float8_e4m3fn                  sorted by expert, as for grouped_matmul
    row_scales      [total] fp32                               what 1.0 in a row stands for
    weights         [num_experts, out, in] float8_e4m3fn       as nn.Linear has its weight
    weight_scales   [num_experts, out] fp32                    what 1.0 in a row of a weight stands for
    counts          [num_experts] int64                        their sum is `total`
    out             [total, out] bf16                          (rows times the weight of their expert) times both scales

One scale of a whole tensor is `scale.expand(total).contiguous()`. There is no gradient.

On CUDA CUTLASS serves sm_90 alone: the tensor cores of sm_80 have no fp8. It takes `in` in multiples of 16 and `out` in
multiples of 8, at addresses that are multiples of 16, and what it does not take it refuses. Counts are as for
grouped_matmul there. Everywhere else torch multiplies in fp32, on CUDA as the reference, which waits for the counts.
"""

from typing import Any

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.kernels.cuda import grouped_matmul_fp8 as cutlass
from zcore.kernels.cuda import loading
from zcore.kernels.ops.library import LIBRARY
from zcore.kernels.ops.operands import check
from zcore.kernels.ops.registering import PRIORITY

__all__ = ["check_operands", "fake", "grouped_matmul_fp8", "reference"]

OP = "grouped_matmul_fp8"
FP8 = torch.float8_e4m3fn


def reference(rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its weight and both scales."""
    out = fake(rows, row_scales, weights, weight_scales, counts)
    end = 0
    for expert, count in enumerate(counts.tolist()):
        begin, end = end, end + count
        sums = rows[begin:end].float() @ weights[expert].float().mT
        out[begin:end] = sums * weight_scales[expert] * row_scales[begin:end, None]
    return out


def check_operands(rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor) -> None:
    """Raise LayoutError or ConfigError unless they are as the header says, but for the values of counts."""
    if rows.ndim != 2 or weights.ndim != 3 or weights.shape[2] != rows.shape[1]:
        raise LayoutError(
            f"{OP}: rows has shape {tuple(rows.shape)}, weights {tuple(weights.shape)}; expected [total, in] and "
            "[num_experts, out, in]."
        )
    device, scales = rows.device, (torch.float32,)
    check(OP, "rows", rows, dtypes=(FP8,), device=device)
    check(OP, "row_scales", row_scales, shape=rows.shape[:1], dtypes=scales, device=device)
    check(OP, "weights", weights, dtypes=(FP8,), device=device)
    check(OP, "weight_scales", weight_scales, shape=weights.shape[:2], dtypes=scales, device=device)
    check(OP, "counts", counts, shape=weights.shape[:1], dtypes=(torch.int64,), device=device)


def grouped_matmul_fp8(
    rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor
) -> Tensor:
    """See `reference`; on the CPU. Raises LayoutError and ConfigError for operands that make no sense."""
    check_operands(rows, row_scales, weights, weight_scales, counts)
    numbers, total = counts.tolist(), rows.shape[0]
    if sum(numbers) != total or min(numbers, default=0) < 0:
        raise LayoutError(
            f"{OP}: counts are {numbers}, {sum(numbers)} together; expected none below 0, and {total} together, one "
            "for each row."
        )
    return reference(rows, row_scales, weights, weight_scales, counts)


def _on_cuda(rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor) -> Tensor:
    check_operands(rows, row_scales, weights, weight_scales, counts)
    reason = cutlass.why_not(rows, weights)
    if reason is not None:
        raise ConfigError(f"{OP}: {reason} ZCORE_OPS=reference computes in plain torch.")
    return cutlass.multiply(rows, row_scales, weights, weight_scales, counts)


def fake(rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor) -> Tensor:
    """What it returns, unwritten."""
    return rows.new_empty(rows.shape[0], weights.shape[1], dtype=torch.bfloat16)


def _refuse(_ctx: Any, *_grads: Any) -> None:
    raise StateError(f"zcore::{OP} has no gradient: its weights are not trained. Where they are, use grouped_matmul.")


LIBRARY.define(f"{OP}(Tensor rows, Tensor row_scales, Tensor weights, Tensor weight_scales, Tensor counts) -> Tensor")
LIBRARY.impl(OP, grouped_matmul_fp8, "CPU")
LIBRARY.impl(OP, _on_cuda, "CUDA")
torch.library.register_fake(f"zcore::{OP}", fake, lib=LIBRARY)
torch.library.register_autograd(f"zcore::{OP}", _refuse, lib=LIBRARY)
ops.reference(OP)(reference)
SERVE = torch.ops.zcore.grouped_matmul_fp8
ops.implementation(OP, source="torch", priority=PRIORITY, devices=("cpu",), dtypes=(FP8,))(SERVE)
ops.implementation(
    OP,
    source="cuda",
    priority=loading.PRIORITY,
    devices=("cuda",),
    dtypes=(FP8,),
    why_unavailable=cutlass.why_unavailable,
)(SERVE)
