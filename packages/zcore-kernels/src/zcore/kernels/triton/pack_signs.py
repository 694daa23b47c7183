"""Compression to one bit in Triton; operands as in ops/pack_signs.py, formulas in native/include/zcore/pack_signs.hpp.

Magnitudes are added up in that order, sixteen partial sums a block in double, so that scales have the same bits as on
the CPU. A program takes ROWS blocks twice, LANES elements of each at a time; the second time they come from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.operands import check, device_of
from zcore.kernels.ops.signs import SignsLayout
from zcore.kernels.triton.block_codes import EXACT, load_values, raw_values

__all__ = ["pack_signs"]

OP = "pack_signs"
ROWS = 32  # blocks of a program, whose warps then read 64 bytes of each at a time. Not measured on a GPU
NUM_WARPS = 4
LANES = tl.constexpr(16)
LARGEST_SUM = tl.constexpr(2.0**200)  # of a block, where all of it is finite
NAN = tl.constexpr(float("nan"))


@triton.jit
def halved(sums: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """The lower half of the sums of each row, each with its like of the upper added."""
    low, high = tl.split(tl.permute(sums.reshape(ROWS, 2, LANES // 2), (0, 2, 1)))
    return low + high


@triton.jit
def pack_kernel(
    values: tl.tensor,
    error: tl.tensor,
    signs: tl.tensor,
    scales: tl.tensor,
    numel: tl.tensor,
    num_blocks: tl.tensor,
    block_size: tl.tensor,
    ROWS: tl.constexpr,
) -> None:
    """ROWS blocks."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    begin = block * block_size
    count = tl.maximum(tl.minimum(numel - begin, block_size), 0)
    lane = tl.arange(0, LANES)[None, :]
    sums = tl.zeros([ROWS, LANES], tl.float64)
    for start in range(0, block_size, LANES):
        is_inside = start + lane < count
        element = begin + start + lane
        added = load_values(values, element, is_inside) + load_values(error, element, is_inside)
        sums += tl.abs(added).to(tl.float64)
    total = halved(halved(halved(sums, ROWS, 16), ROWS, 8), ROWS, 4)
    low, high = tl.split(total.reshape(ROWS, 1, 2))
    total = low + high
    mean = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    scale = tl.where(total <= LARGEST_SUM, mean, NAN)
    tl.store(scales + block, scale, mask=block < num_blocks)
    for start in range(0, block_size, LANES):
        is_inside = start + lane < count
        element = begin + start + lane
        added = load_values(values, element, is_inside) + load_values(error, element, is_inside)
        bits = added.to(tl.int32, bitcast=True)
        signed = (scale.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
        tl.store(error + element, added - signed, mask=is_inside & (scale >= 0.0))  # else it stays
        places = ((bits >> 31) & 1) << (lane % 8)
        of_bytes = tl.sum(tl.where(is_inside, places, 0).reshape(ROWS, LANES // 8, 8), 2)
        first = start + 8 * tl.arange(0, LANES // 8)[None, :]
        tl.store(signs + (begin + first) // 8, of_bytes.to(tl.uint8), mask=first < count)


def pack_signs(values: Tensor, error: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Signs and scales; raises LayoutError and ConfigError for operands that are not served."""
    layout = SignsLayout(values.numel(), block_size)
    layout.require(OP)
    device = device_of(values)
    check(OP, "values", values, device=device)
    check(OP, "error", error, dtypes=(torch.float32,), numel=layout.numel, device=device)
    signs = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
    scales = torch.empty(layout.num_blocks, dtype=torch.float32, device=device)
    if layout.numel:
        pack_kernel[(triton.cdiv(layout.num_blocks, ROWS),)](
            raw_values(values),
            error,
            signs,
            scales,
            layout.numel,
            layout.num_blocks,
            block_size,
            ROWS=ROWS,
            num_warps=NUM_WARPS,
            **EXACT,
        )
    return signs, scales
