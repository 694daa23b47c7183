"""What compiled functions take: flat pieces of memory as a table of addresses, checked here, by name.

A table has a row for each piece and a column for each operand, such as the parameter, its gradient and its states. All
tensors of a column have one dtype; all of a row have as many elements. Addresses are read from the tensors, so whoever
holds a table holds the tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError

__all__ = ["FLOATS", "Column", "Table", "tabulate"]

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as zcore::Type counts them


class Column(NamedTuple):
    """The tensors of one operand; none where `is_optional` and it is left out."""

    tensors: Sequence[Tensor]
    dtypes: tuple[torch.dtype, ...] = tuple(FLOATS)
    is_optional: bool = False


class Table(NamedTuple):
    """`words` is numel and the addresses of each row; `types` that of each column."""

    words: list[int]
    types: list[int]


def tabulate(op: str, columns: Mapping[str, Column]) -> Table:
    """Check and table the operands of `op`.

    Raises LayoutError for tensors that are not flat on the CPU or not of one size, ConfigError for a dtype.
    """
    first = next(iter(columns.values())).tensors
    types: list[int] = []
    addresses: list[list[int]] = []
    numels = [tensor.numel() for tensor in first]
    for name, column in columns.items():
        if not column.tensors and column.is_optional:
            types.append(0)
            addresses.append([0] * len(first))
            continue
        dtype = column.tensors[0].dtype if column.tensors else torch.float32
        if len(column.tensors) != len(first):
            raise LayoutError(f"{op} got {len(first)} {next(iter(columns))} and {len(column.tensors)} {name}.")
        for index, tensor in enumerate(column.tensors):
            if tensor.dtype is not dtype or tensor.numel() != numels[index] or not _is_flat(tensor):
                raise _refusal(op, name, index, tensor, dtype, numels[index])
        if dtype not in column.dtypes:
            served = ", ".join(map(str, column.dtypes))
            raise ConfigError(f"{op}: {name} are {dtype}; expected {served}.")
        types.append(FLOATS[dtype])
        addresses.append([tensor.data_ptr() for tensor in column.tensors])
    words = [word for row in zip(numels, *addresses, strict=True) for word in row]
    return Table(words, types)


def _is_flat(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.is_cpu


def _refusal(op: str, name: str, index: int, tensor: Tensor, dtype: torch.dtype, numel: int) -> Exception:
    if not tensor.is_cpu:
        return LayoutError(f"{op}: {name}[{index}] is on {tensor.device}; expected all on the CPU. Move it there.")
    if tensor.dtype is not dtype:
        return ConfigError(f"{op}: {name}[{index}] is {tensor.dtype}, and {name}[0] {dtype}; pass each dtype by itself.")
    if tensor.numel() != numel:
        return LayoutError(f"{op}: {name}[{index}] has {tensor.numel()} elements; expected {numel} as the first operand.")
    return LayoutError(
        f"{op}: {name}[{index}], of shape {tuple(tensor.shape)}, has strides {tensor.stride()}; expected contiguous "
        "memory. Pass `tensor.contiguous()`, and copy back what is written."
    )
