"""What compiled functions over flat pieces take: a list of tensors for each column, read into a table of addresses.

All lie on the device of the first, the CPU or one for CUDA. The native side reads and checks them (bindings/table.hpp);
where it makes no table, this finds out what it refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import num_blocks
from zcore.kernels.ops.memory import all_have_memory, require_memory

__all__ = ["FLOATS", "TYPES", "Column", "Columns", "cuda_index", "scales", "state"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as zcore::Type counts them
SIGNED_CODE, UNSIGNED_CODE = 3, 4
CPU = torch.device("cpu")
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


def state(name: str, *, is_signed: bool, is_written: bool = True) -> Column:
    """A state of an optimizer: floats, or codes of one byte whose scales are another column."""
    return Column(name, (*FLOATS, torch.uint8), is_written=is_written, is_signed=is_signed)


def scales(name: str, *, of: str, is_written: bool = True) -> Column:
    """The scales of the state `of`: there where it is of codes, and only there."""
    return Column(name, (torch.float32,), is_written=is_written, is_optional=True, scales_of=of)


class Columns:
    """Of one op, and the tables of what it is called with."""

    def __init__(self, op: str, columns: Sequence[Column]) -> None:
        self._op, self._columns = op, columns
        names = [column.name for column in columns]
        self._layout = _cpu.Layout(
            [
                (
                    [(dtype, _type(column, dtype)) for dtype in column.dtypes],
                    column.is_optional,
                    -1 if column.scales_of is None else names.index(column.scales_of),
                )
                for column in columns
            ]
        )

    def table(self, operands: Sequence[Sequence[Tensor]]) -> _cpu.Table:
        """The table of `operands`, one list for each column; whoever holds it holds them.

        Raises LayoutError for what is no list of tensors, and for tensors that are not flat on one device, not of one
        size or without memory (see memory.py), ConfigError for a dtype.
        """
        try:
            table = self._layout.read(operands, cuda_index(operands[0]))
            if table is None or not all_have_memory(operands):
                self._refuse(operands)
        except (AttributeError, TypeError, RuntimeError):  # of what is no tensor, or of one without storage
            self._refuse(operands)
            raise
        assert table is not None
        return table

    def _refuse(self, operands: Sequence[Sequence[Tensor]]) -> None:
        _check_lists(self._op, self._columns, operands)
        numels = [tensor.numel() for tensor in operands[0]]
        device = operands[0][0].device if cuda_index(operands[0]) is not None else CPU
        of_codes = {
            column.name: bool(tensors) and tensors[0].dtype is torch.uint8
            for column, tensors in zip(self._columns, operands, strict=True)
        }
        for column, tensors in zip(self._columns, operands, strict=True):
            expected = numels
            if column.scales_of is not None:
                _check_scales(self._op, column, len(tensors), of_codes[column.scales_of])
                expected = [num_blocks(numel) for numel in numels]
            if not tensors and column.is_optional:
                continue
            if len(tensors) != len(numels):
                raise LayoutError(
                    f"{self._op} got {len(numels)} {self._columns[0].name} and {len(tensors)} {column.name}; expected "
                    "as many."
                )
            _check(self._op, column, tensors, expected, device)


def cuda_index(tensors: Sequence[Tensor]) -> int | None:
    """The index of the device that the first of `tensors` lies on; None where that is not one for CUDA."""
    return tensors[0].get_device() if tensors and tensors[0].is_cuda else None


def _type(column: Column, dtype: torch.dtype) -> int:
    if dtype is torch.uint8:
        return SIGNED_CODE if column.is_signed else UNSIGNED_CODE
    return TYPES[dtype]


def _check_lists(op: str, columns: Sequence[Column], operands: Sequence[object]) -> None:
    if len(operands) != len(columns):
        names = ", ".join(column.name for column in columns)
        raise LayoutError(f"{op} got {len(operands)} lists of tensors; expected {len(columns)}: {names}.")
    for column, tensors in zip(columns, operands, strict=True):
        if not isinstance(tensors, list | tuple):
            raise LayoutError(
                f"{op}: {column.name} is a {type(tensors).__name__}; expected a list with a tensor for each piece."
            )
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise LayoutError(f"{op}: {column.name}[{index}] is a {type(tensor).__name__}; expected a tensor.")


def _check(op: str, column: Column, tensors: Sequence[Tensor], numels: Sequence[int], device: torch.device) -> None:
    dtype = tensors[0].dtype if tensors else column.dtypes[0]
    for index, tensor in enumerate(tensors):
        is_flat = tensor.is_contiguous() and tensor.device == device
        if tensor.dtype is not dtype or tensor.numel() != numels[index] or not is_flat:
            raise _refusal(f"{op}: {column.name}[{index}]", tensor, dtype, numels[index], device)
        require_memory(f"{op}: {column.name}[{index}]", tensor)
    if dtype not in column.dtypes:
        served = ", ".join(map(str, column.dtypes))
        raise ConfigError(f"{op}: {column.name} are {dtype}; expected {served}. Convert them.")


def _check_scales(op: str, column: Column, count: int, has_codes: bool) -> None:
    if has_codes and not count:
        raise LayoutError(f"{op}: {column.scales_of} are codes, and there are no {column.name}. Pass both.")
    if count and not has_codes:
        raise LayoutError(f"{op} got {column.name}, but {column.scales_of} are no codes (uint8). Leave the scales out.")


def _refusal(operand: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> Exception:
    if tensor.device != device:
        expected = "the CPU" if device == CPU else str(device)
        return LayoutError(f"{operand} is on {tensor.device}; expected all on {expected}. Move it there.")
    if tensor.dtype is not dtype:
        return ConfigError(f"{operand} is {tensor.dtype}, the first {dtype}; pass each dtype by itself.")
    if tensor.numel() != numel:
        return LayoutError(f"{operand} has {tensor.numel()} elements; expected {numel}, as its piece has.")
    return LayoutError(
        f"{operand}, of shape {tuple(tensor.shape)}, has strides {tensor.stride()}; expected contiguous "
        "memory. Pass `tensor.contiguous()`, and copy back what is written."
    )
