"""One operand of an op, checked by name before its address is handed on."""

from collections.abc import Iterable

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError

__all__ = ["require_flat", "require_place"]


def require_flat(
    op: str, name: str, tensor: Tensor, *, dtypes: Iterable[torch.dtype], numel: int | None = None
) -> None:
    """Raise unless `tensor` is contiguous memory on the CPU, of one of `dtypes` and, where given, of `numel` elements.

    LayoutError says where it lies or how long it is, ConfigError of which dtype it is.
    """
    if not tensor.is_cpu:
        raise LayoutError(f"{op}: {name} is on {tensor.device}; expected the CPU. Move it there.")
    if tensor.dtype not in (served := tuple(dtypes)):
        raise ConfigError(f"{op}: {name} is {tensor.dtype}; expected {', '.join(map(str, served))}.")
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{op}: {name}, of shape {tuple(tensor.shape)}, has strides {tensor.stride()}; expected contiguous memory. "
            "Pass `tensor.contiguous()`, and copy back what is written."
        )
    if numel is not None and tensor.numel() != numel:
        raise LayoutError(f"{op}: {name} has {tensor.numel()} elements; expected {numel}.")


def require_place(op: str, offset: int) -> None:
    """Raise ConfigError unless `offset` is the place of an element in something larger."""
    if offset < 0:
        raise ConfigError(f"{op}: offset is {offset}; expected the place of the first element, 0 or more.")
