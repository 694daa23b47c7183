"""Rows sorted by expert in Triton; operands as in ops/permute.py, drawn in native/include/zcore/permute.hpp.

A stable counting sort without atomics, so that places are those of the CPU's op, and nothing waits for the device:

    counts_kernel    of BLOCK choices the rank of each among those of its expert, and how many each expert has
    torch.cumsum     over [num_experts + 1, blocks]: where the choices of each expert and block begin
    copy_kernel      place = begin + rank; a program reads a piece of x once and writes it k times

An expert that there is not has no count, and its choices come behind all others, as rows of NaN: to refuse it, the
host would have to wait for the device. Beside rows and choices 16 bytes are taken for each expert and block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.permute import check_operands, fake
from zcore.kernels.triton.tiles import plan_pieces

__all__ = ["permute"]

# Choices of a program, each compared with each: 64 comparisons a thread. Half would double the counts, twice would
# double comparisons. Not measured on a GPU yet.
BLOCK = 128
NUM_WARPS = 8


@triton.jit
def counts_kernel(
    experts: tl.tensor,
    ranks: tl.tensor,
    counts: tl.tensor,
    choices: tl.tensor,
    num_experts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Of one block the ranks, and the counts of those experts that it names; the others of `counts` are zero before."""
    block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    choice, opposite = block * BLOCK + at[:, None], block * BLOCK + at[None, :]
    mine = tl.load(experts + choice, mask=choice < choices, other=-1)
    theirs = tl.load(experts + opposite, mask=opposite < choices, other=-1)
    mine = tl.where((mine >= 0) & (mine < num_experts), mine, num_experts).to(tl.int32)
    theirs = tl.where((theirs >= 0) & (theirs < num_experts), theirs, num_experts).to(tl.int32)
    is_same = (mine == theirs) & (opposite < choices)
    rank = tl.sum((is_same & (at[None, :] < at[:, None])).to(tl.int32), 1, keep_dims=True)
    later = tl.sum((is_same & (at[None, :] > at[:, None])).to(tl.int32), 1, keep_dims=True)
    tl.store(ranks + choice, rank, mask=choice < choices)
    tl.store(counts + mine.to(tl.int64) * blocks + block, rank + 1, mask=(choice < choices) & (later == 0))


@triton.jit
def copy_kernel(
    x: tl.tensor,
    experts: tl.tensor,
    ranks: tl.tensor,
    begins: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    tokens: tl.tensor,
    hidden: tl.tensor,
    k: tl.tensor,
    num_experts: tl.tensor,
    blocks: tl.tensor,
    pieces: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One of the `pieces` of ROWS tokens to each of their places; the first writes the places."""
    piece = tl.program_id(0) % pieces
    token = (tl.program_id(0) // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = piece.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_token = token < tokens
    is_inside = is_token & (column < hidden)
    tile = tl.load(x + token * hidden + column, mask=is_inside, other=0.0)
    nan = tl.full([1, 1], float("nan"), tl.float32).to(tile.dtype)
    for each in range(k):
        choice = token * k + each
        expert = tl.load(experts + choice, mask=is_token, other=0)
        is_known = (expert >= 0) & (expert < num_experts)
        group = tl.where(is_known, expert, num_experts)
        begin = tl.load(begins + group * blocks + choice // BLOCK, mask=is_token, other=0)
        place = begin + tl.load(ranks + choice, mask=is_token, other=0)
        tl.store(rows + place * hidden + column, tl.where(is_known, tile, nan), mask=is_inside)
        if piece == 0:
            tl.store(places + choice, place, mask=is_token)


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, counts and places; raises LayoutError and ConfigError for operands that are not served."""
    check_operands(x, experts, num_experts, device=x.device)
    rows, _, places = fake(x, experts, num_experts)
    (tokens, hidden), k, choices = x.shape, experts.shape[1], experts.numel()
    blocks = triton.cdiv(choices, BLOCK)
    counts = experts.new_zeros(num_experts + 1, blocks)
    ranks = torch.empty_like(experts, dtype=torch.int32)
    if choices:
        counts_kernel[(blocks,)](experts, ranks, counts, choices, num_experts, blocks, BLOCK=BLOCK, num_warps=NUM_WARPS)
        tile = plan_pieces(hidden)
        pieces = max(triton.cdiv(hidden, tile.columns), 1)  # one that writes places where rows have no elements
        copy_kernel[(triton.cdiv(tokens, tile.rows) * pieces,)](
            x,
            experts,
            ranks,
            counts.flatten().cumsum(0).sub_(counts.flatten()),
            rows,
            places,
            tokens,
            hidden,
            k,
            num_experts,
            blocks,
            pieces,
            BLOCK=BLOCK,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return rows, counts[:num_experts].sum(1), places
