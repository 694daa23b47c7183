"""LayerNorm in Triton; operands as in ops/layer_norm.py, formulas in native/include/zcore/layer_norm.hpp.

Rows stay in registers, so that the variance is of differences from the mean without another read. Bytes are those of
rms_norm.py here.
"""

import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.triton.norms import launch_backward, launch_forward

__all__ = ["layer_norm", "layer_norm_backward", "layer_norm_residual"]


@triton.jit
def normalise(s: tl.tensor, is_inside: tl.tensor, hidden: tl.tensor, eps: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The rows of `s` less their mean, over their deviation, and one over the deviation."""
    centred = tl.where(is_inside, s - tl.sum(s, 1, keep_dims=True) / hidden, 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / hidden + eps)
    return centred * r, r


@triton.jit
def forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    added: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The norm of ROWS rows; `residual` with `added`, `weight` and `bias` may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_inside = (row < rows) & (column < hidden)
    at = row * hidden + column
    s = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
    if residual is not None:
        rounded = (s + tl.load(residual + at, mask=is_inside, other=0.0).to(tl.float32)).to(added.dtype.element_ty)
        tl.store(added + at, rounded, mask=is_inside)
        s = rounded.to(tl.float32)
    normed, _ = normalise(s, is_inside, hidden, eps)
    if weight is not None:
        normed *= tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32)
    if bias is not None:
        normed += tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    s: tl.tensor,
    weight: tl.tensor,
    dsum: tl.tensor,
    ds: tl.tensor,
    weight_partial: tl.tensor,
    bias_partial: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradients of every so many-th tile; its share of weight's and bias' goes to a row of each partial sum."""
    column = tl.arange(0, COLUMNS)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    if weight is not None:
        factor = tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        is_inside = (row < rows) & (column < hidden)
        at = row * hidden + column
        normed, r = normalise(tl.load(s + at, mask=is_inside, other=0.0).to(tl.float32), is_inside, hidden, eps)
        dy_tile = tl.load(dy + at, mask=is_inside, other=0.0).to(tl.float32)
        u = dy_tile
        if weight is not None:
            u = dy_tile * factor
            dweight += dy_tile * normed
        if bias_partial is not None:
            dbias += dy_tile
        mean_u = tl.sum(u, 1, keep_dims=True) / hidden
        found = r * (u - mean_u - normed * (tl.sum(u * normed, 1, keep_dims=True) / hidden))
        if dsum is not None:
            found += tl.load(dsum + at, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(ds + at, found.to(ds.dtype.element_ty), mask=is_inside)
    in_partial = tl.program_id(0).to(tl.int64) * hidden + tl.arange(0, COLUMNS)
    if weight is not None:
        tl.store(weight_partial + in_partial, tl.sum(dweight, 0), mask=tl.arange(0, COLUMNS) < hidden)
    if bias_partial is not None:
        tl.store(bias_partial + in_partial, tl.sum(dbias, 0), mask=tl.arange(0, COLUMNS) < hidden)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of rows; raises LayoutError and ConfigError for operands that are not served."""
    return launch_forward(forward_kernel, "layer_norm", x, None, {"weight": weight, "bias": bias}, eps)[0]


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Of x + residual the norm, and the sum itself."""
    affine = {"weight": weight, "bias": bias}
    return launch_forward(forward_kernel, "layer_norm_residual", x, residual, affine, eps)


def layer_norm_backward(
    dy: Tensor, s: Tensor, weight: Tensor | None, bias: Tensor | None, dsum: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what was normalised, of the weight and of the bias (these empty where there is none)."""
    affine = {"weight": weight, "bias": bias}
    ds, dweight, dbias = launch_backward(backward_kernel, "layer_norm_backward", dy, s, affine, dsum, eps)
    return ds, dweight, dbias
