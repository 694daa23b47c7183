"""What each rank of a group tells the others of the host, in shared pages: one writer each, read without system calls.

    started    how many calls this rank has started
    finished   how many, from the first, it is through with
    calls      a ring of entries: op and dtype, numel, variant, place, slot, stage, label
    freed      for each slot of memory that ranks hold together: the last call whose result this rank has freed

A call's entry is written before `started` counts it. Processors of the x86-64 kind show stores in their order, and that
is all this relies on; on others the group is served by other means.
"""

import mmap
import platform
import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["BOARD_BYTES", "NUM_SLOTS", "OPS", "RING_CALLS", "Board", "Entry", "is_store_order_kept"]

OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "barrier")
DTYPES = tuple(sorted(str(each) for each in vars(torch).values() if isinstance(each, torch.dtype)))
DTYPE_CODES = {getattr(torch, name.removeprefix("torch.")): code for code, name in enumerate(DTYPES)}

STARTED, FINISHED = 0, 1
HEAD_WORDS = 8  # a cache line
RING_CALLS = 128  # a rank may be so far ahead of the slowest
ENTRY_WORDS = 16
OP, NUMEL, VARIANT, PLACE, SLOT, STAGE, LABEL = range(7)  # words of an entry; the label takes the rest
LABEL_BYTES = (ENTRY_WORDS - LABEL) * 8
NUM_SLOTS = 2048  # buffers that ranks can hold together at one time
FREED = HEAD_WORDS + RING_CALLS * ENTRY_WORDS
BOARD_BYTES = (FREED + NUM_SLOTS) * 8
NOWHERE = 2**64 - 1


def is_store_order_kept() -> bool:
    """Whether this processor lets others see stores in the order in which they were made."""
    return platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True, slots=True)
class Entry:
    """One call as every rank has to make it."""

    op: str
    dtype: torch.dtype
    numel: int
    variant: int  # the source of a broadcast; what else has to be equal
    label: str

    def __str__(self) -> str:
        to_whom = f" from rank {self.variant}" if self.op == "broadcast" else ""
        to_whom += " into one memory" if self.op == "all_gather" and self.variant else ""
        return f"{self.op} {self.label}{to_whom} ({self.numel} x {str(self.dtype).removeprefix('torch.')})"


@lru_cache(maxsize=4096)  # labels that count steps would fill the memory
def _label_bytes(label: str) -> bytes:
    """A label as it is compared: of a longer one its beginning, and a checksum that tells the rest apart."""
    encoded = label.encode()
    if len(encoded) > LABEL_BYTES:
        checksum = f"...{zlib.crc32(encoded):08x}".encode()
        encoded = encoded[: LABEL_BYTES - len(checksum)].decode(errors="ignore").encode() + checksum
    return encoded.ljust(LABEL_BYTES, b"\0")


class Board:
    """The words of one rank: its own to write, a peer's to read."""

    def __init__(self, mapping: mmap.mmap, offset: int) -> None:
        self._words = memoryview(mapping)[offset : offset + BOARD_BYTES].cast("Q")
        self._bytes = memoryview(mapping)[offset : offset + BOARD_BYTES]

    @property
    def started(self) -> int:
        """How many calls the rank has started."""
        return self._words[STARTED]

    @property
    def finished(self) -> int:
        """How many calls, from the first, the rank is through with: it reads no memory of theirs any more."""
        return self._words[FINISHED]

    @finished.setter
    def finished(self, count: int) -> None:
        self._words[FINISHED] = count

    def start(self, index: int, entry: Entry, *, place: int | None, slot: int = 0, stage: int = 0) -> None:
        """Announce call `index`, whose data lie at `place` in this rank's file; `slot` if ranks hold them together."""
        at = HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS
        words = self._words
        words[at + OP] = OPS.index(entry.op) << 8 | DTYPE_CODES[entry.dtype]
        words[at + NUMEL] = entry.numel
        words[at + VARIANT] = entry.variant
        words[at + PLACE] = NOWHERE if place is None else place
        words[at + SLOT] = slot
        words[at + STAGE] = stage
        self._bytes[(at + LABEL) * 8 : (at + ENTRY_WORDS) * 8] = _label_bytes(entry.label)
        words[STARTED] = index + 1

    def place_of(self, index: int) -> int | None:
        """Where the data of call `index` lie in the rank's file, if it shows any."""
        place = self._words[HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS + PLACE]
        return None if place == NOWHERE else place

    def slot_of(self, index: int) -> int:
        """Which slot the memory of call `index` has, if ranks hold it together."""
        return self._words[HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS + SLOT]

    def freed(self, slot: int) -> int:
        """The last call + 1 whose result in `slot` the rank has freed; 0 before any."""
        return self._words[FREED + slot]

    def set_freed(self, slot: int, count: int) -> None:
        """Tell that the result of call `count` - 1 in `slot` is freed."""
        self._words[FREED + slot] = count

    def stage_of(self, index: int) -> int:
        """How far the rank has come with call `index`; what the numbers mean is the caller's."""
        return self._words[HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS + STAGE]

    def set_stage(self, index: int, stage: int) -> None:
        """Tell how far this rank has come with call `index`."""
        self._words[HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS + STAGE] = stage

    def is_same(self, index: int, entry: Entry) -> bool:
        """Whether the rank's call `index` is the one that `entry` describes."""
        at = HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS
        words = self._words
        code = OPS.index(entry.op) << 8 | DTYPE_CODES[entry.dtype]
        if words[at + OP] != code or words[at + NUMEL] != entry.numel or words[at + VARIANT] != entry.variant:
            return False
        return self._bytes[(at + LABEL) * 8 : (at + ENTRY_WORDS) * 8] == _label_bytes(entry.label)

    def entry(self, index: int) -> Entry:
        """What the rank's call `index` is; of the last `RING_CALLS` calls."""
        at = HEAD_WORDS + index % RING_CALLS * ENTRY_WORDS
        words = self._words
        code = words[at + OP]
        label = bytes(self._bytes[(at + LABEL) * 8 : (at + ENTRY_WORDS) * 8]).rstrip(b"\0")
        dtype = getattr(torch, DTYPES[code & 0xFF].removeprefix("torch."))
        return Entry(OPS[code >> 8], dtype, words[at + NUMEL], words[at + VARIANT], label.decode(errors="replace"))
