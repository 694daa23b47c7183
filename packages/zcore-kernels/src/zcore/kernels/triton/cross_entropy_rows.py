"""Cross-entropy of rows of logits, overwritten by its gradient; formulas in ops/cross_entropy_rows.py.

One program a row. It goes over the vocabulary twice, a block at a time: first for maximum, sum of exponentials and sum
of logits (online softmax, arXiv 1805.02867), then for the gradient. So logits are read twice and written once, or read
once where no gradient is asked for. Arithmetic is fp32. A target beyond the vocabulary gives the loss NaN: to refuse
it, the host would have to wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.cross_entropy_rows import RowSettings

__all__ = ["cross_entropy_rows"]

# Columns at a time, 16 warps on them. Not measured on a GPU yet.
MOST_COLUMNS = 16384


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Of x in fp32; no power of e is above 1."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def rows_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    factors: tl.tensor,
    losses: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    ignore_index: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    cap: tl.tensor,
    HAS_FACTORS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One row; `factors` and `cap` count where HAS_FACTORS and HAS_CAP say so."""
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    target = tl.load(targets + row)
    is_kept = target != ignore_index
    columns = tl.arange(0, COLUMNS)
    most = -float("inf")
    total = 0.0  # of exp(logit - most)
    added = 0.0  # of logits
    of_target = 0.0
    found = 0
    for start in range(0, vocabulary, COLUMNS):
        at = start + columns
        x = tl.load(start_of_row + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        if HAS_CAP:
            x = tl.where(at < vocabulary, cap * tanh(x / cap), -float("inf"))
        new_most = tl.maximum(most, tl.max(x, 0))
        shift = tl.where(new_most == -float("inf"), 0.0, new_most)  # -inf - -inf is NaN
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(x - shift), 0)
        most = new_most
        added += tl.sum(tl.where(at < vocabulary, x, 0.0), 0)
        of_target += tl.sum(tl.where(at == target, x, 0.0), 0)
        found += tl.sum((at == target).to(tl.int32) * (at < vocabulary).to(tl.int32), 0)
    lse = most + tl.log(total)
    loss = lse - (1.0 - smoothing) * of_target + z_loss * lse * lse
    if smoothing != 0.0:  # a logit of -inf makes their sum so, which counts only where there is smoothing
        loss -= smoothing * (added / vocabulary)
    loss = tl.where(found == 1, loss, float("nan"))
    tl.store(losses + row, tl.where(is_kept, loss, 0.0))
    if WRITES_GRADIENT:
        factor = 1.0
        if HAS_FACTORS:
            factor = tl.load(factors + row).to(tl.float32)
        factor = tl.where(is_kept, factor, 0.0)
        of_p = factor * (1.0 + 2.0 * z_loss * lse)
        for start in range(0, vocabulary, COLUMNS):
            at = start + columns
            x = tl.load(start_of_row + at, mask=at < vocabulary, other=0.0).to(tl.float32)
            ratio = x
            if HAS_CAP:
                ratio = tanh(x / cap)
                x = ratio * cap
            gradient = tl.exp(x - lse) * of_p - factor * (smoothing / vocabulary)
            gradient -= tl.where(at == target, factor * (1.0 - smoothing), 0.0)
            if HAS_CAP:
                gradient *= 1.0 - ratio * ratio
            tl.store(start_of_row + at, gradient.to(logits.dtype.element_ty), mask=at < vocabulary)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, factors: Tensor | None, settings: RowSettings, *, writes_gradient: bool
) -> Tensor:
    """As that of zcore.kernels.ops.cross_entropy_rows, for fp32, bf16 and fp16; each row of `logits` is contiguous."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return losses
    columns = min(MOST_COLUMNS, triton.next_power_of_2(max(1, vocabulary)))
    with torch.cuda.device_of(logits):  # a launch goes to the current device
        rows_kernel[(rows,)](
            logits,
            targets,
            losses if factors is None else factors.contiguous(),  # an address that is not read where there are none
            losses,
            logits.stride(0),
            vocabulary,
            settings.ignore_index,
            settings.label_smoothing,
            settings.z_loss,
            1.0 if settings.logit_softcap is None else settings.logit_softcap,
            HAS_FACTORS=factors is not None,
            HAS_CAP=settings.logit_softcap is not None,
            WRITES_GRADIENT=writes_gradient,
            COLUMNS=columns,
            num_warps=max(4, min(16, columns // 1024)),
        )
    return losses
