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
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.comm.memory.board import RING_CALLS, Board, Entry
from zcore.comm.memory.buffers import Buffers, num_bytes_of
from zcore.comm.memory.neighbours import Neighbours
from zcore.comm.memory.pages import Region, own_pages
from zcore.comm.progress import LOCK, Polled, Stepping, in_mode_of_caller, note_closed, note_open
from zcore.comm.sizes import check_exchange, check_process
from zcore.core import compat
from zcore.core.collectives import Call, CallLog, Pending, Traffic, check_slots, tree_sum
from zcore.core.errors import CollectiveError, ZcoreError
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["SharedMemoryCollectives"]

SMALL_BYTES = 32 * 1024  # up to here everybody sums everything, and what lies in shared pages is copied all the same
TOGETHER = 1  # variant of an all_gather: into one memory that every rank holds
LEADER = 0  # the rank in whose file memory lies that ranks hold together
# Stages of a call: announced; own part of the result is there; no more is to be read; given up, with data as they were.
# Or given up because another rank had.
STARTED, HALF, READ, FAILED, FOLLOWED = range(5)


@dataclass(slots=True)
class _Open:
    """A call that this rank has started, and what is left to do for it."""

    call: Call
    entry: Entry
    index: int
    read: Callable[[], None] | None = None  # when every rank has started the call
    read_halves: Callable[[], None] | None = None  # when every rank's part of the result is there; if two steps
    staged: Region | None = None
    shows_own: bool = False  # memory of the caller's: others must have read it before `wait` returns
    is_same: bool = False  # on every rank, as far as is known
    error: Exception | None = None  # that ended it


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
        self._name = name
        self._next = 0
        self._open: dict[int, _Open] = {}  # in the order of starting
        self._untold: set[int] = set()  # calls that have failed, and whose error nobody has met yet
        self._beginning: _Open  # what is not announced yet, and leaves nothing behind if it never is

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
        if not self.can_hold_together:
            self.alloc_storage(output)
        elif numel and not output.untyped_storage().nbytes():
            return self.hold_together(output, lambda: self._own_slot(output).copy_(input), label=label)
        own_slot = self._own_slot(output)
        if own_slot.data_ptr() != input.data_ptr():
            own_slot.copy_(input)

        def read() -> None:
            for rank, _ in self._neighbours.others:
                theirs = self._neighbours.data_of(rank, index, skip=0, numel=numel, dtype=output.dtype)
                output[rank * numel : (rank + 1) * numel].copy_(theirs)

        index = self._begin("all_gather", label, output)
        return self._show(index, own_slot, read)

    def hold_together(self, output: Tensor, fill: Callable[[], object], *, label: str) -> Polled:
        """Give `output`, which has no memory, some that all ranks hold, and `fill` one's part of it.

        The leader says where; who is ahead of it fills in `wait`. Done when all have filled.
        """
        leader = self._neighbours.boards[LEADER]

        def write() -> None:
            slot, process = leader.slot_of(index), self._process

            def freed() -> None:
                if os.getpid() == process:  # a forked child lets go of its own mapping only
                    self._neighbours.board.set_freed(slot, index + 1)

            memory = self._neighbours.storage_of(LEADER, index, num_bytes_of(output), when_gone=freed)
            compat.swap_memory(output.untyped_storage(), memory)
            fill()

        index = self._begin("all_gather", label, output, variant=TOGETHER)
        place, slot = None, 0
        if self.rank == LEADER:
            region, slot = self._buffers.take_together(index, num_bytes_of(output))
            place = region.offset
        this = self._beginning
        pending = self._announce(write, _nothing, place=place, slot=slot)
        with LOCK:
            try:
                if leader.started > index and leader.is_same(index, this.entry):
                    self._read(this)
            except BaseException as error:  # noqa: BLE001 - raised by `wait_for`
                self._end_by(this, error)
        return pending

    def barrier(self, *, label: str) -> Polled:
        """Done when all ranks have called it."""
        self._begin("barrier", label, torch.empty(0))
        return self._announce(_nothing)

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.reduce_scatter`."""
        check_slots("reduce_scatter", label, whole=input, slot=output, size=self.size)
        low, high = self.rank * output.numel(), (self.rank + 1) * output.numel()
        index = self._begin("reduce_scatter", label, input)
        return self._show(index, input, lambda: tree_sum(self._parts(index, input, low, high), out=output))

    def all_reduce(self, tensor: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_reduce`."""
        numel = tensor.numel()
        index = self._begin("all_reduce", label, tensor)
        if num_bytes_of(tensor) <= SMALL_BYTES:
            return self._show(index, tensor, lambda: tree_sum(self._parts(index, tensor, 0, numel), out=tensor))
        bounds = [rank * numel // self.size for rank in range(self.size + 1)]

        def sum_own_part() -> None:
            low, high = bounds[self.rank], bounds[self.rank + 1]
            shown = self._neighbours.data_of(self.rank, index, skip=low, numel=high - low, dtype=tensor.dtype)
            tree_sum(self._parts(index, tensor, low, high), out=shown)  # of what is shown only we read this part
            if shown.data_ptr() != tensor[low:high].data_ptr():
                tensor[low:high].copy_(shown)

        def read_sums() -> None:
            for rank, _ in self._neighbours.others:
                low, high = bounds[rank], bounds[rank + 1]
                theirs = self._neighbours.data_of(rank, index, skip=low, numel=high - low, dtype=tensor.dtype)
                tensor[low:high].copy_(theirs)

        return self._show(index, tensor, sum_own_part, read_sums)

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_to_all`."""
        check_exchange(label, output, input, size=self.size)
        numel = input.numel() // self.size

        def read() -> None:
            parts = self._parts(index, input, self.rank * numel, (self.rank + 1) * numel)
            for rank, part in enumerate(parts):
                output[rank * numel : (rank + 1) * numel].copy_(part)

        index = self._begin("all_to_all", label, input)
        return self._show(index, input, read)

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Polled:
        """See `Collectives.broadcast`."""
        index = self._begin("broadcast", label, tensor, variant=src)
        if self.rank == src:
            return self._show(index, tensor, _nothing)

        def read() -> None:
            tensor.copy_(self._neighbours.data_of(src, index, skip=0, numel=tensor.numel(), dtype=tensor.dtype))

        return self._announce(read)

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`; over gloo."""
        return Stepping(self._plain.send(tensor, dst=self._members[dst], label=label))

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`; over gloo."""
        return Stepping(self._plain.recv(tensor, src=self._members[src], label=label))

    def has_room(self, count: int) -> bool:
        """Whether `count` calls, or as many as ever are open at a time, can start now without waiting."""
        count = min(count, RING_CALLS // 2 - 1)
        if len(self._open) + count > RING_CALLS // 2:
            return False
        oldest = self._next + count - RING_CALLS - 1  # whose entry the last of them is to take
        is_read_here = next(iter(self._open), self._next) > oldest
        return is_read_here and all(board.finished > oldest for _, board in self._neighbours.others)

    def advance(self) -> None:
        """Do what open calls need, as far as the others have come."""
        with LOCK:  # no `acquire` and `try`: an interrupt between them would leave it locked
            for each in list(self._open.values()):
                if not self._advance(each):
                    break  # not started everywhere, so later ones are not either

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

    def _begin(self, op: str, label: str, tensor: Tensor, *, variant: int = 0) -> int:
        """The index of a call that is to be announced next. `tensor` is its larger side."""
        check_process(self._process, f"{op} {label}")
        self._make_place_in_ring()
        entry = Entry(op, tensor.dtype, tensor.numel(), variant, label)
        self._beginning = _Open(self._log.note(op, label, tensor), entry, self._next)
        return self._next

    def _show(
        self, index: int, shown: Tensor, read: Callable[[], None], read_halves: Callable[[], None] | None = None
    ) -> Polled:
        """Announce call `index` with this rank's data: where they are if that is in shared pages, else as a copy."""
        this = self._beginning
        found = self._pages.find(shown) if num_bytes_of(shown) > SMALL_BYTES else None
        if found is not None:
            region, place = found
            this.shows_own = True
        else:
            region = this.staged = self._pages.take(max(1, num_bytes_of(shown)))
            place = region.offset
            if shown.numel():
                self._pages.tensor(region, shown.numel(), shown.dtype).copy_(shown)
        region.readers[id(self)] = partial(_may_be_read, self._neighbours.others, index)
        return self._announce(read, read_halves, place=place)

    def _announce(
        self,
        read: Callable[[], None],
        read_halves: Callable[[], None] | None = None,
        *,
        place: int | None = None,
        slot: int = 0,
    ) -> Polled:
        """Tell the others that the call at hand has started, and remember what is to be done for it."""
        this = self._beginning
        this.read = in_mode_of_caller(read)
        this.read_halves = read_halves and in_mode_of_caller(read_halves)

        def enter() -> None:
            self._neighbours.go_on()
            self._next = this.index + 1
            self._open[this.index] = this
            note_open(self)
            self._neighbours.board.start(this.index, this.entry, place=place, slot=slot)

        with LOCK:
            try:
                enter()
            except BaseException as error:  # half announced it would be taken for another call
                enter()
                self._end_by(this, error)
                raise
        return _Pending(self, this)

    def wait_for(self, this: _Open) -> None:
        """Return when the call is done. Raises what ended it, each time."""
        index, others = this.index, self._neighbours.others
        with LOCK:
            self._advance(this)
        try:
            if index in self._open:
                needed = STARTED if this.read_halves is None else HALF

                def needs(board: Board) -> bool:
                    return board.started <= index or board.stage_of(index) not in (needed, HALF, READ)

                def lacks(board: Board) -> bool:  # nobody gets on with a call to which not all have come
                    has_all = all(each.started > index for _, each in others)
                    return needs(board) if has_all else board.started <= index

                self._neighbours.wait_until(
                    lambda: index not in self._open,
                    needs,
                    lacks=lacks,
                    what=str(this.call),
                    index=index,
                    since=lambda: min([index, *self._untold]),
                    label=this.call.label,
                )
            if this.shows_own and this.error is None:
                self._neighbours.wait_until(
                    lambda: all(_has_come(board, index, READ) for _, board in others),
                    lambda board: not _has_come(board, index, READ),
                    what=str(this.call),
                    index=index,
                    label=this.call.label,
                )
                this.shows_own = False
        except ZcoreError as error:
            with LOCK:
                self._fail(this, error)
        if this.error is not None:
            self._untold = {each for each in self._untold if each > index}
            raise this.error

    def is_done(self, this: _Open) -> bool:
        """Whether the call is done, after doing what can be done for it now. Raises what ended it."""
        if this.index in self._open:
            self.advance()
        if this.index in self._open:
            return False
        if this.error is not None:
            raise this.error
        return not this.shows_own or all(_has_come(board, this.index, READ) for _, board in self._neighbours.others)

    def _advance(self, this: _Open) -> bool:
        """Do what can be done for the call without waiting; whether every rank has started it.

        What goes wrong is this call's, for whoever waits for it: other calls are under way in the same wait.
        """
        others, index = self._neighbours.others, this.index
        if not this.is_same and index in self._open and not all(board.started > index for _, board in others):
            return False
        try:
            if not this.is_same and index in self._open:
                self._neighbours.check_same(index, this.entry)
                this.is_same = True
            self._read(this)
            # As long as the call is open here, the others' entries are those of this call.
            if this.read_halves is not None and all(board.stage_of(index) in (HALF, READ) for _, board in others):
                read_halves, this.read_halves = this.read_halves, None
                read_halves()
                self._neighbours.board.set_stage(index, READ)
            if index in self._open:  # what a rank shows that has given up may be anything
                for stage in (FAILED, FOLLOWED):
                    self._neighbours.check_nobody(partial(_is_at, index, stage), what=str(this.call))
        except BaseException as error:  # noqa: BLE001 - raised by `wait_for`
            self._end_by(this, error)
        if this.read_halves is None:
            self._close(this)
        return True

    def _read(self, this: _Open) -> None:
        read, this.read = this.read, None
        if read is not None:
            read()
            self._neighbours.board.set_stage(this.index, READ if this.read_halves is None else HALF)

    def _end_by(self, this: _Open, error: BaseException) -> None:
        """The call has met `error`. An interrupt is raised here, too: read in part it is nobody's whole result."""
        if isinstance(error, Exception):
            self._fail(this, error)
            return
        self._fail(this, CollectiveError(f"{this.call} was interrupted, and its result is undefined. Restart."))
        raise error

    def fail_all(self, error: Exception) -> None:
        """Nothing more is done for any open call."""
        with LOCK:
            for this in tuple(self._open.values()):
                self._fail(this, error)

    def _fail(self, this: _Open, error: Exception) -> None:
        """Nothing more is done for the call, now or when a late rank comes after all; the others are told."""
        if this.index in self._open:
            others = [board.stage_of(this.index) for _, board in self._neighbours.others if board.started > this.index]
            self._neighbours.board.set_stage(this.index, FOLLOWED if {FAILED, FOLLOWED} & {*others} else FAILED)
        this.error = error
        this.read = this.read_halves = None
        self._untold.add(this.index)
        self._close(this)

    def _close(self, this: _Open) -> None:
        if self._open.pop(this.index, None) is None:
            return
        if not self._open:
            note_closed(self)
        self._neighbours.board.finished = next(iter(self._open), self._next)
        if this.staged is not None:
            self._pages.give_back(this.staged)

    def _make_place_in_ring(self) -> None:
        """The entry to be written is read by nobody any more: neither by us, nor by the slowest of the others."""
        if len(self._open) >= RING_CALLS // 2:
            self.wait_for(next(iter(self._open.values())))  # a call that nobody waited for
        oldest = self._next - RING_CALLS
        if oldest >= 0:
            while self._open and next(iter(self._open)) <= oldest:
                self.wait_for(next(iter(self._open.values())))
            self._neighbours.wait_until(
                lambda: all(board.finished > oldest for _, board in self._neighbours.others),
                lambda board: board.finished <= oldest,
                what=f"Call {self._next} of {self._name}, {RING_CALLS} ahead of the slowest rank,",
                index=self._next,
                since=lambda: oldest,
            )


class _Pending:
    """See `Pending`."""

    __slots__ = ("_group", "_this")

    def __init__(self, group: SharedMemoryCollectives, this: _Open) -> None:
        self._group, self._this = group, this

    def poll(self) -> bool:
        """Whether `wait` would return at once."""
        return self._group.is_done(self._this)

    def wait(self) -> None:
        """See `Pending.wait`."""
        self._group.wait_for(self._this)


def _may_be_read(others: Sequence[tuple[int, Board]], index: int) -> bool:
    return any(board.finished <= index for _, board in others)


def _is_at(index: int, stage: int, board: Board) -> bool:
    return board.stage_of(index) == stage


def _has_come(board: Board, index: int, stage: int) -> bool:
    return board.finished > index or board.stage_of(index) >= stage


def _nothing() -> None:
    """What there is to do in a step that only waits."""
