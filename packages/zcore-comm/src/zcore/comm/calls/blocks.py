"""Blocks in which collectives are collected; at the end of a block small ones of one kind join, and all start.

    all_reduce      |a a a|b b|                     behind each other
    broadcast       |a a a|b b|
    all_gather      |a0 b0|a1 b1|                   what a rank sends lies together; a's output is a0 a1
    reduce_scatter  |a0 b0|a1 b1|                   what goes to a rank lies together; a's input is a0 a1
    all_to_all      |a0 b0|a1 b1|                   both

Sums have the core's order over ranks, wherever an element lies, so joined ones are equal to single ones to the bit.
What joins is copied twice, into memory of the group's and out of it; but where the backend itself starts several calls
as one, as NCCL does, each stays where it lies. Nothing starts before the end of the block, so
nobody may wait inside it, and no call of a block may need what another one brings. joins.py decides who joins whom.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto
from functools import partial

import torch
import torch.distributed as dist

from zcore.comm.calls.joins import JoinCall, plan_joins
from zcore.comm.calls.requests import (
    DeferrableCollectives,
    Request,
    StartsTogether,
    Together,
    joined_label,
    starter_of,
)
from zcore.comm.calls.served import collectives_of
from zcore.comm.calls.work import Work
from zcore.core.collectives import Collectives, Pending
from zcore.core.errors import LayoutError, StateError

__all__ = ["BUDGET_BYTES", "Block", "coalescing", "open_block"]

BUDGET_BYTES = 1 << 20  # 256 x 16 KiB, 2 ranks: 18 ms, apart 45; over gloo 27, apart 134. More brings no more

# Which sides of a call hold a part for each rank: (output, input).
BY_RANK = {
    "all_gather": (True, False),
    "reduce_scatter": (False, True),
    "all_to_all": (True, True),
    "all_reduce": (False, False),
    "broadcast": (False, False),
}


class BlockState(Enum):
    """What a block does with calls."""

    OPEN = auto()  # collects them
    STARTED = auto()  # has started them; later ones go through
    ABANDONED = auto()  # was left by an exception before it had started all; later ones go through


class Block:
    """The calls made to one group inside a `with`."""

    def __init__(self, group: Collectives, *, budget_bytes: int) -> None:
        plan_joins([], budget_bytes)  # refuses a budget before anything is collected
        self._group = group
        self._start = starter_of(group)
        self._budget_bytes = budget_bytes
        self._members: list[_Member] = []
        self._at_end: list[Callable[[], object]] = []
        self.state = BlockState.OPEN
        self.collectives = DeferrableCollectives(group, start=self._collect, flush=_nothing)

    def at_end(self, act: Callable[[], object]) -> None:
        """Call `act` when everything has started."""
        self._at_end.append(act)

    def start(self) -> None:
        """Join what joins, start everything, and do what was left for the end."""
        self.state = BlockState.ABANDONED  # until everything has started
        requests = [member.request for member in self._members]
        _refuse_overlap(requests)
        size = self._group.size
        calls = [JoinCall(_kind(each, size), each.payload_bytes, each.priority) for each in requests]
        for indices in plan_joins(calls, self._budget_bytes):
            members = [self._members[index] for index in indices]
            pending = self._start_joined([each.request for each in members])
            for member in members:
                member.pending = pending
        self.state = BlockState.STARTED
        acts, self._at_end = self._at_end, []
        self._members.clear()
        for act in acts:
            act()

    def abandon(self) -> None:
        """Start nothing of what was collected."""
        self.state = BlockState.ABANDONED
        self._members.clear()
        self._at_end.clear()

    def _collect(self, request: Request | Together) -> Pending:
        if self.state is not BlockState.OPEN:
            return self._start(request)
        if isinstance(request, Together):  # of a block inside this one
            return _All([self._collect(part) for part in request.parts])
        member = _Member(self, request)
        self._members.append(member)
        return member

    def _start_joined(self, requests: Sequence[Request]) -> Pending:
        if len(requests) == 1:
            return self._start(requests[0])
        if isinstance(self._group, StartsTogether) and self._group.starts_together(requests[0].op):
            return self._start(Together(tuple(requests)))
        joined = _pack(requests, self._group)
        unpack = partial(_unpack, joined, requests, self._group.size)
        return Work(self._start(joined), unpack, device=joined.output.device)


class _Member:
    """A call of a block; see `Pending`."""

    __slots__ = ("_block", "pending", "request")

    def __init__(self, block: Block, request: Request) -> None:
        self._block = block
        self.request = request
        self.pending: Pending | None = None

    def wait(self) -> None:
        """See `Pending.wait`. Raises StateError where the block has not started the call."""
        if self.pending is None:
            reason = (
                "its block was left by an exception, so it was never started. Handle that one."
                if self._block.state is BlockState.ABANDONED
                else "it starts when its block of `coalescing` ends. Wait after the block; if what follows in it needs "
                "the result, end the block before."
            )
            raise StateError(f"{self.request.op} {self.request.label} cannot be waited for: {reason}")
        self.pending.wait()


class _All:
    """Several calls as one; see `Pending`."""

    __slots__ = ("_pending",)

    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = pending

    def wait(self) -> None:
        """See `Pending.wait`."""
        for each in self._pending:
            each.wait()


_open: ContextVar[Mapping[Collectives, Block]] = ContextVar("zcore.comm.calls.blocks", default={})  # noqa: B039 - not mutated


def open_block(group: Collectives) -> Block | None:
    """The block that collects calls to `group` now, if there is one."""
    return _open.get().get(group)


@contextmanager
def coalescing(
    group: dist.ProcessGroup | Collectives | None = None, *, budget_bytes: int = BUDGET_BYTES
) -> Iterator[Collectives]:
    """Collect the calls made to `group` in a `with` block; at its end small ones join, and all start by priority.

    group: a process group (None: the default one), whose calls through the functions of `zcore.comm` are collected; or
    any `Collectives`. The block's own `Collectives` are what `with ... as` gives: calls to it are collected, too.
    budget_bytes: calls of one op, dtype and source join up to so many bytes (of the larger side); larger ones go alone.
    Every rank makes the same calls in the block, with the same priorities.

    Inside the block nobody waits for a call of it, and no call uses what another one writes. A function called without
    `async_op` returns at once, and its result is there when the block has ended. If an exception leaves the block,
    nothing of it was started.

    Raises ConfigError for a budget below 1; at the end of the block LayoutError where one call writes what another one
    reads or writes.
    """
    served = collectives_of(group) if group is None or isinstance(group, dist.ProcessGroup) else group
    block = Block(served, budget_bytes=budget_bytes)
    token = _open.set({**_open.get(), served: block})
    try:
        yield block.collectives
    except BaseException:
        block.abandon()
        raise
    finally:
        _open.reset(token)
    block.start()


def _kind(request: Request, size: int) -> Hashable:
    """What joined calls have in common; None for one that goes alone.

    That is a gather into a buffer without memory, which its ranks may come to hold together, and a call whose sides do
    not match, which the group itself refuses.
    """
    output, numel = request.output, request.input.numel()
    output_slots, input_slots = (size if is_by_rank else 1 for is_by_rank in BY_RANK[request.op])
    is_freed = bool(output.numel()) and not output.untyped_storage().nbytes()
    if is_freed or numel % input_slots or output.numel() * input_slots != numel * output_slots:
        return None
    return request.op, output.dtype, request.input.dtype, output.device, request.src


def _pack(requests: Sequence[Request], group: Collectives) -> Request:
    """One call for all of `requests`, with their inputs in place."""
    first = requests[0]
    output_by_rank, input_by_rank = BY_RANK[first.op]
    slots = group.size if input_by_rank else 1
    numel = sum(each.input.numel() for each in requests)
    sent = group.empty(numel, dtype=first.input.dtype, device=first.input.device)
    if first.op != "broadcast" or group.rank == first.src:
        parts, _ = _columns([each.input for each in requests], slots)
        torch.cat(parts, dim=1, out=_bytes(sent).view(slots, -1))
    received = sent
    if first.output is not first.input:
        numel = numel // slots * (group.size if output_by_rank else 1)
        received = group.empty(numel, dtype=first.output.dtype, device=first.output.device)
    return Request(first.op, received, sent, joined_label(requests), first.priority, first.src)


def _unpack(joined: Request, requests: Sequence[Request], size: int) -> None:
    """Put what the call for all of `requests` brought into their outputs."""
    output_by_rank, _ = BY_RANK[joined.op]
    slots = size if output_by_rank else 1
    parts, widths = _columns([each.output for each in requests], slots)
    torch.split_with_sizes_copy(_bytes(joined.output).view(slots, -1), widths, dim=1, out=parts)
    for each in (joined.output, joined.input):
        if each.is_cuda:  # it goes back to the stream on which it was born, which may be another one than waits here
            each.record_stream(torch.cuda.current_stream(each.device))


def _columns(tensors: Sequence[torch.Tensor], slots: int) -> tuple[list[torch.Tensor], list[int]]:
    """Each tensor's bytes, a row for each slot; and the rows' lengths."""
    widths = [tensor.numel() * tensor.element_size() // slots for tensor in tensors]
    return [_bytes(tensor).view(slots, width) for tensor, width in zip(tensors, widths, strict=True)], widths


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def _refuse_overlap(requests: Sequence[Request]) -> None:
    """Raise LayoutError if one call writes memory that another one reads or writes: the block may turn them round."""
    spans = sorted((span for each in requests for span in _spans(each)), key=lambda span: span[:2])
    seen: tuple[int, Request | None] = 0, None  # how far memory is used so far, and by whom
    written: tuple[int, Request | None] = 0, None
    for low, high, is_written, request in spans:
        end, other = seen if is_written else written
        if low < end and other is not None:
            raise LayoutError(
                f"{other.op} {other.label} and {request.op} {request.label} use the same memory, and one of them "
                "writes it. Calls of one block start in any order: put the later one behind it, or give it a copy."
            )
        seen = max(seen, (high, request), key=lambda each: each[0])
        if is_written:
            written = max(written, (high, request), key=lambda each: each[0])


def _spans(request: Request) -> list[tuple[int, int, bool, Request]]:
    """The addresses that a call uses, and whether it writes them; one span where its sides overlap."""
    written, read = _span(request.output), _span(request.input)
    if written[0] < read[1] and read[0] < written[1]:
        return [(min(written[0], read[0]), max(written[1], read[1]), True, request)]
    spans = [(*written, True, request), (*read, False, request)]
    return [span for span in spans if span[0] < span[1]]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.numel() or not tensor.untyped_storage().nbytes():
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _nothing() -> None:
    """What a block does before something is sent or received: that goes its own way."""
