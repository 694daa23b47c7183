"""Reads packed signs back in Triton; operands as in ops/unpack_signs.py: 4.1 bytes an element to fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.operands import check, device_of
from zcore.kernels.ops.signs import SignsLayout
from zcore.kernels.triton.block_codes import raw_values, store_values

__all__ = ["unpack_signs"]

OP = "unpack_signs"
PIECE = 2048  # elements of a program, 16 a thread. Not measured on a GPU
NUM_WARPS = 4


@triton.jit
def unpack_kernel(
    signs: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    numel: tl.tensor,
    block_size: tl.tensor,
    PIECE: tl.constexpr,
) -> None:
    """PIECE elements."""
    element = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    is_inside = element < numel
    byte = tl.load(signs + element // 8, mask=is_inside, other=0).to(tl.int32)
    scale = tl.load(scales + element // block_size, mask=is_inside, other=0.0)
    sign = (byte >> (element % 8).to(tl.int32)) << 31
    store_values(out, element, (scale.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), is_inside)


def unpack_signs(
    signs: Tensor, scales: Tensor, *, block_size: int, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The [numel] values, in `dtype`; raises LayoutError and ConfigError for operands that are not served."""
    layout = SignsLayout(numel, block_size)
    layout.require(OP)
    device = device_of(signs)
    check(OP, "signs", signs, dtypes=(torch.uint8,), numel=layout.num_bytes, device=device)
    check(OP, "scales", scales, dtypes=(torch.float32,), numel=layout.num_blocks, device=device)
    values = torch.empty(numel, dtype=dtype, device=device)
    check(OP, "the result", values, device=device)
    if numel:
        unpack_kernel[(triton.cdiv(numel, PIECE),)](
            signs, scales, raw_values(values), numel, block_size, PIECE=PIECE, num_warps=NUM_WARPS
        )
    return values
