"""A matrix product for each group of rows in Triton; operands as in ops/grouped_matmul.py.

How many rows an expert has stays on the device: each program reads all counts and finds its tiles in their sums.

    counts        70   0   10          of experts 0, 1, 2
    rows          0 ... 69 | 70 ... 79 | 80 ...       those beyond the counts, where these are too few
    tiles of 64   0      1 |    2      |    3

Forward has a program for each place on the device, which takes every so many-th tile. The gradient of weights has one
for each tile of each expert, which goes over the expert's rows in order: no atomics, so that runs are equal to the bit.
Products are summed in fp32 by tensor cores; those of fp32 operands are exact, unless torch's
torch.backends.cuda.matmul allows TF32.

Counts that do not add up cannot be refused without waiting for the device. One below 0 counts as 0, rows beyond `total`
are none, and rows beyond the counts become NaN and give weights no gradient.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.grouped_matmul import check_operands, check_operands_backward, fake, fake_backward
from zcore.kernels.triton.loading import is_interpreted
from zcore.kernels.triton.tiles import num_programs

__all__ = ["grouped_matmul", "grouped_matmul_backward"]

BAND = 8  # tiles of rows that take their turn beside one tile of columns, so that both are read again from the L2 cache


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile of the result, `rows` x `columns`, and how much of what is summed is multiplied at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def keywords(self) -> dict[str, int]:
        """As kernels take it."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "BAND": BAND,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def plan_product(dtype: torch.dtype, rows: float, columns: int) -> Tiling:
    """For experts of so many rows, on average. None of this has been measured on a GPU yet.

    16 bits take 128 x 128 x 64 where there are rows for it: 64 KB of operands in 3 stages leave room in the 99 KB that a
    program may have on sm_86, the least of any since sm_80. Experts of few rows, as in decoding, are bound by reading
    weights: tiles as low as tensor cores allow, 16, waste no products, and a fourth stage keeps more reads on the way.
    fp32 is multiplied without tensor cores, where a tile of 64 x 64 already fills the registers of 4 warps.

    >>> plan_product(torch.bfloat16, 500.0, 4096)
    Tiling(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)
    >>> plan_product(torch.bfloat16, 3.0, 4096)
    Tiling(rows=16, columns=128, depth=64, num_warps=4, num_stages=4)
    """
    wide = torch.finfo(dtype).bits > 16
    most = 64 if wide else 128
    low, narrow = _power_of_two(rows, most), _power_of_two(columns, most)
    if wide:
        return Tiling(low, narrow, 32, 4, 2)
    return Tiling(low, narrow, 64, 8 if low * narrow > 64 * 128 else 4, 3 if low > 64 else 4)


def plan_gradient(dtype: torch.dtype, rows: float, sides: tuple[int, int]) -> Tiling:
    """For weights of `sides`; what is summed are rows, of which an expert has so many on average.

    As `plan_product`, but that it is the depth which is small where rows are few.

    >>> plan_gradient(torch.bfloat16, 500.0, (4096, 64))
    Tiling(rows=128, columns=64, depth=64, num_warps=4, num_stages=3)
    """
    wide = torch.finfo(dtype).bits > 16
    most = 64 if wide else 128
    low, narrow = (_power_of_two(side, most) for side in sides)
    depth = _power_of_two(rows, 32 if wide else 64)
    return Tiling(low, narrow, depth, 8 if low * narrow > 64 * 128 else 4, 2 if wide else 3)


def _power_of_two(number: float, most: int) -> int:
    """The one at or above `number`, from 16, the least that tensor cores multiply, to `most`."""
    return next(side for side in (16, 32, 64, 128) if side >= number or side == most)


@triton.jit
def sums_of(counts: tl.tensor, num_experts: tl.tensor, total: tl.tensor, EXPERTS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of each expert the first row and the one after its last; that after all experts has the rows beyond the counts."""
    expert = tl.arange(0, EXPERTS)
    given = tl.load(counts + expert, mask=expert < num_experts, other=0)
    given = tl.where(expert == num_experts, total, tl.minimum(tl.maximum(given, 0), total))
    ends = tl.cumsum(given, 0)
    return tl.minimum(ends - given, total), tl.minimum(ends, total)


@triton.jit
def place_of(tile: tl.tensor, high: tl.tensor, wide: tl.tensor, BAND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The row and the column of a tile of `high` x `wide`: bands of BAND rows, each from column to column."""
    band = tile // (BAND * wide)
    in_band = tile % (BAND * wide)
    height = tl.minimum(high - band * BAND, BAND)
    return band * BAND + in_band % height, in_band // height


@triton.jit
def product_kernel(
    rows: tl.tensor,
    weights: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    num_experts: tl.tensor,
    into: tl.tensor,
    columns: tl.tensor,
    into_stride: tl.tensor,
    column_stride: tl.tensor,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_WIDENED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Every so many-th tile of out; element [i, j] of a weight lies at i into_stride + j column_stride."""
    begins, ends = sums_of(counts, num_experts, total, EXPERTS)
    tile_ends = tl.cumsum(tl.cdiv(ends - begins, ROWS), 0)
    high = tl.max(tile_ends, 0).to(tl.int32)
    wide = tl.cdiv(columns, COLUMNS)
    expert_at = tl.arange(0, EXPERTS)
    depth_at = tl.arange(0, DEPTH)
    for tile in range(tl.program_id(0), high * wide, tl.num_programs(0)):
        tile_row, tile_column = place_of(tile, high, wide, BAND)
        is_before = tile_ends <= tile_row
        expert = tl.sum(is_before.to(tl.int32), 0)
        first = tl.max(tl.where(is_before, tile_ends, 0), 0)
        begin = tl.sum(tl.where(expert_at == expert, begins, 0), 0)
        end = tl.sum(tl.where(expert_at == expert, ends, 0), 0)
        row = begin + (tile_row - first) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
        left_at = rows + row * into + depth_at[None, :]
        weight = weights + expert.to(tl.int64) * into * columns
        right_at = weight + depth_at[:, None].to(tl.int64) * into_stride + column * column_stride
        depth = tl.where(expert < num_experts, into, 0)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, DEPTH):
            left = tl.load(left_at, mask=(row < end) & (depth_at[None, :] < into - start), other=0.0)
            right = tl.load(right_at, mask=(depth_at[:, None] < into - start) & (column < columns), other=0.0)
            if IS_WIDENED:
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product, input_precision=PRECISION)
            left_at += DEPTH
            right_at += DEPTH * into_stride
        found = tl.where(expert < num_experts, product, float("nan")).to(out.dtype.element_ty)
        tl.store(out + row * columns + column, found, mask=(row < end) & (column < columns))


@triton.jit
def gradient_kernel(
    first: tl.tensor,
    second: tl.tensor,
    counts: tl.tensor,
    dweights: tl.tensor,
    total: tl.tensor,
    num_experts: tl.tensor,
    high_side: tl.tensor,
    wide_side: tl.tensor,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_WIDENED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """One tile of one expert's first^T second, for `first` [total, high_side] and `second` [total, wide_side]."""
    high, wide = tl.cdiv(high_side, ROWS), tl.cdiv(wide_side, COLUMNS)
    expert = tl.program_id(0) // (high * wide)
    tile_row, tile_column = place_of(tl.program_id(0) % (high * wide), high, wide, BAND)
    begins, ends = sums_of(counts, num_experts, total, EXPERTS)
    begin = tl.sum(tl.where(tl.arange(0, EXPERTS) == expert, begins, 0), 0)
    end = tl.sum(tl.where(tl.arange(0, EXPERTS) == expert, ends, 0), 0)
    row = tile_row * ROWS + tl.arange(0, ROWS)[:, None]
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row_of_both = begin + tl.arange(0, DEPTH)
    left_at = first + row_of_both[None, :] * high_side + row
    right_at = second + row_of_both[:, None] * wide_side + column
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, DEPTH):
        is_mine = tl.arange(0, DEPTH) < end - start
        left = tl.load(left_at, mask=is_mine[None, :] & (row < high_side), other=0.0)
        right = tl.load(right_at, mask=is_mine[:, None] & (column < wide_side), other=0.0)
        if IS_WIDENED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=PRECISION)
        left_at += DEPTH * high_side
        right_at += DEPTH * wide_side
    at = (expert.to(tl.int64) * high_side + row) * wide_side + column
    tl.store(dweights + at, product.to(dweights.dtype.element_ty), mask=(row < high_side) & (column < wide_side))


def _settings(num_experts: int) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        # The property allow_tf32 raises an error where a program has set this one.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "IS_WIDENED": is_interpreted(),  # the interpreter of triton 3.7 multiplies the bits of bf16 as integers
    }


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> Tensor:
    """Each group of rows times its weight; raises LayoutError and ConfigError for operands that are not served."""
    check_operands(rows, weights, counts, is_transposed, device=rows.device)
    out = fake(rows, weights, counts, is_transposed)
    (total, into), columns, num_experts = rows.shape, out.shape[1], weights.shape[0]
    if out.numel():
        tiling = plan_product(rows.dtype, total / max(num_experts, 1), columns)
        tiles = (triton.cdiv(total, tiling.rows) + num_experts) * triton.cdiv(columns, tiling.columns)  # at most
        programs = num_programs(rows.device, on_each=8 // tiling.num_warps)
        product_kernel[(min(tiles, programs),)](
            rows,
            weights,
            counts,
            out,
            total,
            num_experts,
            into,
            columns,
            *((1, into) if is_transposed else (columns, 1)),
            **_settings(num_experts),
            **tiling.keywords,
        )
    return out


def grouped_matmul_backward(rows: Tensor, dout: Tensor, counts: Tensor, is_transposed: bool) -> Tensor:
    """The gradient of the weights."""
    check_operands_backward(rows, dout, counts, device=rows.device)
    dweights = fake_backward(rows, dout, counts, is_transposed)
    num_experts, *sides = dweights.shape
    if dweights.numel():
        tiling = plan_gradient(rows.dtype, rows.shape[0] / num_experts, (sides[0], sides[1]))
        tiles = triton.cdiv(sides[0], tiling.rows) * triton.cdiv(sides[1], tiling.columns)
        gradient_kernel[(num_experts * tiles,)](
            *((dout, rows) if is_transposed else (rows, dout)),
            counts,
            dweights,
            rows.shape[0],
            num_experts,
            *sides,
            **_settings(num_experts),
            **tiling.keywords,
        )
    return dweights
