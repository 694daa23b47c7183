"""Quantised blocks in Triton: the scale of a block, codes of its elements and what these stand for.

Formulas stand in native/include/zcore/quantize_blockwise.hpp. The arithmetic is that of native/elements/codes.hpp, step
by step, so that codes have the same bits as on the CPU: extremes are compared as integers, divisions round to the
nearest, and kernels are launched without fusing products and sums (EXACT). A block is a row of a tile [ROWS, COLUMNS].
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "EXACT",
    "BlockTile",
    "decoded",
    "encoded",
    "load_values",
    "measured",
    "noise_at",
    "places",
    "plan_blocks",
    "raw_values",
    "store_codes",
    "store_values",
]

EXACT = {"enable_fp_fusion": False}
TILE = 4096  # elements; 16 a thread, as native/cuda has them. Not measured on a GPU
PER_THREAD, WARP = 16, 32

INT8, INT4, E4M3, E5M2 = (tl.constexpr(number) for number in range(4))  # as zcore::Format counts them
INFINITY_BITS = tl.constexpr(0x7F800000)
ORDERED_MINUS_INFINITY = tl.constexpr(-0x7F800001)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added to |x| < 2^22 it leaves x, rounded to the nearest, in the lowest bits
TO_INTEGER_BITS = tl.constexpr(0x4B400000)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
NAN = tl.constexpr(float("nan"))


@dataclass(frozen=True, slots=True)
class BlockTile:
    """Both sides are powers of two, as Triton wants them."""

    rows: int
    columns: int

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel of such tiles is launched with."""
        num_warps = min(max(self.rows * self.columns // (WARP * PER_THREAD), 1), 32)
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": num_warps, **EXACT}


def plan_blocks(block_size: int) -> BlockTile:
    """A tile of blocks as they are, several where they are small.

    >>> plan_blocks(256), plan_blocks(10000)
    (BlockTile(rows=16, columns=256), BlockTile(rows=1, columns=16384))
    """
    columns = max(2, 1 << (block_size - 1).bit_length())
    return BlockTile(max(1, TILE // columns), columns)


def raw_values(values: Tensor) -> Tensor:
    """What kernels take for floats: of bf16 its bits, int16, which the interpreter rounds and reads otherwise."""
    return values.view(torch.int16) if values.dtype is torch.bfloat16 else values


@triton.jit
def places(numel: tl.tensor, block_size: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> Any:
    """Of this program's tile the blocks [ROWS, 1], the elements [ROWS, COLUMNS], and which of these there are."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    element = block * block_size + column
    return block, element, (column < block_size) & (element < numel)


@triton.jit
def load_values(values: tl.tensor, element: tl.tensor, is_inside: tl.tensor) -> Any:
    """fp32, of what `raw_values` made; zeros where nothing is."""
    if values.dtype.element_ty == tl.int16:
        bits = tl.load(values + element, mask=is_inside, other=0).to(tl.int32)
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(values + element, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def store_values(out: tl.tensor, element: tl.tensor, found: tl.tensor, is_inside: tl.tensor) -> None:
    """To what `raw_values` made of memory for them."""
    if out.dtype.element_ty == tl.int16:
        bits = found.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        tl.store(out + element, tl.where(is_nan, (bits >> 16) | 0x40, rounded).to(tl.int16), mask=is_inside)
    else:
        tl.store(out + element, found.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def mixed(value: tl.tensor) -> Any:
    """The finaliser of splitmix64, uint64."""
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def noise_at(seed: tl.tensor, index: tl.tensor, first: tl.tensor) -> Any:
    """Noise of elements by their place, int32 in [0, 2^16), as native/elements/noise.hpp has it.

    seed: mixed once. first: a place less than 2^32 before all; so at most two keys are needed.
    """
    upper = (first >> 33).to(tl.uint64)
    key, next_key = mixed(seed.to(tl.uint64) ^ upper), mixed(seed.to(tl.uint64) ^ (upper + 1))
    is_first = (index >> 33).to(tl.uint64) == upper
    x = (index >> 1).to(tl.uint32) ^ tl.where(is_first, key.to(tl.uint32), next_key.to(tl.uint32))
    x = (x ^ (x >> 16)) * 0x7FEB352D
    added = tl.where(is_first, (key >> 32).to(tl.uint32), (next_key >> 32).to(tl.uint32))
    x = ((x ^ (x >> 15)) + added) * 0x846CA68B
    word = x ^ (x >> 16)
    return tl.where((index & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def near(value: tl.tensor, noise: tl.tensor, IS_STOCHASTIC: tl.constexpr) -> Any:
    """An integer near |value| < 2^14: the nearest, ties to even, or one of its neighbours."""
    if IS_STOCHASTIC:
        return ((value * 65536.0).to(tl.int32) + noise) >> 16
    else:
        return (value + TO_INTEGER).to(tl.int32, bitcast=True) - TO_INTEGER_BITS


@triton.jit
def ordered(bits: tl.tensor) -> Any:
    """Turns the bits of a float into an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & MAGNITUDE)


@triton.jit
def measured(values: tl.tensor, LARGEST: tl.constexpr, IS_SYMMETRIC: tl.constexpr) -> Any:
    """Scales, NaN where a block is not finite, their inverses and zero points of rows, [ROWS, 1]. LARGEST: of codes."""
    bits = values.to(tl.int32, bitcast=True)
    if IS_SYMMETRIC:
        high_bits = tl.max(bits & MAGNITUDE, 1, keep_dims=True)
        is_finite = high_bits < INFINITY_BITS
        high = high_bits.to(tl.float32, bitcast=True)
        scale = tl.div_rn(high, tl.full(high.shape, LARGEST, tl.float32))
        scale = tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        zero_point = tl.zeros(high.shape, tl.int32)
    else:
        in_order = ordered(bits)
        low_bits = tl.minimum(tl.min(in_order, 1, keep_dims=True), 0)
        high_bits = tl.maximum(tl.max(in_order, 1, keep_dims=True), 0)
        is_finite = (low_bits > ORDERED_MINUS_INFINITY) & (high_bits < INFINITY_BITS)
        low = ordered(low_bits).to(tl.float32, bitcast=True)
        high = ordered(high_bits).to(tl.float32, bitcast=True)
        levels = tl.full(high.shape, 2.0 * LARGEST + 1.0, tl.float32)
        scale = tl.div_rn(high, levels) - tl.div_rn(low, levels)
        scale = tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        place = -LARGEST - 1.0 - low * inverse
        place = tl.where(place > LARGEST, LARGEST, place)
        zero_point = tl.where(is_finite, near(place, 0, False), 0)
    return tl.where(is_finite, scale, NAN), tl.where(is_finite, inverse, NAN), zero_point


@triton.jit
def float_code(
    value: tl.tensor,
    noise: tl.tensor,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
) -> Any:
    """fp8 of values over their scale."""
    dropped: tl.constexpr = 23 - MANTISSA
    smallest_normal: tl.constexpr = 2.0 ** (1 - BIAS)
    all_bits = value.to(tl.int32, bitcast=True)
    magnitude = (all_bits & MAGNITUDE).to(tl.float32, bitcast=True)
    magnitude = tl.where(magnitude > LARGEST, LARGEST, magnitude)
    bits = magnitude.to(tl.int32, bitcast=True)
    half_or_less = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)  # so that ties go to even
    added = (2 * noise + 1) << (dropped - 17) if IS_STOCHASTIC else half_or_less
    normal = (bits + added - ((127 - BIAS) << 23)) >> dropped
    is_small = magnitude < smallest_normal
    small = near(tl.where(is_small, magnitude * (2.0 ** (MANTISSA + BIAS - 1)), 0.0), noise, IS_STOCHASTIC)
    return ((all_bits >> 24) & 0x80) | tl.where(is_small, small, normal)


@triton.jit
def encoded(
    values: tl.tensor,
    noise: tl.tensor,
    inverse: tl.tensor,
    zero_point: tl.tensor,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_SYMMETRIC: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
) -> Any:
    """Codes of rows, int32; zeros where the inverse of the scale is NaN."""
    scaled = values * inverse
    if FORMAT == E4M3:
        codes = float_code(scaled, noise, 3, 7, LARGEST, IS_STOCHASTIC)
    elif FORMAT == E5M2:
        codes = float_code(scaled, noise, 2, 15, LARGEST, IS_STOCHASTIC)
    else:
        zero = zero_point.to(tl.float32)
        lowest = (-LARGEST if IS_SYMMETRIC else -LARGEST - 1.0) - zero
        scaled = tl.where(scaled < lowest, lowest, scaled)
        scaled = tl.where(scaled > LARGEST - zero, LARGEST - zero, scaled)
        codes = near(scaled, noise, IS_STOCHASTIC) + zero_point
    return tl.where(inverse > 0.0, codes, 0)  # NaN is not


@triton.jit
def store_codes(
    out: tl.tensor,
    element: tl.tensor,
    codes: tl.tensor,
    is_inside: tl.tensor,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """To bytes; int4 two to a byte, the even element in the low half."""
    if FORMAT == INT4:
        halves = tl.where(is_inside, codes & 15, 0).reshape(ROWS, COLUMNS // 2, 2)
        low, high = tl.split(halves)
        at, _ = tl.split((element // 2).reshape(ROWS, COLUMNS // 2, 2))
        is_there, _ = tl.split(is_inside.to(tl.int32).reshape(ROWS, COLUMNS // 2, 2))
        tl.store(out + at, (low | high << 4).to(tl.uint8), mask=is_there != 0)
    else:
        tl.store(out + element, codes.to(tl.uint8), mask=is_inside)


@triton.jit
def float_value(code: tl.tensor, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SPECIAL: tl.constexpr) -> Any:
    """What codes of fp8 stand for; from SPECIAL on they are not finite."""
    dropped: tl.constexpr = 23 - MANTISSA
    magnitude = code & 0x7F
    small = (magnitude.to(tl.float32) * (2.0 ** (2 - BIAS - 1 - MANTISSA))).to(tl.int32, bitcast=True)
    bits = tl.where(magnitude < (1 << MANTISSA), small, (magnitude << dropped) + ((127 - BIAS) << 23))
    bits = tl.where(magnitude >= SPECIAL, bits | INFINITY_BITS, bits)
    return (bits | (code & 0x80) << 24).to(tl.float32, bitcast=True)


@triton.jit
def decoded(
    codes: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    block: tl.tensor,
    element: tl.tensor,
    is_inside: tl.tensor,
    FORMAT: tl.constexpr,
) -> Any:
    """What the codes of a tile stand for, fp32. `zero_points` may be None."""
    at = element // 2 if FORMAT == INT4 else element
    code = tl.load(codes + at, mask=is_inside, other=0).to(tl.int32)
    if FORMAT == INT4:
        half = tl.where((element & 1) == 0, code, code >> 4) & 15
        value = ((half ^ 8) - 8).to(tl.float32)
    elif FORMAT == E4M3:
        value = float_value(code, 3, 7, 0x7F)
    elif FORMAT == E5M2:
        value = float_value(code, 2, 15, 0x7C)
    else:
        value = ((code ^ 0x80) - 0x80).to(tl.float32)
    is_first = tl.max(is_inside.to(tl.int32), 1, keep_dims=True) != 0
    if zero_points is not None:
        value -= tl.load(zero_points + block, mask=is_first, other=0).to(tl.float32)
    return value * tl.load(scales + block, mask=is_first, other=0.0)
