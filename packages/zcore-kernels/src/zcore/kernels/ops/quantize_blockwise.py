"""Quantises a tensor block by block; the formulas stand in native/include/zcore/quantize_blockwise.hpp.

Blocks with a scale each: arXiv 2110.02861, section 2. fp8: arXiv 2209.05433.
"""

import torch
from torch import Tensor

from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.noise import noise_at, round_to_neighbour, word_of
from zcore.kernels.ops.operands import check, check_place, device_of
from zcore.kernels.ops.pieces import FLOATS, TYPES
from zcore.kernels.ops.quantized import Format, Quantized, QuantizedLayout, format_named
from zcore.kernels.ops.registering import register

__all__ = ["prepare", "quantize_blockwise", "reference"]

OP = "quantize_blockwise"
SMALLEST_SCALE = 2.0**-126  # its inverse is finite


def reference(
    values: Tensor,
    *,
    format: str,
    block_size: int,
    is_symmetric: bool = True,
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    """Codes, scales and zero points of `values`, of any shape and floating-point dtype; see quantized.py for theirs.

    format: int8, int4, float8_e4m3fn or float8_e5m2. is_symmetric: else with zero points, which integers may have, for
    blocks that do not lie about zero. seed: rounds stochastically, else to the nearest. offset: the place of the first
    element in something larger, so that a part is rounded as it would be in the whole.

    >>> codes, scales, zero_points = reference(torch.tensor([0.0, 1.0, -2.0, 254.0]), format="int8", block_size=4)
    >>> codes, scales, zero_points
    (tensor([  0,   0,  -1, 127], dtype=torch.int8), tensor([2.]), tensor([], dtype=torch.int8))
    """
    kind = format_named(OP, format)
    layout = QuantizedLayout(values.numel(), block_size, kind, is_symmetric)
    blocks = layout.in_blocks(values.float())
    high, low = (blocks.abs() if is_symmetric else blocks).amax(1).clamp(min=0), blocks.amin(1).clamp(max=0)
    if is_symmetric:
        scales = high / kind.largest
    else:
        levels = kind.largest - kind.lowest
        scales = high / levels - low / levels  # the difference itself may overflow
    is_finite = high.isfinite() & low.isfinite()
    scales = scales.clamp(min=SMALLEST_SCALE).masked_fill(~is_finite, torch.nan)
    inverse = 1.0 / scales
    scaled = (blocks * inverse[:, None]).masked_fill(~is_finite[:, None], 0.0)
    points = torch.zeros_like(scales)
    if not is_symmetric:
        points = (kind.lowest - low * inverse).clamp(max=kind.largest).round().masked_fill(~is_finite, 0.0)
    noise = None
    if seed is not None:
        noise = layout.in_blocks(noise_at(offset, layout.numel, seed=seed, device=values.device))
    if kind.is_integer:
        lowest = -kind.largest if is_symmetric else kind.lowest
        scaled = scaled.clamp((lowest - points)[:, None], (kind.largest - points)[:, None])
        codes = layout.flat(round_to_neighbour(scaled, noise) + points[:, None]).to(torch.int8)
        codes = _in_halves(codes) if kind.per_byte > 1 else codes
    else:
        codes = layout.flat(_to_float8(scaled.clamp(kind.lowest, kind.largest), kind, noise))
    return codes, scales, points[: 0 if is_symmetric else None].to(torch.int8)


def _in_halves(codes: Tensor) -> Tensor:
    """Two numbers of 4 bits to a byte."""
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2).view(torch.uint8)
    return pairs[:, 0].bitwise_and(15) | pairs[:, 1] << 4


def _to_float8(scaled: Tensor, kind: Format, noise: Tensor | None) -> Tensor:
    if noise is None:
        return scaled.to(kind.dtype)
    dropped = 23 - kind.mantissa_bits
    magnitude = scaled.abs()
    bits = magnitude.view(torch.int32) + ((2 * noise + 1) << (dropped - 17))
    normal = bits.bitwise_and(-1 << dropped).view(torch.float32)
    quantum = kind.smallest_normal * 2.0**-kind.mantissa_bits
    small = round_to_neighbour(magnitude / quantum, noise) * quantum
    return torch.where(magnitude < kind.smallest_normal, small, normal).copysign(scaled).to(kind.dtype)


def quantize_blockwise(
    values: Tensor,
    *,
    format: str,
    block_size: int,
    is_symmetric: bool = True,
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    layout, made = prepare(values, format=format, block_size=block_size, is_symmetric=is_symmetric, offset=offset)
    run(
        OP,
        values.device,
        values.data_ptr(),
        TYPES[values.dtype],
        layout.addresses(made),
        numel=layout.numel,
        block_size=block_size,
        format=layout.format.number,
        is_stochastic=seed is not None,
        seed=word_of(seed or 0),
        offset=offset,
    )
    return made


def prepare(
    values: Tensor, *, format: str, block_size: int, is_symmetric: bool, offset: int
) -> tuple[QuantizedLayout, Quantized]:
    """How they will lie, and memory for it; raises LayoutError and ConfigError for what is not served."""
    layout = QuantizedLayout(values.numel(), block_size, format_named(OP, format), is_symmetric)
    layout.require(OP)
    check_place(OP, offset)
    device = device_of(values)
    check(OP, "values", values, device=device)
    return layout, layout.empty(device)


def _fake(
    values: Tensor,
    *,
    format: str,
    block_size: int,
    is_symmetric: bool = True,
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    return QuantizedLayout(values.numel(), block_size, format_named(OP, format), is_symmetric).empty(values.device)


register(
    OP,
    "(Tensor values, *, str format, SymInt block_size, bool is_symmetric=True, int? seed=None, SymInt offset=0)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference,
    cpu=quantize_blockwise,
    cuda=quantize_blockwise,
    triton="quantize_blockwise",
    fake=_fake,
    dtypes=FLOATS,
)
