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

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.grouped_matmul import check_operands, check_operands_backward, fake, fake_backward
from zcore.kernels.triton.loading import is_interpreted
from zcore.kernels.triton.product_tiles import plan_gradient, plan_product
from zcore.kernels.triton.tiles import num_programs

__all__ = ["grouped_matmul", "grouped_matmul_backward"]


@triton.jit
def sums_of(
    counts: tl.tensor, num_experts: tl.tensor, total: tl.tensor, EXPERTS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of each expert the first row and the one after its last; one expert more has the rows beyond the counts."""
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


def _multiplies_by_tensor_cores(dtype: torch.dtype) -> bool:
    # The property allow_tf32 raises an error where a program has set this one.
    return dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"


def _settings(num_experts: int, *, by_tensor_cores: bool) -> dict[str, object]:
    """What both kernels are compiled for, beside tiles."""
    return {
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        "PRECISION": "tf32" if by_tensor_cores else "ieee",  # of fp32 operands
        "IS_WIDENED": is_interpreted(),  # the interpreter of triton 3.7 multiplies the bits of bf16 as integers
    }


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> Tensor:
    """Each group of rows times its weight; raises LayoutError and ConfigError for operands that are not served."""
    check_operands(rows, weights, counts, is_transposed, device=rows.device)
    out = fake(rows, weights, counts, is_transposed)
    (total, into), columns, num_experts = rows.shape, out.shape[1], weights.shape[0]
    if out.numel():
        by_tensor_cores = _multiplies_by_tensor_cores(rows.dtype)
        of_expert = total / max(num_experts, 1)
        tiling = plan_product(rows.element_size(), of_expert, columns, by_tensor_cores=by_tensor_cores)
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
            **_settings(num_experts, by_tensor_cores=by_tensor_cores),
            **tiling.keywords,
        )
    return out


def grouped_matmul_backward(rows: Tensor, dout: Tensor, counts: Tensor, is_transposed: bool) -> Tensor:
    """The gradient of the weights."""
    check_operands_backward(rows, dout, counts, device=rows.device)
    dweights = fake_backward(rows, dout, counts, is_transposed)
    num_experts, *sides = dweights.shape
    if dweights.numel():
        by_tensor_cores = _multiplies_by_tensor_cores(rows.dtype)
        of_expert = rows.shape[0] / num_experts
        tiling = plan_gradient(rows.element_size(), of_expert, (sides[0], sides[1]), by_tensor_cores=by_tensor_cores)
        tiles = triton.cdiv(sides[0], tiling.rows) * triton.cdiv(sides[1], tiling.columns)
        gradient_kernel[(num_experts * tiles,)](
            *((dout, rows) if is_transposed else (rows, dout)),
            counts,
            dweights,
            rows.shape[0],
            num_experts,
            *sides,
            **_settings(num_experts, by_tensor_cores=by_tensor_cores),
            **tiling.keywords,
        )
    return dweights
