"""Reads quantised blocks back in Triton; operands as in ops/dequantize_blockwise.py, arithmetic in block_codes.py.

To fp32 it moves 5 bytes an element from int8 and fp8, 4.5 from int4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.dequantize_blockwise import prepare
from zcore.kernels.triton.block_codes import decoded, places, plan_blocks, raw_values, store_values

__all__ = ["dequantize_blockwise"]


@triton.jit
def dequantize_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    out: tl.tensor,
    numel: tl.tensor,
    block_size: tl.tensor,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS blocks."""
    block, element, is_inside = places(numel, block_size, ROWS, COLUMNS)
    found = decoded(codes, scales, zero_points, block, element, is_inside, FORMAT)
    store_values(out, element, found, is_inside)


def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    *,
    format: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The [numel] values, in `dtype`; raises LayoutError and ConfigError for operands that are not served."""
    layout, values = prepare(codes, scales, zero_points, format=format, block_size=block_size, numel=numel, dtype=dtype)
    if numel:
        tile = plan_blocks(block_size)
        dequantize_kernel[(triton.cdiv(layout.num_blocks, tile.rows),)](
            *layout.raw((codes, scales, zero_points)),
            raw_values(values),
            numel,
            block_size,
            FORMAT=layout.format.number,
            **tile.options,
        )
    return values
