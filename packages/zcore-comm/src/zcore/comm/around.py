"""A group around another one, which sees its collectives and passes on all the rest."""

import torch
from torch import Tensor

from zcore.core.collectives import Collectives, Traffic

__all__ = ["Around"]


class Around:
    """What every such group has of `inner`'s; its kinds add the calls."""

    def __init__(self, inner: Collectives) -> None:
        self.inner = inner

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.inner.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self.inner.size

    @property
    def traffic(self) -> Traffic:
        """What went through `inner` so far: calls that were started, those that were copied together as one."""
        return self.inner.traffic

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.empty`."""
        return self.inner.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """See `Collectives.free_storage`."""
        self.inner.free_storage(buffer)

    def alloc_storage(self, buffer: Tensor) -> None:
        """See `Collectives.alloc_storage`."""
        self.inner.alloc_storage(buffer)

    def own_storage(self, buffer: Tensor) -> None:
        """See `Collectives.own_storage`."""
        self.inner.own_storage(buffer)
