"""The ranks of one group on this host, as one of them sees the others: their boards, their pages, whether they live.

Waiting is a matter of nanoseconds or of seconds: first look again and again, then let others have the processor, then
sleep a little between looks, and ask now and then whether the awaited process is still there.
"""

import hashlib
import logging
import mmap
import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.comm.board import BOARD_BYTES, Board, Entry, is_store_order_kept
from zcore.comm.pages import map_file, own_pages, storage_at
from zcore.core import compat
from zcore.core.errors import CollectiveError, MismatchError
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["Neighbours", "meet"]

logger = logging.getLogger(__name__)

CARD = struct.Struct("<32sQQQQB")  # host, process, file, bytes of the file, place of the board, whether all is well
LOOKS = 2000  # about 0.2 ms
LOOKS_WHEN_CROWDED = 20  # more ranks than processors: whoever looks keeps another from working
YIELDS = 200
NAP_S = 50e-6
CHECK_EVERY_S = 0.05


class Neighbours:
    """See the header. Every list is by rank in the group."""

    def __init__(
        self, boards: list[Board], mappings: list[mmap.mmap], lives: list[int | None], *, rank: int, deadline_s: float
    ) -> None:
        self.rank = rank
        self.size = len(boards)
        self.board = boards[rank]
        self.others = [(each, boards[each]) for each in range(self.size) if each != rank]
        self.boards = boards
        self._mappings = mappings
        self._lives = lives  # descriptors of processes, readable once they end
        self._looks = LOOKS if len(os.sched_getaffinity(0)) >= self.size else LOOKS_WHEN_CROWDED
        self._deadline_s = deadline_s

    def data_of(self, rank: int, index: int, *, skip: int, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements of what `rank` shows in call `index`, from its element `skip` on; no copy."""
        if not numel:
            return torch.empty(0, dtype=dtype)
        place = self.boards[rank].place_of(index) + skip * dtype.itemsize
        return torch.frombuffer(self._mappings[rank], dtype=dtype, count=numel, offset=place)

    def storage_of(
        self, rank: int, index: int, num_bytes: int, *, when_gone: Callable[[], None]
    ) -> torch.UntypedStorage:
        """What `rank` shows in call `index`, as `storage_at` makes it."""
        place = self.boards[rank].place_of(index)
        return storage_at(self._mappings[rank], place, num_bytes, when_gone=when_gone)

    def wait_until(self, is_reached: Callable[[], bool], lacks: Callable[[Board], bool], *, what: str) -> None:
        """Return once `is_reached()`. `lacks(board)` tells whom that waits for.

        Raises CollectiveError, with what is known of them, if one of these ends, or the deadline passes.
        """
        for _ in range(self._looks):
            if is_reached():
                return
        for _ in range(YIELDS):
            os.sched_yield()
            if is_reached():
                return
        began = checked = time.monotonic()
        while not is_reached():
            time.sleep(NAP_S)
            now = time.monotonic()
            if now - checked < CHECK_EVERY_S:
                continue
            checked = now
            missing = [(rank, board) for rank, board in self.others if lacks(board)]
            ended = [rank for rank, _ in missing if self._has_ended(rank)]
            if ended and not is_reached():
                raise CollectiveError(self._describe(what, missing, f"rank {ended[0]} has raised, was killed, or left"))
            if now - began > self._deadline_s:
                reason = f"the timeout of {self._deadline_s:.3g} s has passed"
                raise CollectiveError(self._describe(what, missing, reason))

    def check_same(self, index: int, entry: Entry) -> None:
        """Raise MismatchError if another rank, all of which have started it, made call `index` another one."""
        for rank, board in self.others:
            if not board.is_same(index, entry):
                raise MismatchError(
                    f"Call {index} of this group is {entry} on rank {self.rank}, and {board.entry(index)} on rank "
                    f"{rank}. Every rank makes the same calls, of the same sizes, in the same order: look for a branch "
                    "that ranks take differently, or data of different shapes."
                )

    def _has_ended(self, rank: int) -> bool:
        descriptor = self._lives[rank]
        if descriptor is None:
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def _describe(self, what: str, missing: list[tuple[int, Board]], reason: str) -> str:
        lines = []
        for rank, board in missing:
            last = f"its last call was {board.entry(board.started - 1)}" if board.started else "it made no call"
            state = "has ended" if self._has_ended(rank) else "is alive"
            lines.append(f"rank {rank} {state}, {last} (call {board.started - 1})")
        return (
            f"{what} did not complete: {reason}. Missing: {'; '.join(lines) or 'none'}. Look for the first error in "
            "the output of the ranks named, mend it, and restart all ranks from the last checkpoint."
        )


def meet(group: dist.ProcessGroup, *, name: str) -> Neighbours | None:
    """Find the other ranks of `group`; None on every rank if not all of them are on this host and may share memory."""
    first = TorchCollectives(group, name=f"{name} (meeting)")
    mapping = own_board = None
    place = 0
    if is_store_order_kept():
        try:
            pages = own_pages()
            region = pages.take(BOARD_BYTES)
        except (OSError, MemoryError) as error:
            logger.warning("No memory to share between ranks (%s): %s is served over gloo.", error, name)
        else:
            pages.tensor(region, BOARD_BYTES, torch.uint8).zero_()
            mapping, place = pages.mapping, region.offset
            own_board = Board(mapping, place)
    if own_board is None:
        card = CARD.pack(b"", 0, 0, 0, 0, 0)
    else:
        card = CARD.pack(_host(), os.getpid(), own_pages().file, own_pages().file_bytes, place, 1)
    cards = [CARD.unpack(each) for each in _exchange(first, card)]
    boards: list[Board] = []
    mappings: list[mmap.mmap] = []
    lives: list[int | None] = []
    problem = "" if len({each[0] for each in cards}) == 1 and all(each[-1] for each in cards) else "several hosts"
    for rank, (_, process, file, file_bytes, board, _) in enumerate(cards):
        if problem:
            break
        try:
            own = own_pages().mapping, None
            theirs, life = own if rank == first.rank else _open(process, file, file_bytes)
        except OSError as error:
            problem = f"memory of process {process} cannot be opened: {error}"
            continue
        lives.append(life)
        mappings.append(theirs)
        boards.append(Board(theirs, board))
    if any(answer != b"\1" for answer in _exchange(first, b"\0" if problem else b"\1")):
        logger.info("Ranks of %s share no memory (%s).", name, problem or "another rank cannot")
        return None
    return Neighbours(boards, mappings, lives, rank=first.rank, deadline_s=compat.timeout_of(group).total_seconds())


def _exchange(group: TorchCollectives, message: bytes) -> list[bytes]:
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    all_of_them = torch.empty(group.size * len(message), dtype=torch.uint8)
    group.all_gather(all_of_them, own, label="who shares memory").wait()
    return [bytes(each.tolist()) for each in all_of_them.view(group.size, -1)]


def _host() -> bytes:
    """What processes have in common that can see each other's files: the kernel, and the namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return hashlib.sha256(f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}".encode()).digest()


_opened: dict[tuple[int, int, int], tuple[mmap.mmap, int | None]] = {}  # several groups of the same processes need one


def _open(process: int, file: int, file_bytes: int) -> tuple[mmap.mmap, int | None]:
    """The mapped file of another process, and a descriptor of it that is readable once it ends."""
    inode = Path(f"/proc/{process}/fd/{file}").stat().st_ino
    key = os.getpid(), process, inode
    if key not in _opened:
        _opened[key] = map_file(process, file, file_bytes=file_bytes), os.pidfd_open(process)
    return _opened[key]
