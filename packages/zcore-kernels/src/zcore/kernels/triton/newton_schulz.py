"""Muon's Newton-Schulz iteration in Triton, which takes half of the work of two of its three products.

Both x x^T and the square of that are symmetric: tiles below the diagonal are computed, and written twice. The third
product is torch's. For x [m, n], m <= n, a step takes about m^2 (3 n + m) / 2 multiply-adds, torch's m^2 (2 n + m). The
iteration stands in ops/newton_schulz.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.triton.loading import is_interpreted

__all__ = ["newton_schulz", "symmetric_product"]

SIDE, DEPTH = 128, 64  # a tile of the result, and of what is multiplied at a time: bf16's usual ones on sm_80 and sm_90
NUM_WARPS, NUM_STAGES = 8, 3


@triton.jit
def symmetric_kernel(
    a: tl.tensor,
    symmetric: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    IS_WIDENED: tl.constexpr,
) -> None:
    """One tile of alpha a a^T + beta symmetric, on or below the diagonal, and the one opposite."""
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    row = (i * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    column = (j * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    product = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, depth, DEPTH):
        at = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left_at = row[:, None] * row_stride + at[None, :] * column_stride
        right_at = column[None, :] * row_stride + at[:, None] * column_stride
        left = tl.load(a + left_at, mask=(row[:, None] < rows) & (at[None, :] < depth), other=0.0)
        right = tl.load(a + right_at, mask=(column[None, :] < rows) & (at[:, None] < depth), other=0.0)
        if IS_WIDENED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product)
    product *= alpha
    is_inside = (row[:, None] < rows) & (column[None, :] < rows)
    lower_at = row[:, None] * rows + column[None, :]
    if symmetric is not None:
        product += beta * tl.load(symmetric + lower_at, mask=is_inside, other=0.0).to(tl.float32)
    found = product.to(out.dtype.element_ty)
    tl.store(out + lower_at, found, mask=is_inside)
    if i > j:
        opposite_at = column[:, None] * rows + row[None, :]
        is_opposite = (column[:, None] < rows) & (row[None, :] < rows)
        tl.store(out + opposite_at, tl.trans(found), mask=is_opposite)


def symmetric_product(a: Tensor, symmetric: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """The sum alpha a a^T + beta symmetric, for `a` [rows, depth] of any strides; bf16, summed in fp32.

    It is symmetric to the bit. symmetric: [rows, rows] contiguous bf16, equal to its transpose; or none.
    """
    rows, depth = a.shape
    out = a.new_empty(rows, rows)
    tiles = triton.cdiv(rows, SIDE)
    if tiles:
        symmetric_kernel[(tiles, tiles)](
            a,
            symmetric,
            out,
            rows,
            depth,
            *a.stride(),
            alpha,
            beta,
            SIDE=SIDE,
            DEPTH=DEPTH,
            IS_WIDENED=is_interpreted(),  # the interpreter of triton 3.7 multiplies the bits of bf16 as integers
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


def newton_schulz(matrix: Tensor, *, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """`matrix` (rows, columns) with its singular values moved to about 1; bf16."""
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(torch.bfloat16, copy=True)
    x = x.T if is_tall else x
    x = x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = symmetric_product(x)
        x = torch.addmm(x, symmetric_product(gram, gram, alpha=c, beta=b), x, beta=a)
    return x.T if is_tall else x
