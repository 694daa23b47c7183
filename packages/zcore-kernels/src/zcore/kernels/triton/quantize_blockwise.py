"""Block-wise quantisation in Triton; operands as in ops/quantize_blockwise.py, arithmetic in block_codes.py.

A program keeps its blocks in registers from the one read to the one write: in fp32 it moves 5 bytes an element to int8
and fp8, 4.5 to int4.
"""

import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.noise import mixed_seed
from zcore.kernels.ops.quantize_blockwise import prepare
from zcore.kernels.ops.quantized import Quantized
from zcore.kernels.triton.block_codes import (
    encoded,
    load_values,
    measured,
    noise_at,
    places,
    plan_blocks,
    raw_values,
    store_codes,
)

__all__ = ["quantize_blockwise", "quantize_tile"]


@triton.jit
def quantize_tile(
    values: tl.tensor,
    block: tl.tensor,
    element: tl.tensor,
    is_inside: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    num_blocks: tl.tensor,
    block_size: tl.tensor,
    seed: tl.tensor,
    offset: tl.tensor,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes what `values` [ROWS, COLUMNS] become; `zero_points` may be None."""
    IS_SYMMETRIC: tl.constexpr = zero_points is None
    scale, inverse, zero_point = measured(values, LARGEST, IS_SYMMETRIC)
    tl.store(scales + block, scale, mask=block < num_blocks)
    if zero_points is not None:
        tl.store(zero_points + block, zero_point.to(tl.int8), mask=block < num_blocks)
    noise = tl.zeros([ROWS, COLUMNS], tl.int32)
    if IS_STOCHASTIC:
        first = tl.program_id(0).to(tl.int64) * ROWS * block_size + offset
        noise = noise_at(seed, element + offset, first)
    found = encoded(values, noise, inverse, zero_point, FORMAT, LARGEST, IS_SYMMETRIC, IS_STOCHASTIC)
    store_codes(codes, element, found, is_inside, FORMAT, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["seed", "offset"])
def quantize_kernel(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    numel: tl.tensor,
    num_blocks: tl.tensor,
    block_size: tl.tensor,
    seed: tl.tensor,
    offset: tl.tensor,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS blocks."""
    block, element, is_inside = places(numel, block_size, ROWS, COLUMNS)
    quantize_tile(
        load_values(values, element, is_inside),
        block,
        element,
        is_inside,
        codes,
        scales,
        zero_points,
        num_blocks,
        block_size,
        seed,
        offset,
        FORMAT,
        LARGEST,
        IS_STOCHASTIC,
        ROWS,
        COLUMNS,
    )


def quantize_blockwise(
    values: Tensor,
    *,
    format: str,
    block_size: int,
    is_symmetric: bool = True,
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    """Codes, scales and zero points; raises LayoutError and ConfigError for operands that are not served."""
    layout, made = prepare(values, format=format, block_size=block_size, is_symmetric=is_symmetric, offset=offset)
    if layout.numel:
        tile = plan_blocks(block_size)
        quantize_kernel[(triton.cdiv(layout.num_blocks, tile.rows),)](
            raw_values(values),
            *layout.raw(made),
            layout.numel,
            layout.num_blocks,
            block_size,
            mixed_seed(seed or 0),
            offset,
            FORMAT=layout.format.number,
            LARGEST=layout.format.largest,
            IS_STOCHASTIC=seed is not None,
            **tile.options,
        )
    return made
