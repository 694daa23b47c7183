"""The `TensorStore` contract: where a shard rests between uses, and the default that leaves it on its device.

    put(key, tensor) -> rests -> prefetch([keys])? -> fetch(key).wait() -> Tensor, on the device it was put from

A tier (host memory, a file) may copy on `put` and read ahead on `prefetch`. Callers treat what they put as given away,
and what they fetched as theirs until they put it again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from zcore.core.errors import StateError

__all__ = ["DeviceStore", "Fetch", "TensorStore"]


class Fetch(Protocol):
    """A tensor on its way."""

    def wait(self) -> Tensor:
        """The tensor, once it is there. Every call returns the same one."""


class TensorStore(Protocol):
    """Tensors at rest, by key. One thread uses a store; what runs beside it is the store's own affair."""

    def put(self, key: str, tensor: Tensor) -> None:
        """Take `tensor`; it replaces what `key` held. The caller does not touch it again before fetching it."""

    def fetch(self, key: str) -> Fetch:
        """Start to bring `key` back; it stays in the store. Raises StateError if nothing is stored under `key`."""

    def prefetch(self, keys: Iterable[str]) -> None:
        """Say what will be fetched soon, in this order. A hint: a store may do nothing, but it refuses unknown keys."""

    def drop(self, key: str) -> None:
        """Forget `key` and free what it held. Raises StateError if nothing is stored under `key`."""

    def __contains__(self, key: object) -> bool: ...

    def stored_bytes(self) -> int:
        """Bytes at rest in this store."""


@dataclass(frozen=True, slots=True)
class _Present:
    """The `Fetch` of what is here already."""

    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


@dataclass(slots=True)
class DeviceStore:
    """Keeps every tensor where it is and copies nothing: `fetch` returns the very tensor that was put.

    >>> import torch
    >>> store = DeviceStore()
    >>> store.put("layers.0", torch.zeros(4))
    >>> store.fetch("layers.0").wait().shape, store.stored_bytes(), "layers.1" in store
    (torch.Size([4]), 16, False)
    """

    _tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep `tensor` itself under `key`."""
        self._tensors[key] = tensor

    def fetch(self, key: str) -> Fetch:
        """`key`'s tensor, at once."""
        self._require(key)
        return _Present(self._tensors[key])

    def prefetch(self, keys: Iterable[str]) -> None:
        """Nothing to bring; unknown keys are refused, as in every store."""
        for key in keys:
            self._require(key)

    def drop(self, key: str) -> None:
        """Let go of `key`'s tensor."""
        self._require(key)
        del self._tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def stored_bytes(self) -> int:
        """Bytes of all tensors; two views of one memory count twice."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _require(self, key: str) -> None:
        if key not in self._tensors:
            raise StateError(f"Nothing is stored under {key!r}; put it first. Stored: {sorted(self._tensors)[:10]}.")
