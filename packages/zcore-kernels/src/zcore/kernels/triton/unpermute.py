"""The weighted sum of each token's rows in Triton; operands as in ops/permute.py, formulas in native/.../unpermute.hpp.

A program goes over the choices of its tokens in order, in fp32, so that without weights a sum has the bits of the CPU's
op. Backward reads a piece of a token's gradient once for up to MOST_CHOICES of its choices. With k = 2 in fp32 forward
moves 12 bytes an element of out, backward 20.

A place beyond the rows reads as NaN, and is not written; of rows that two choices name or none, the gradient is that of
either, or is not written. To refuse them, the host would have to wait for the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.permute import (
    check_operands_unpermute,
    check_operands_unpermute_backward,
    fake_unpermute,
    fake_unpermute_backward,
)
from zcore.kernels.triton.tiles import Tile, plan_pieces

__all__ = ["unpermute", "unpermute_backward"]

MOST_CHOICES = 8  # of a program of backward; k is seldom more
PIECE = 2048  # elements of these rows, and as many of what they become; not measured on a GPU yet


@triton.jit
def forward_kernel(
    rows: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    num_rows: tl.tensor,
    hidden: tl.tensor,
    k: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A piece of ROWS tokens; `weights` may be None."""
    pieces = tl.cdiv(hidden, COLUMNS)
    token = (tl.program_id(0) // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % pieces).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_token = token < tokens
    is_inside = is_token & (column < hidden)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for each in range(k):
        choice = token * k + each
        place = tl.load(places + choice, mask=is_token, other=-1)
        is_known = (place >= 0) & (place < num_rows)
        row = tl.load(rows + place * hidden + column, mask=is_inside & is_known, other=float("nan")).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + choice, mask=is_token, other=0.0).to(tl.float32)
        total += row
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(
    dout: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    drows: tl.tensor,
    dweights: tl.tensor,
    num_rows: tl.tensor,
    hidden: tl.tensor,
    k: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS choices of one token; `weights` may be None, and `dweights` where they get no gradient."""
    groups = tl.cdiv(k, ROWS)
    token = (tl.program_id(0) // groups).to(tl.int64)
    each = (tl.program_id(0) % groups) * ROWS + tl.arange(0, ROWS)[:, None]
    choice, is_choice = token * k + each, each < k
    place = tl.load(places + choice, mask=is_choice, other=-1)
    is_known = is_choice & (place >= 0) & (place < num_rows)
    total = tl.zeros([ROWS, 1], tl.float32)
    weight = tl.full([ROWS, 1], 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + choice, mask=is_choice, other=0.0).to(tl.float32)
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        is_inside = is_known & (column < hidden)
        at = place * hidden + column
        gradient = tl.load(dout + token * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
        if dweights is not None:
            row = tl.load(rows + at, mask=is_inside, other=0.0).to(tl.float32)
            total += tl.sum(gradient * row, 1, keep_dims=True)
        tl.store(drows + at, (weight * gradient).to(drows.dtype.element_ty), mask=is_inside)
    if dweights is not None:
        total = tl.where(is_known, total, float("nan"))
        tl.store(dweights + choice, total.to(dweights.dtype.element_ty), mask=is_choice)


def unpermute(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of each token's rows; raises LayoutError and ConfigError for operands that are not served."""
    check_operands_unpermute(rows, places, weights, device=rows.device)
    out = fake_unpermute(rows, places, weights)
    (tokens, hidden), k = out.shape, places.shape[1]
    if out.numel():
        tile = plan_pieces(hidden)
        forward_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(hidden, tile.columns),)](
            rows,
            places,
            weights,
            out,
            tokens,
            rows.shape[0],
            hidden,
            k,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def unpermute_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and of weights, which is empty where there are none; only it needs the rows."""
    check_operands_unpermute_backward(dout, rows, places, weights, device=dout.device)
    drows, dweights = fake_unpermute_backward(dout, rows, places, weights)
    (tokens, k), hidden = places.shape, dout.shape[1]
    if places.numel():
        choices = min(triton.next_power_of_2(k), MOST_CHOICES)
        tile = Tile(choices, min(triton.next_power_of_2(max(hidden, 1)), PIECE // choices))
        backward_kernel[(tokens * triton.cdiv(k, choices),)](
            dout,
            rows,
            places,
            weights,
            drows,
            dweights if dweights.numel() else None,
            drows.shape[0],
            hidden,
            k,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return drows, dweights
