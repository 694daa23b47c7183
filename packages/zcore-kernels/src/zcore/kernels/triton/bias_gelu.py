"""gelu(x + bias) in Triton; operands as in ops/bias_gelu.py, formulas in native/include/zcore/bias_gelu.hpp.

In fp32 forward moves 8 bytes an element, backward 12: the bias' gradient is summed while dx is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.gelu import form_of
from zcore.kernels.ops.operands import check, rows_of
from zcore.kernels.triton.activations import activation, activation_and_slope
from zcore.kernels.triton.tiles import num_programs, plan_pieces

__all__ = ["bias_gelu", "bias_gelu_backward"]


@triton.jit
def forward_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One tile; `bias` may be None."""
    tiles = tl.cdiv(hidden, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_inside = (row < rows) & (column < hidden)
    at = row * hidden + column
    added = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
    if bias is not None:
        added += tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(out + at, activation(added, FORM).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(
    dout: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Every so many-th tile of a few columns; what of the bias' gradient is theirs goes to a row of `partial`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        is_inside = (row < rows) & (column < hidden)
        at = row * hidden + column
        added = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
        if bias is not None:
            added += shift
        _, slope = activation_and_slope(added, FORM)
        found = tl.load(dout + at, mask=is_inside, other=0.0).to(tl.float32) * slope
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=is_inside)
        if bias is not None:
            dbias += found
    if bias is not None:
        flat = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial + tl.program_id(1).to(tl.int64) * hidden + flat, tl.sum(dbias, 0), mask=flat < hidden)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """The activation of x + bias; raises LayoutError and ConfigError for operands that are not served."""
    form = form_of("bias_gelu", approximate)
    rows, hidden = rows_of("bias_gelu", "x", x, device=x.device)
    if bias is not None:
        check("bias_gelu", "bias", bias, shape=(hidden,), device=x.device)
    out, tile = torch.empty_like(x), plan_pieces(hidden)
    if x.numel():
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(hidden, tile.columns)
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
        forward_kernel[(programs,)](x, bias, out, rows, hidden, FORM=form, **sizes)
    return out


def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where there is none)."""
    op = "bias_gelu_backward"
    form = form_of(op, approximate)
    rows, hidden = rows_of(op, "x", x, device=x.device)
    check(op, "dout", dout, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    if bias is not None:
        check(op, "bias", bias, shape=(hidden,), device=x.device)
    dx, tile = torch.empty_like(x), plan_pieces(hidden)
    across, down = triton.cdiv(hidden, tile.columns), triton.cdiv(rows, tile.rows)
    down = min(down, triton.cdiv(num_programs(x.device), max(across, 1)))
    partial = None if bias is None else x.new_empty(down, hidden, dtype=torch.float32)
    if x.numel():
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
        backward_kernel[(across, down)](dout, x, bias, dx, partial, rows, hidden, FORM=form, **sizes)
    return dx, x.new_empty(0) if bias is None or partial is None else partial.sum(0).to(bias.dtype)
