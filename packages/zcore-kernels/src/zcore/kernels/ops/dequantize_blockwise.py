"""Reads quantised blocks back; the formula stands in native/include/zcore/dequantize_blockwise.hpp."""

import torch
from torch import Tensor

from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.operands import check, device_of
from zcore.kernels.ops.pieces import TYPES
from zcore.kernels.ops.quantized import FORMATS, QuantizedLayout, format_named
from zcore.kernels.ops.registering import register

__all__ = ["dequantize_blockwise", "prepare", "reference"]

OP = "dequantize_blockwise"


def reference(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    *,
    format: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The [numel] values, in `dtype`, of what `quantize_blockwise` made; symmetric where `zero_points` is empty.

    >>> codes = torch.tensor([0, 1, -2, 127], dtype=torch.int8)
    >>> no_points = torch.empty(0, dtype=torch.int8)
    >>> reference(codes, torch.tensor([2.0, 0.5]), no_points, format="int8", block_size=2, numel=4)
    tensor([ 0.0000,  2.0000, -1.0000, 63.5000])
    """
    kind = format_named(OP, format)
    layout = QuantizedLayout(numel, block_size, kind, zero_points.numel() == 0)
    if kind.per_byte > 1:
        halves = torch.stack((codes & 15, codes >> 4), 1).reshape(-1)[:numel]
        codes = (halves ^ 8).to(torch.int8) - 8
    blocks = layout.in_blocks(codes.float())
    if not layout.is_symmetric:
        blocks = blocks - zero_points.float()[:, None]
    return layout.flat(blocks * scales[:, None]).to(dtype)


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
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    layout, values = prepare(codes, scales, zero_points, format=format, block_size=block_size, numel=numel, dtype=dtype)
    run(
        OP,
        codes.device,
        layout.addresses((codes, scales, zero_points)),
        values.data_ptr(),
        TYPES[dtype],
        numel=numel,
        block_size=block_size,
        format=layout.format.number,
    )
    return values


def prepare(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    *,
    format: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype,
) -> tuple[QuantizedLayout, Tensor]:
    """How the codes lie, and memory for their values; raises LayoutError and ConfigError for what is not served."""
    layout = QuantizedLayout(numel, block_size, format_named(OP, format), zero_points.numel() == 0)
    layout.require(OP)
    device = device_of(codes)
    layout.require_operands(OP, codes, scales, zero_points, device=device)
    values = torch.empty(numel, dtype=dtype, device=device)
    check(OP, "the result", values, device=device)
    return layout, values


def _fake(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    *,
    format: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return codes.new_empty(numel, dtype=dtype)


register(
    OP,
    "(Tensor codes, Tensor scales, Tensor zero_points, *, str format, SymInt block_size, SymInt numel,"
    " ScalarType dtype=float) -> Tensor",
    reference=reference,
    cpu=dequantize_blockwise,
    cuda=dequantize_blockwise,
    triton="dequantize_blockwise",
    fake=_fake,
    dtypes=tuple(kind.dtype for kind in FORMATS.values()),
)
