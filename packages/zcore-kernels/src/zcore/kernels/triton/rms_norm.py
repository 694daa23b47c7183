"""RMSNorm in Triton; operands as in ops/rms_norm.py, formulas in native/include/zcore/rms_norm.hpp.

A program keeps its rows in registers: forward moves 8 bytes an element in fp32 (with a residual 16), backward 12 (with
dsum 16), and a partial sum of the weight's gradient for each program.
"""

import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.triton.norms import launch_backward, launch_forward

__all__ = ["rms_norm", "rms_norm_backward", "rms_norm_residual"]


@triton.jit
def forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    added: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The norm of ROWS rows; `residual` with `added`, and `weight`, may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_inside = (row < rows) & (column < hidden)
    at = row * hidden + column
    s = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
    if residual is not None:
        rounded = (s + tl.load(residual + at, mask=is_inside, other=0.0).to(tl.float32)).to(added.dtype.element_ty)
        tl.store(added + at, rounded, mask=is_inside)
        s = rounded.to(tl.float32)
    normed = s * tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / hidden + eps)
    if weight is not None:
        normed *= tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32) + offset
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    s: tl.tensor,
    weight: tl.tensor,
    dsum: tl.tensor,
    ds: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradients of every so many-th tile; its share of the weight's goes to a row of `partial`."""
    column = tl.arange(0, COLUMNS)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    if weight is not None:
        factor = tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32) + offset
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        is_inside = (row < rows) & (column < hidden)
        at = row * hidden + column
        s_tile = tl.load(s + at, mask=is_inside, other=0.0).to(tl.float32)
        dy_tile = tl.load(dy + at, mask=is_inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(s_tile * s_tile, 1, keep_dims=True) / hidden + eps)
        u = dy_tile
        if weight is not None:
            u = dy_tile * factor
            dweight += dy_tile * s_tile * r
        found = r * u - s_tile * (r * r * r * (tl.sum(u * s_tile, 1, keep_dims=True) / hidden))
        if dsum is not None:
            found += tl.load(dsum + at, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(ds + at, found.to(ds.dtype.element_ty), mask=is_inside)
    if weight is not None:
        row_of_partial = partial + tl.program_id(0).to(tl.int64) * hidden + tl.arange(0, COLUMNS)
        tl.store(row_of_partial, tl.sum(dweight, 0), mask=tl.arange(0, COLUMNS) < hidden)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """The norm of rows; raises LayoutError and ConfigError for operands that are not served."""
    return launch_forward(forward_kernel, "rms_norm", x, None, {"weight": weight}, eps, offset)[0]


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Of x + residual the norm, and the sum itself."""
    return launch_forward(forward_kernel, "rms_norm_residual", x, residual, {"weight": weight}, eps, offset)


def rms_norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor | None, dsum: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised and of the weight (empty where there is none)."""
    affine = {"weight": weight}
    ds, dweight = launch_backward(backward_kernel, "rms_norm_backward", dy, s, affine, dsum, eps, offset)
    return ds, dweight
