"""What compiled functions take: flat pieces of memory as a table of addresses, checked here, by name.

    words    numel | params[0] | grads[0] | exp_avgs[0] | ... | exp_avg_scales[0]     a row for each piece
             numel | params[1] | grads[1] | exp_avgs[1] | ... | exp_avg_scales[1]
    types            0 fp32      1 bf16     3 codes      ...   0                     one for each column after numel

All tensors of a column have one dtype; all of a row have as many elements, but for scales, one for each block of codes.
Addresses are read from the tensors, so whoever holds a table holds the tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.dynamic_code import num_blocks

__all__ = ["FLOATS", "TYPES", "Column", "Table", "scales", "state", "tabulate"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as zcore::Type counts them
SIGNED_CODE, UNSIGNED_CODE = 3, 4
FLOATS = tuple(TYPES)


@dataclass(frozen=True, slots=True)
class Column:
    """One operand of an op, a list with a tensor for each piece; optional ones may be left out, as an empty list."""

    name: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    is_written: bool = False
    is_optional: bool = False
    is_signed: bool = True  # which code uint8 means
    scales_of: str | None = None  # the column of codes that this one scales


class Table(NamedTuple):
    """`words` is numel and the addresses of each row; `types` that of each column."""

    words: list[int]
    types: list[int]


def state(name: str, *, is_signed: bool, is_written: bool = True) -> Column:
    """A state of an optimizer: floats, or codes of one byte whose scales are another column."""
    return Column(name, (*FLOATS, torch.uint8), is_written=is_written, is_signed=is_signed)


def scales(name: str, *, of: str, is_written: bool = True) -> Column:
    """The scales of the state `of`: there where it is of codes, and only there."""
    return Column(name, (torch.float32,), is_written=is_written, is_optional=True, scales_of=of)


def tabulate(op: str, columns: Sequence[Column], operands: Sequence[Sequence[Tensor]]) -> Table:
    """Check and table the operands of `op`, one list for each column.

    Raises LayoutError for tensors that are not flat on the CPU or not of one size, ConfigError for a dtype.
    """
    numels = [tensor.numel() for tensor in operands[0]]
    of_codes = {
        column.name: bool(tensors) and tensors[0].dtype is torch.uint8
        for column, tensors in zip(columns, operands, strict=True)
    }
    types: list[int] = []
    addresses: list[list[int]] = []
    for column, tensors in zip(columns, operands, strict=True):
        expected = numels
        if column.scales_of is not None:
            _check_scales(op, column, len(tensors), of_codes[column.scales_of])
            expected = [num_blocks(numel) for numel in numels]
        if not tensors and column.is_optional:
            types.append(0)
            addresses.append([0] * len(numels))
            continue
        if len(tensors) != len(numels):
            raise LayoutError(
                f"{op} got {len(numels)} {columns[0].name} and {len(tensors)} {column.name}; expected as many."
            )
        types.append(_check(op, column, tensors, expected))
        addresses.append([tensor.data_ptr() for tensor in tensors])
    words = [word for row in zip(numels, *addresses, strict=True) for word in row]
    return Table(words, types)


def _check(op: str, column: Column, tensors: Sequence[Tensor], numels: Sequence[int]) -> int:
    """The type of the column, after refusing what is not all of it."""
    if not tensors:
        return 0
    dtype = tensors[0].dtype
    for index, tensor in enumerate(tensors):
        if tensor.dtype is not dtype or tensor.numel() != numels[index] or not _is_flat(tensor):
            raise _refusal(f"{op}: {column.name}[{index}]", tensor, dtype, numels[index])
    if dtype not in column.dtypes:
        served = ", ".join(map(str, column.dtypes))
        raise ConfigError(f"{op}: {column.name} are {dtype}; expected {served}. Convert them.")
    if dtype is torch.uint8:
        return SIGNED_CODE if column.is_signed else UNSIGNED_CODE
    return TYPES[dtype]


def _check_scales(op: str, column: Column, count: int, has_codes: bool) -> None:
    if has_codes and not count:
        raise LayoutError(f"{op}: {column.scales_of} are codes, and there are no {column.name}. Pass both.")
    if count and not has_codes:
        raise LayoutError(f"{op} got {column.name}, but {column.scales_of} are no codes (uint8). Leave the scales out.")


def _is_flat(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.is_cpu


def _refusal(operand: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> Exception:
    if not tensor.is_cpu:
        return LayoutError(f"{operand} is on {tensor.device}; expected all on the CPU. Move it there.")
    if tensor.dtype is not dtype:
        return ConfigError(f"{operand} is {tensor.dtype}, the first {dtype}; pass each dtype by itself.")
    if tensor.numel() != numel:
        return LayoutError(f"{operand} has {tensor.numel()} elements; expected {numel}, as its piece has.")
    return LayoutError(
        f"{operand}, of shape {tuple(tensor.shape)}, has strides {tensor.stride()}; expected contiguous "
        "memory. Pass `tensor.contiguous()`, and copy back what is written."
    )
