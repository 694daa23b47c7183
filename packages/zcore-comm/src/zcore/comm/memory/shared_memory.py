"""Collectives between ranks of one host through shared pages: a rank shows its data, the others read them there.

    all_gather      show own part                 -> read every other's part
       into a buffer without memory: one for all  -> write own part, and wait for the others'
    reduce_scatter  show the whole input          -> sum everybody's slot for this rank, straight from their pages
    all_reduce      the same, into own pages, then show the sum  -> read every other's sum
    all_to_all      show the whole input          -> read everybody's slot for this rank
    broadcast       the source shows its tensor   -> read it

What already lies in shared pages, as a buffer from `empty` does, is shown where it is; its owner's `wait` returns when
the others have read it. Anything else is copied into pages of its own first. Nothing moves in the background: the
reading is done in `wait`, by whoever wants the data.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.comm.memory.board import RING_CALLS, Board, Entry
from zcore.comm.memory.buffers import Buffers, num_bytes_of
from zcore.comm.memory.neighbours import Neighbours
from zcore.comm.memory.pages import own_pages
from zcore.comm.memory.under_way import CallsUnderWay, CallUnderWay
from zcore.comm.progress import Polled, Stepping
from zcore.comm.sizes import check_exchange, check_process
from zcore.core import compat
from zcore.core.collectives import CallLog, Pending, Traffic, check_slots, tree_sum
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["SharedMemoryCollectives"]

SMALL_BYTES = 32 * 1024  # up to here everybody sums everything, and what lies in shared pages is copied all the same
TOGETHER = 1  # variant of an all_gather: into one memory that every rank holds
LEADER = 0  # the rank in whose file memory lies that ranks hold together


class SharedMemoryCollectives:
    """The contract between CPU ranks of one host: `members` of `group`. `name` is what reports call them."""

    def __init__(self, group: dist.ProcessGroup, neighbours: Neighbours, *, members: Sequence[int], name: str) -> None:
        self._neighbours = neighbours
        self._members = members
        self._log = CallLog(name)
        self._plain = TorchCollectives(group, name=name, traffic=self._log.traffic)  # messages; and plain memory
        self._buffers = Buffers(self._plain, neighbours.boards, name=name)
        self._pages = own_pages()
        self._process = os.getpid()
        self._calls = CallsUnderWay(neighbours, name=name)
        self._late: list[Callable[[], None]] = []  # what is to be let go of once the leader has said where it lies

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._neighbours.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._neighbours.size

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        return self._log.traffic

    def algorithm_for(self, op: str, payload_bytes: int) -> str:
        """How a call is served, in a word or two."""
        return "torch gloo" if op in ("send", "recv") else "shared memory"

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer in pages that the other ranks can read."""
        return self._buffers.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """Give the pages back; every view of the buffer goes on existing, without memory."""
        self._buffers.free_storage(buffer)

    def alloc_storage(self, buffer: Tensor) -> None:
        """Find pages for the buffer again."""
        self._buffers.alloc_storage(buffer)

    def own_storage(self, buffer: Tensor) -> None:
        """Copy what ranks hold together."""
        self._buffers.own_storage(buffer)

    @property
    def can_hold_together(self) -> bool:
        """Whether a gathered buffer can be one memory for all ranks."""
        return self._buffers.can_hold_together

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_gather`; into memory that all ranks hold together if `output` has none."""
        check_slots("all_gather", label, whole=output, slot=input, size=self.size)
        numel = input.numel()
        if self.can_hold_together and numel and not output.untyped_storage().nbytes():
            return self.hold_together(output, lambda: self._own_slot(output).copy_(input), label=label)

        def read() -> None:
            for rank, _ in self._neighbours.others:
                theirs = self._neighbours.data_of(rank, this.index, skip=0, numel=numel, dtype=output.dtype)
                output[rank * numel : (rank + 1) * numel].copy_(theirs)

        with self._starting("all_gather", label, output) as this:
            if not self.can_hold_together:
                self.alloc_storage(output)
            own_slot = self._own_slot(output)
            if own_slot.data_ptr() != input.data_ptr():
                own_slot.copy_(input)
            return self._show(this, own_slot, read)

    def hold_together(self, output: Tensor, fill: Callable[[], object], *, label: str) -> Polled:
        """Give `output`, which has no memory, some that all ranks hold, and `fill` one's part of it.

        The leader says where; who is ahead of it fills in `wait`. Done when all have filled.
        """
        leader = self._neighbours.boards[LEADER]

        def freed(slot: int, process: int = self._process) -> None:
            if os.getpid() == process:  # a forked child lets go of its own mapping only
                self._neighbours.board.set_freed(slot, this.index + 1)

        def write() -> None:
            gone = partial(freed, leader.slot_of(this.index))
            memory = self._neighbours.storage_of(LEADER, this.index, num_bytes_of(output), when_gone=gone)
            this.let_go = None
            compat.swap_memory(output.untyped_storage(), memory)
            fill()

        def let_go() -> None:
            if leader.started <= this.index:
                self._late.append(let_go)
                return
            place, slot = leader.place_of(this.index), leader.slot_of(this.index)
            if place is not None and leader.started < this.index + RING_CALLS:  # else another call's, or in between
                freed(slot)

        late, self._late = self._late, []
        for each in late:
            each()
        with self._starting("all_gather", label, output, variant=TOGETHER) as this:
            this.let_go = let_go
            if self.rank == LEADER:
                region, this.slot = self._buffers.take_together(this.index, num_bytes_of(output))
                this.place = region.offset
            self._calls.announce(this, write, _nothing)
            self._calls.try_now(this, needs=leader)
            return _Pending(self._calls, this)

    def barrier(self, *, label: str) -> Polled:
        """Done when all ranks have called it."""
        with self._starting("barrier", label, torch.empty(0)) as this:
            self._calls.announce(this, _nothing)
            return _Pending(self._calls, this)

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.reduce_scatter`."""
        check_slots("reduce_scatter", label, whole=input, slot=output, size=self.size)
        low, high = self.rank * output.numel(), (self.rank + 1) * output.numel()
        with self._starting("reduce_scatter", label, input) as this:
            return self._show(this, input, lambda: tree_sum(self._parts(this.index, input, low, high), out=output))

    def all_reduce(self, tensor: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_reduce`."""
        numel = tensor.numel()
        bounds = [rank * numel // self.size for rank in range(self.size + 1)]

        def sum_all() -> None:
            tree_sum(self._parts(this.index, tensor, 0, numel), out=tensor)

        def sum_own_part() -> None:
            low, high = bounds[self.rank], bounds[self.rank + 1]
            shown = self._neighbours.data_of(self.rank, this.index, skip=low, numel=high - low, dtype=tensor.dtype)
            tree_sum(self._parts(this.index, tensor, low, high), out=shown)  # what is shown only we read of this part
            if shown.data_ptr() != tensor[low:high].data_ptr():
                tensor[low:high].copy_(shown)

        def read_sums() -> None:
            for rank, _ in self._neighbours.others:
                low, high = bounds[rank], bounds[rank + 1]
                theirs = self._neighbours.data_of(rank, this.index, skip=low, numel=high - low, dtype=tensor.dtype)
                tensor[low:high].copy_(theirs)

        with self._starting("all_reduce", label, tensor) as this:
            if num_bytes_of(tensor) <= SMALL_BYTES:
                return self._show(this, tensor, sum_all)
            return self._show(this, tensor, sum_own_part, read_sums)

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_to_all`."""
        check_exchange(label, output, input, size=self.size)
        numel = input.numel() // self.size

        def read() -> None:
            parts = self._parts(this.index, input, self.rank * numel, (self.rank + 1) * numel)
            for rank, part in enumerate(parts):
                output[rank * numel : (rank + 1) * numel].copy_(part)

        with self._starting("all_to_all", label, input) as this:
            return self._show(this, input, read)

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Polled:
        """See `Collectives.broadcast`."""

        def read() -> None:
            tensor.copy_(self._neighbours.data_of(src, this.index, skip=0, numel=tensor.numel(), dtype=tensor.dtype))

        with self._starting("broadcast", label, tensor, variant=src) as this:
            if self.rank == src:
                return self._show(this, tensor, _nothing)
            self._calls.announce(this, read)
            return _Pending(self._calls, this)

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`; over gloo."""
        return Stepping(self._plain.send(tensor, dst=self._members[dst], label=label))

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`; over gloo."""
        return Stepping(self._plain.recv(tensor, src=self._members[src], label=label))

    def has_room(self, count: int) -> bool:
        """Whether `count` calls, or as many as ever are open at a time, can start now without waiting."""
        return self._calls.has_room(count)

    def fail_all(self, error: Exception) -> None:
        """Nothing more is done for any call, and whoever may still read what one has lent is told not to trust it."""
        self._calls.fail_all(error)

    def _own_slot(self, whole: Tensor) -> Tensor:
        numel = whole.numel() // self.size
        return whole[self.rank * numel : (self.rank + 1) * numel]

    def _parts(self, index: int, own: Tensor, low: int, high: int) -> list[Tensor]:
        """Elements `low` to `high` of what every rank shows in call `index`."""
        numel, data_of = high - low, self._neighbours.data_of
        return [
            own[low:high] if rank == self.rank else data_of(rank, index, skip=low, numel=numel, dtype=own.dtype)
            for rank in range(self.size)
        ]

    def _starting(
        self, op: str, label: str, tensor: Tensor, *, variant: int = 0
    ) -> AbstractContextManager[CallUnderWay]:
        """A call whose larger side is `tensor`; see `CallsUnderWay.starting`."""
        check_process(self._process, f"{op} {label}")
        entry = Entry(op, tensor.dtype, tensor.numel(), variant, label)
        return self._calls.starting(partial(self._log.note, op, label, tensor), entry)

    def _show(
        self,
        this: CallUnderWay,
        shown: Tensor,
        read: Callable[[], None],
        read_halves: Callable[[], None] | None = None,
    ) -> Polled:
        """Announce a call with this rank's data: where they are if that is in shared pages, else as a copy."""
        found = self._pages.find(shown) if num_bytes_of(shown) > SMALL_BYTES else None
        if found is not None:
            region, this.place = found
            this.shows_own = True
        else:
            region = this.staged = self._pages.take(max(1, num_bytes_of(shown)))
            if shown.numel():
                self._pages.tensor(region, shown.numel(), shown.dtype).copy_(shown)
            this.place = region.offset
        region.readers[id(self)] = partial(_may_be_read, self._neighbours.others, this.index)
        self._calls.announce(this, read, read_halves)
        return _Pending(self._calls, this)


class _Pending:
    """See `Pending`."""

    __slots__ = ("_calls", "_this")

    def __init__(self, calls: CallsUnderWay, this: CallUnderWay) -> None:
        self._calls, self._this = calls, this

    def poll(self) -> bool:
        """Whether `wait` would return at once."""
        return self._calls.is_done(self._this)

    def wait(self) -> None:
        """See `Pending.wait`."""
        self._calls.wait_for(self._this)


def _may_be_read(others: Sequence[tuple[int, Board]], index: int) -> bool:
    return any(board.finished <= index for _, board in others)


def _nothing() -> None:
    """What there is to do in a step that only waits."""
