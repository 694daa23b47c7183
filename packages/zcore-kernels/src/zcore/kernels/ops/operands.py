"""What functions of layers and blocks take: contiguous tensors, checked here by name, handed on by address.

Addresses are read from the tensors, so whoever holds one holds its tensor.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.memory import is_plain, require_memory
from zcore.kernels.ops.pieces import FLOATS, TYPES

__all__ = [
    "CPU",
    "Operand",
    "check",
    "check_floating",
    "check_indices",
    "check_place",
    "device_of",
    "first_tensor",
    "operand",
    "rows_of",
]

CPU = torch.device("cpu")
Operand = tuple[int, int]  # address and zcore::Type


def first_tensor(operands: Iterable[object]) -> Tensor | None:
    """The first tensor among operands, in their lists and tuples, too; None where there is none."""
    for each in operands:
        found = first_tensor(each) if isinstance(each, list | tuple) else each
        if isinstance(found, Tensor):
            return found
    return None


def device_of(tensor: Tensor) -> torch.device:
    """Where an op of compiled code runs that has `tensor` for an operand: its CUDA device, else the CPU."""
    return tensor.device if tensor.is_cuda else CPU


def rows_of(op: str, name: str, tensor: Tensor, *, device: torch.device = CPU) -> tuple[int, int]:
    """How many rows and how many elements in each `tensor`, [..., hidden], has; checks it as `check` does."""
    if tensor.ndim == 0:
        raise LayoutError(f"{op}: {name} has no dimension; expected [..., hidden].")
    check(op, name, tensor, device=device)
    hidden = tensor.shape[-1]
    return (tensor.numel() // hidden if hidden else 0), hidden


def check(
    op: str,
    name: str,
    tensor: Tensor,
    *,
    shape: Sequence[int] | None = None,
    numel: int | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device = CPU,
) -> None:
    """Raise unless `tensor` is contiguous memory of `device`, of one of `dtypes`, and where given of `shape`, `numel`.

    LayoutError says where and how it lies, ConfigError of which dtype it is.
    """
    if not isinstance(tensor, Tensor):
        raise LayoutError(f"{op}: {name} is a {type(tensor).__name__}; expected a tensor.")
    if not (tensor.is_cpu if device is CPU else tensor.device == device):
        expected = "the CPU" if device == CPU else str(device)
        raise LayoutError(f"{op}: {name} is on {tensor.device}; expected {expected}. Move it there.")
    if tensor.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        raise ConfigError(f"{op}: {name} is {tensor.dtype}; expected {expected}. Convert it, or use the reference.")
    if shape is not None and tensor.shape != tuple(shape):
        raise LayoutError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{op}: {name}, of shape {tuple(tensor.shape)}, has strides {tensor.stride()}; expected contiguous memory. "
            "Pass `tensor.contiguous()`, and copy back what is written."
        )
    if numel is not None and tensor.numel() != numel:
        raise LayoutError(f"{op}: {name} has {tensor.numel()} elements; expected {numel}.")
    if device is CPU or is_plain(tensor):  # Triton's launchers are traced with FakeTensors, and take no address
        require_memory(f"{op}: {name}", tensor)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise ConfigError unless `tensor` is of a floating-point dtype; for references, which take any of them."""
    if not tensor.is_floating_point():
        raise ConfigError(f"{op}: {name} is {tensor.dtype}; expected a floating-point dtype. Convert it.")


def check_indices(op: str, name: str, indices: Tensor, count: int, what: str) -> None:
    """Raise LayoutError unless each of `indices` is one of `count`, which `what` says the name of."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        raise LayoutError(
            f"{op}: {name} are from {int(indices.min())} to {int(indices.max())}; expected 0 to {count - 1}, as {what} "
            "says."
        )


def check_place(op: str, offset: int) -> None:
    """Raise ConfigError unless `offset` is the place of an element in something larger."""
    if offset < 0:
        raise ConfigError(f"{op}: offset is {offset}; expected the place of the first element, 0 or more.")


def operand(tensor: Tensor | None) -> Operand:
    """The address of a checked tensor and its type; (0, 0) for none, or for one without elements."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), TYPES[tensor.dtype])
