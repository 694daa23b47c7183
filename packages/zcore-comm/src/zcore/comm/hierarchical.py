"""Collectives on two levels: ranks of one host through shared memory, hosts through messages between pairs.

                    host 0            host 1
    local rank 0    0 --------------- 4           a column: ranks with one local rank, over all hosts
    local rank 1    1 --------------- 5
    local rank 2    2 --------------- 6           between hosts goes, in each direction and for each host, one part
    local rank 3    3 --------------- 7           of a local-size-th of the data, not one for each rank

                    step 1, in the host         step 2, in the column        step 3, in the host
    reduce_scatter  sum the slots of my column  sum them over hosts          -
    all_reduce      sum my part                 sum it over hosts            gather the parts
    all_gather      have memory, if none        gather the column            gather the columns, or wait for all
    broadcast       -                           in the source's column       from the source's local rank
    all_to_all      straight between all ranks: each byte has one reader

Sums stay those of one tree over all ranks, since a host's ranks are one of its branches: they are neighbours, as many
on each host, and a power of two. Other groups are not served here.

A step of a call begins when its step before is done, when every earlier call has begun that step, so that all ranks
begin them in one order, and when it would not have to wait for room. It is taken by whoever waits, or starts another
call.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from zcore.comm.memory.shared_memory import SharedMemoryCollectives
from zcore.comm.pairs.pairwise import PairwiseCollectives
from zcore.comm.progress import LOCK, Polled, in_mode_of_caller, is_reached_napping, note_closed, note_open
from zcore.comm.ranks.journal import Journal
from zcore.comm.sizes import check_exchange, check_process
from zcore.core.collectives import Call, CallLog, Pending, Traffic, check_slots, derived_label
from zcore.core.errors import CollectiveError, StateError, ZcoreError

__all__ = ["HierarchicalCollectives", "plan_levels"]

NUM_STEPS = 3
SMALL_BYTES = 32 * 1024  # an all_reduce up to here is summed whole on each level: one step less


def plan_levels(hosts: Sequence[object]) -> int | None:
    """How many ranks each host has, if ranks on `hosts`, by rank, can form two levels; else None.

    >>> plan_levels(["a", "a", "b", "b"])
    2
    >>> plan_levels(["a", "b", "a", "b"]) is None  # neighbours in rank have to be neighbours in place
    True
    """
    local_size = sum(1 for host in hosts if host == hosts[0])
    blocks = [hosts[low : low + local_size] for low in range(0, len(hosts), local_size)]
    is_even = all(len(block) == local_size and len(set(block)) == 1 for block in blocks)
    is_grouped = is_even and len({block[0] for block in blocks}) == len(blocks)
    is_branch = local_size & (local_size - 1) == 0
    return local_size if is_grouped and is_branch and 1 < local_size < len(hosts) else None


_Step = Callable[[], Sequence[Polled]]


@dataclass(slots=True, eq=False)
class _Open:
    """A call and its steps; `begun` of them have begun."""

    call: Call
    steps: tuple[_Step, ...]
    begun: int = 0
    error: ZcoreError | None = None  # that ended it
    under_way: list[Polled] = field(default_factory=list)


class HierarchicalCollectives:
    """The contract on two levels. `first` and `last` are two groups of this host's ranks, for steps 1 and 3."""

    def __init__(
        self,
        *,
        flat: PairwiseCollectives,
        column: PairwiseCollectives,
        first: SharedMemoryCollectives,
        last: SharedMemoryCollectives,
        journal: Journal,
        name: str,
    ) -> None:
        self._journal = journal
        self._flat, self._column, self._first, self._last = flat, column, first, last
        self._log = CallLog(name)
        self._open: list[_Open] = []  # in the order of starting
        self._process = os.getpid()
        self._broken: ZcoreError | None = None
        self._is_advancing = False

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._flat.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._flat.size

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        return self._log.traffic

    def algorithm_for(self, op: str, payload_bytes: int) -> str:
        """How a call is served, in words."""
        return self._flat.algorithm_for(op, payload_bytes) if op == "all_to_all" else "two levels"

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer in pages that the ranks of this host can read."""
        return self._first.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """See `Collectives.free_storage`."""
        self._first.free_storage(buffer)

    def alloc_storage(self, buffer: Tensor) -> None:
        """See `Collectives.alloc_storage`."""
        self._first.alloc_storage(buffer)

    def own_storage(self, buffer: Tensor) -> None:
        """See `Collectives.own_storage`."""
        self._first.own_storage(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_gather`; one memory for each host if `output` has none."""
        check_slots("all_gather", label, whole=output, slot=input, size=self.size)
        with self._starting("all_gather", label, output) as call:
            numel = input.numel()

            def slot(host: int) -> Tensor:
                at = (host * self._first.size + self._first.rank) * numel
                return output[at : at + numel]

            def gather_column() -> Sequence[Polled]:
                slots = [slot(host) for host in range(self._column.size)]
                return [self._column.gather_slots(slots, label=label, whole=output)]

            def gather_columns() -> Sequence[Polled]:
                blocks = output.tensor_split(self._column.size)
                return [self._last.all_gather(block, slot(host), label=label) for host, block in enumerate(blocks)]

            if not self._first.can_hold_together:
                self.alloc_storage(output)
            elif numel and not output.untyped_storage().nbytes():

                def fill() -> None:
                    slot(self._column.rank).copy_(input)

                hold = partial(self._first.hold_together, output, fill, label=label)
                return self._start(call, lambda: [hold()], gather_column, lambda: [self._last.barrier(label=label)])
            own = slot(self._column.rank)
            if own.data_ptr() != input.data_ptr():
                own.copy_(input)
            return self._start(call, _nothing, gather_column, gather_columns)

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.reduce_scatter`."""
        check_slots("reduce_scatter", label, whole=input, slot=output, size=self.size)
        with self._starting("reduce_scatter", label, input) as call:
            sums = input.new_empty(self._column.size, output.numel())

            def sum_column() -> Sequence[Polled]:
                blocks = input.tensor_split(self._column.size)
                return [
                    self._first.reduce_scatter(of_host, block, label=label)
                    for of_host, block in zip(sums.unbind(), blocks, strict=True)
                ]

            return self._start(
                call, sum_column, lambda: [self._column.reduce_scatter(output, sums.view(-1), label=label)], _nothing
            )

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_reduce`."""
        with self._starting("all_reduce", label, tensor) as call:
            if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
                return self._start(
                    call,
                    lambda: [self._first.all_reduce(tensor, label=label)],
                    lambda: [self._column.all_reduce(tensor, label=label)],
                    _nothing,
                )
            missing = -tensor.numel() % self._first.size
            if missing:  # else a rank with as many as that more would not be told apart
                label = derived_label(f"{tensor.numel()} of {label}", parts=[label])
            whole = torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
            part = whole.tensor_split(self._first.size)[self._first.rank]

            def gather_parts() -> Sequence[Polled]:
                pending = self._last.all_gather(whole, part, label=label)
                return [_Then(pending, lambda: tensor.copy_(whole[: tensor.numel()]))] if missing else [pending]

            return self._start(
                call,
                lambda: [self._first.reduce_scatter(part, whole, label=label)],
                lambda: [self._column.all_reduce(part, label=label)],
                gather_parts,
            )

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_to_all`."""
        check_exchange(label, output, input, size=self.size)
        with self._starting("all_to_all", label, input) as call:
            return self._start(call, lambda: [self._flat.all_to_all(output, input, label=label)])

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.broadcast`."""
        with self._starting("broadcast", derived_label(f"{label} from rank {src}", parts=[label]), tensor) as call:
            host, local_rank = divmod(src, self._first.size)

            def send_in_column() -> Sequence[Polled]:
                return [self._column.broadcast(tensor, src=host, label=label)] if self._first.rank == local_rank else []

            return self._start(
                call, _nothing, send_in_column, lambda: [self._last.broadcast(tensor, src=local_rank, label=label)]
            )

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`."""
        self._log.note("send", label, tensor)
        return self._flat.send(tensor, dst=dst, label=label)

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`."""
        self._log.note("recv", label, tensor)
        return self._flat.recv(tensor, src=src, label=label)

    def advance(self) -> None:
        """Begin what steps can begin. What goes wrong ends all calls of this group, for those who wait for them."""
        with LOCK:  # no `acquire` and `try`: an interrupt between them would leave it locked
            if self._is_advancing:
                return  # beginning a step may wait for room, and waiting advances every group
            self._is_advancing = True
            try:
                self._advance()
            except BaseException as error:  # a step may have begun in part
                self._break(_told([each.call for each in self._open], error))
                if not isinstance(error, Exception):  # which is raised by `wait_for`
                    raise
            finally:
                self._is_advancing = False

    def _advance(self) -> None:
        begun_by_all = NUM_STEPS
        for each in tuple(self._open):
            while (
                each.begun < min(begun_by_all, len(each.steps))
                and _is_done(each.under_way)
                and self._has_room(each.begun)
            ):
                each.under_way = list(each.steps[each.begun]())
                each.begun += 1
            if each.begun < len(each.steps):
                begun_by_all = min(begun_by_all, each.begun)
            elif _is_done(each.under_way):
                self._open.remove(each)
                if not self._open:
                    note_closed(self)
                self._journal.finish(each.call)

    def _has_room(self, step: int) -> bool:
        """Whether what serves that step has room for its calls: of the steps in the host up to one for each host."""
        if step == 0:
            return self._first.has_room(self._column.size)
        return step != NUM_STEPS - 1 or self._last.has_room(self._column.size)

    def _break(self, error: ZcoreError) -> None:
        """All calls end, and with them what they had begun: nothing is written into anybody's tensors later."""
        with LOCK:
            self._broken = error
            for each in self._open:
                each.error = error
            self._open.clear()
            note_closed(self)
            for level in (self._first, self._last):
                level.fail_all(error)
            for between in (self._column, self._flat):
                between.end(error)
        self._journal.give_up(error)

    def wait_for(self, this: _Open) -> None:
        """Return when the call is done. Raises what ended it, each time."""
        try:
            self.advance()
            if this in self._open:
                self._journal.wait_for(this.call, partial(self._is_done_within, this))
        except ZcoreError as error:
            self._break(error)
        except BaseException as error:  # whoever made the call at once has no handle of it any more
            if this in self._open:
                self._break(_told([this.call], error))
            raise
        if this.error is not None:
            raise this.error

    def _is_done_within(self, this: _Open, time_s: float) -> bool:
        return is_reached_napping(lambda: this not in self._open, time_s)

    @contextmanager
    def _starting(self, op: str, label: str, tensor: Tensor) -> Iterator[Call]:
        """A new call. Whatever keeps it from being started inside ends the group: the others take part in it."""
        check_process(self._process, f"{op} {label}")
        self._refuse_after_error(f"{op} {label}")
        call = self._log.note(op, label, tensor)
        try:
            self._journal.start(call)
            yield call
        except BaseException as error:
            if self._broken is None:
                self._break(_told([call], error))
            raise

    def _refuse_after_error(self, what: str) -> None:
        if self._broken is not None:
            raise StateError(f"{what}: this group has ended with an error. Restart the ranks.") from self._broken

    def _start(self, call: Call, *steps: _Step) -> Pending:
        this = _Open(call, tuple(map(in_mode_of_caller, steps)))
        with LOCK:  # else another thread could close the group between the two
            self._refuse_after_error(f"{call.op} {call.label}")  # again: another thread's step may have failed
            note_open(self)
            self._open.append(this)
        self.advance()
        return _Pending(self, this)


class _Pending:
    """See `Pending`."""

    __slots__ = ("_group", "_this")

    def __init__(self, group: HierarchicalCollectives, this: _Open) -> None:
        self._group, self._this = group, this

    def wait(self) -> None:
        """See `Pending.wait`."""
        self._group.wait_for(self._this)


class _Then:
    """A pending call, and what is to be done once it is."""

    __slots__ = ("_act", "_pending")

    def __init__(self, pending: Polled, act: Callable[[], object]) -> None:
        self._pending, self._act = pending, in_mode_of_caller(act)

    def poll(self) -> bool:
        if not _is_done([self._pending]):
            return False
        self.wait()
        return True

    def wait(self) -> None:
        self._pending.wait()
        self._act()


def _told(calls: Sequence[Call], error: BaseException) -> ZcoreError:
    """What whoever waits for `calls`, here or elsewhere, is told of `error`."""
    if isinstance(error, ZcoreError):
        return error
    names, is_one = ", ".join(map(str, calls)), len(calls) == 1
    if isinstance(error, Exception):
        return CollectiveError(f"{names} failed: {type(error).__name__}: {error}. Mend it, and restart all ranks.")
    verb, result = ("was", "its result is") if is_one else ("were", "their results are")
    return CollectiveError(f"{names} {verb} interrupted, and {result} undefined. Restart.")


def _is_done(pending: Sequence[Polled]) -> bool:
    return all(each.poll() for each in pending)


def _nothing() -> Sequence[Polled]:
    return []
