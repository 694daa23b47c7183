"""The sum or mean of quantised shards, quantised again, in Triton; operands as in ops/dequantize_reduce_requantize.py.

A program adds up its blocks in registers: it moves k + 1 bytes an element of int8 and fp8 for k shards. A kernel is
compiled for each number of shards.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.dequantize_reduce_requantize import factor_of, require_shards
from zcore.kernels.ops.noise import mixed_seed
from zcore.kernels.ops.quantized import Quantized
from zcore.kernels.triton.block_codes import decoded, places, plan_blocks
from zcore.kernels.triton.quantize_blockwise import quantize_tile

__all__ = ["dequantize_reduce_requantize"]


@triton.jit
def shard_values(
    shards: tl.tuple,
    SHARD: tl.constexpr,
    block: tl.tensor,
    element: tl.tensor,
    is_inside: tl.tensor,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """What one of the shards holds of a tile, fp32."""
    codes, scales, zero_points = shards
    points = None if zero_points is None else zero_points[SHARD]
    return decoded(codes[SHARD], scales[SHARD], points, block, element, is_inside, FORMAT)


@triton.jit(do_not_specialize=["seed", "offset", "factor"])
def reduce_kernel(
    shard_codes: tl.tuple,
    shard_scales: tl.tuple,
    shard_zero_points: tl.tuple,
    codes: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    numel: tl.tensor,
    num_blocks: tl.tensor,
    block_size: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    offset: tl.tensor,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS blocks, added in the order of the shards."""
    block, element, is_inside = places(numel, block_size, ROWS, COLUMNS)
    shards = (shard_codes, shard_scales, shard_zero_points)
    total = shard_values(shards, 0, block, element, is_inside, FORMAT)
    for shard in tl.static_range(1, len(shard_codes)):
        total += shard_values(shards, shard, block, element, is_inside, FORMAT)
    quantize_tile(
        tl.where(is_inside, total * factor, 0.0),
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


def dequantize_reduce_requantize(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    *,
    format: str,
    block_size: int,
    numel: int,
    reduction: str = "mean",
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    """Codes, scales and zero points; raises LayoutError and ConfigError for operands that are not served."""
    factor = factor_of(reduction, len(codes))
    layout = require_shards(
        codes, scales, zero_points, format=format, block_size=block_size, numel=numel, offset=offset
    )
    made = layout.empty(codes[0].device)
    if numel:
        tile = plan_blocks(block_size)
        shards = zip(codes, scales, zero_points, strict=True)
        each_codes, each_scales, each_zero_points = zip(*map(layout.raw, shards), strict=True)
        reduce_kernel[(triton.cdiv(layout.num_blocks, tile.rows),)](
            each_codes,
            each_scales,
            None if layout.is_symmetric else each_zero_points,
            *layout.raw(made),
            numel,
            layout.num_blocks,
            block_size,
            factor,
            mixed_seed(seed or 0),
            offset,
            FORMAT=layout.format.number,
            LARGEST=layout.format.largest,
            IS_STOCHASTIC=seed is not None,
            **tile.options,
        )
    return made
