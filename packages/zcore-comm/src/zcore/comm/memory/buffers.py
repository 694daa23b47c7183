"""Where a group's buffers lie: in this rank's own pages, or in one memory that all ranks of the host hold together.

empty, alloc_storage      own pages; other ranks can read them
take_together             pages of the rank that leads: a gathered result that every rank maps, until all freed it
own_storage               a copy in own pages of what is held together
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from zcore.comm.memory.board import NUM_SLOTS, Board
from zcore.comm.memory.pages import OutOfPagesError, Region, own_pages
from zcore.core import compat
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["Buffers", "num_bytes_of"]


class Buffers:
    """The buffers of one group; `plain` makes them where torch cannot swap memory, `boards` are of all its ranks."""

    def __init__(self, plain: TorchCollectives, boards: Sequence[Board], *, name: str) -> None:
        self.can_hold_together = compat.CAN_SWAP_MEMORY  # else buffers are plain, and copied to be shown
        self._plain = plain
        self._boards = boards
        self._name = name
        self._pages = own_pages()
        self._slots: dict[int, int] = {}  # of memory that ranks hold together: by slot, with the count of the call

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer in pages that the other ranks can read."""
        if not self.can_hold_together:
            return self._plain.empty(numel, dtype=dtype, device=device)
        return _flat(self._pages.storage(max(1, numel * dtype.itemsize)), numel, dtype)

    def free_storage(self, buffer: Tensor) -> None:
        """Give the pages back; every view of the buffer goes on existing, without memory."""
        if self.can_hold_together:
            compat.swap_memory(buffer.untyped_storage(), torch.UntypedStorage(0))
        else:
            self._plain.free_storage(buffer)

    def alloc_storage(self, buffer: Tensor) -> None:
        """Find pages for the buffer again."""
        storage = buffer.untyped_storage()
        if not self.can_hold_together:
            self._plain.alloc_storage(buffer)
        elif not storage.nbytes():
            compat.swap_memory(storage, self._pages.storage(max(1, num_bytes_of(buffer))))

    def own_storage(self, buffer: Tensor) -> None:
        """Copy what ranks hold together."""
        if self.can_hold_together and buffer.untyped_storage().nbytes() and self._pages.find(buffer) is None:
            own = self._pages.storage(num_bytes_of(buffer))
            _flat(own, buffer.numel(), buffer.dtype).copy_(buffer)
            compat.swap_memory(buffer.untyped_storage(), own)

    def take_together(self, index: int, num_bytes: int) -> tuple[Region, int]:
        """Memory for a result of call `index` that every rank will hold, and its slot on the boards."""
        self._slots = {slot: count for slot, count in self._slots.items() if _is_held(self._boards, slot, count)}
        slot = next((each for each in range(NUM_SLOTS) if each not in self._slots), None)
        if slot is None:
            raise OutOfPagesError(
                f"{self._name} holds {NUM_SLOTS} gathered buffers at a time, and there is no place for another. Free "
                "some, or gather larger ones."
            )
        region = self._pages.take(num_bytes)
        self._slots[slot] = index + 1
        region.readers[id(self), slot] = partial(_is_held, self._boards, slot, index + 1)
        self._pages.give_back(region)  # to be taken again when nobody holds it
        return region, slot


def num_bytes_of(tensor: Tensor) -> int:
    """Bytes of all its elements."""
    return tensor.numel() * tensor.element_size()


def _is_held(boards: Sequence[Board], slot: int, count: int) -> bool:
    return any(board.freed(slot) < count for board in boards)


def _flat(storage: torch.UntypedStorage, numel: int, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = torch.empty(0, dtype=dtype, device="cpu")  # whatever the default device is
    tensor.set_(storage, 0, (numel,), (1,))
    return tensor
