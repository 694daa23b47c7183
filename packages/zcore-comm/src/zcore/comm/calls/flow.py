"""A limit on the bytes in flight, over several groups: calls beyond it are held back, and start by priority.

    limit 100 MiB        in flight                held back                                    order of starts
    reduce_scatter 80    rs 80
    reduce_scatter 60    rs 80                    dp: rs 60
    reduce_scatter 40    rs 80                    dp: rs 60, rs 40
    all_gather 30        rs 80                    dp: rs 60, rs 40    twin: ag 30
    wait for any         rs 80, ag 30, rs 60, rs 40                                            ag 30, rs 60, rs 40

A call is in flight from its start until somebody has waited for it. Within a group the order of starts stays that of
the calls, or ranks would no longer match; what is urgent takes along what stands before it.

Any `wait` first starts everything that is held back, limit or not. Were it to start only its own call, a rank that
waits for A while it holds B back, and another that waits for B while it holds A, would wait for each other for ever,
though each had called both. So the limit is one on what runs ahead of the waits: it bounds what a backward pass may
start before the step begins to collect, and lets gathers overtake sums.
"""

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from zcore.comm.calls.requests import DeferrableCollectives, Request, Start, Together, starter_of
from zcore.comm.progress import in_mode_of_caller
from zcore.core import compat
from zcore.core.collectives import Collectives, Pending
from zcore.core.errors import CollectiveError, ConfigError, StateError

__all__ = ["FLOW", "Flow", "choose_next", "limit_in_flight"]


def choose_next(held: Sequence[tuple[Hashable, int]]) -> int:
    """Which of `held`, (group, priority) each and in the order of the calls, starts first.

    The first call of the group that holds the most urgent one; of equals the call that was made first.

    >>> choose_next([("dp", 1), ("dp", 1), ("twin", 0)])
    2
    >>> choose_next([("dp", 1), ("twin", 1), ("twin", 0)])  # starts in a group keep their order: 1 goes before 2
    1
    """
    first: dict[Hashable, int] = {}
    most_urgent: dict[Hashable, int] = {}
    for index, (group, priority) in enumerate(held):
        first.setdefault(group, index)
        most_urgent[group] = min(priority, most_urgent.get(group, priority))
    return min(first.values(), key=lambda index: (most_urgent[held[index][0]], index))


class _Line:
    """Calls of one group that were chosen to start, in that order, whichever threads chose them."""

    __slots__ = ("chosen", "interrupted", "lock", "start")

    def __init__(self, start: Start) -> None:
        self.start = start
        self.chosen: deque[_Call] = deque()
        self.interrupted = ""  # the call whose start was: it may not count here, and counts for the others
        self.lock = threading.RLock()  # held while a call starts, which may wait for other ranks

    def begin_all(self) -> None:
        """Start what has been chosen."""
        with self.lock:
            while self.chosen:
                self.begin_first()

    def begin_first(self) -> None:
        """Start the first of what has been chosen; an interrupt leaves it in its place, or ends it."""
        self.chosen[0]._begin()
        self.chosen.popleft()


class _Call:
    """A call under a limit: held back (with `_request`), then in flight until somebody has waited for it."""

    __slots__ = (
        "_flow",
        "_pending",
        "_request",
        "_start",
        "error",
        "in_flight_bytes",
        "is_given_up",
        "is_on_cpu",
        "line",
        "num_bytes",
        "priority",
        "thread",
    )

    def __init__(self, flow: "Flow", line: _Line, request: Request | Together) -> None:
        self._flow = flow
        self.line = line
        self.thread = threading.get_ident()  # that made it
        part = request.parts[0] if isinstance(request, Together) else request
        self.is_on_cpu = part.output.device.type == "cpu"
        self.num_bytes = request.payload_bytes
        self.priority = request.priority
        self.in_flight_bytes = 0
        self.is_given_up = False  # nobody has got it: its tensors may be something else by now
        self._start = in_mode_of_caller(line.start)
        self._request: Request | Together | None = request
        self._pending: Pending | None = None
        self.error: Exception | None = None  # that ended it, to be raised by every wait for it

    def begin(self) -> None:
        """Start what was chosen, behind what was chosen of its group before; no effect on what has been started."""
        with self.line.lock:
            while self._request is not None:
                self.line.begin_first()

    def _begin(self) -> None:
        """Perhaps in somebody else's wait: what goes wrong is kept for this call's own. Once, however often called."""
        request = self._request
        if request is None:
            return
        try:
            if self.is_given_up or self.line.interrupted:
                raise self._not_to_start(f"{request.op} {request.label}")
            with _named(request):
                self._pending = self._start(request)
        except Exception as error:  # noqa: BLE001 - raised by `wait`, or by the call itself
            self.error = error
        except BaseException:
            self.line.interrupted = f"{request.op} {request.label} was interrupted when it was to start"
            self.error = CollectiveError(f"{self.line.interrupted}.")
            raise
        finally:
            self._request = None
            if self.error is not None:
                self._flow.count_out(self)

    def _not_to_start(self, name: str) -> StateError:
        self.line.interrupted = self.line.interrupted or f"{name} was interrupted before it was to start"
        return StateError(f"{name}: this group has ended, as {self.line.interrupted}. Restart the ranks.")

    def wait(self) -> None:
        """See `Pending.wait`; starts everything that the limit holds back."""
        self._flow.start_all(aside=True)
        self.begin()  # another thread may have chosen it, and be about to start it
        self._flow.count_out(self)
        if self._pending is not None and self.error is None:
            try:
                self._pending.wait()  # each time: on CUDA it orders the stream that is the current one then
            except Exception as error:  # noqa: BLE001 - raised below, and again
                self.error = error
        if self.error is not None:
            raise self.error


def _named(request: Request | Together) -> AbstractContextManager[object]:
    """The call's name in a profile, as the core gives it; its microseconds are spent only where somebody looks."""
    if not compat.is_profiled():
        return nullcontext()
    return torch.profiler.record_function(f"zcore::{request.op} {request.label}")


class Flow:
    """Calls of several groups under one limit; `limit_bytes` None is no limit."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = _checked(limit_bytes)
        # A program may use groups from several threads, each group from one. Starts are chosen under this lock and
        # made without it: one that waits for other ranks is not to keep calls of another group from starting, which
        # these may be waiting for.
        self._lock = threading.RLock()
        self._held: list[_Call] = []  # in the order of the calls
        self._in_flight_bytes = 0

    @property
    def limit_bytes(self) -> int | None:
        """How many bytes may be in flight before calls are held back; None is no limit."""
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit_bytes: int | None) -> None:
        with self._lock:
            self._limit_bytes = _checked(limit_bytes)
            chosen = self._choose(self._limit_bytes)
        _begin(chosen)

    @property
    def in_flight_bytes(self) -> int:
        """Payload of the calls that have been started and not been waited for."""
        return self._in_flight_bytes

    @property
    def held_bytes(self) -> int:
        """Payload of the calls that are held back."""
        return sum(call.num_bytes for call in self._held)

    def around(self, group: Collectives) -> DeferrableCollectives:
        """The contract over `group`, with its calls under this limit. Once for each group."""
        line = _Line(starter_of(group))
        return DeferrableCollectives(group, start=partial(self._take, line), flush=partial(self._flush, line))

    def start_all(self, *, aside: bool = False) -> None:
        """Start everything that is held back. To be called before ranks wait for each other by other means.

        aside: other threads' calls are started by a thread of their own, and perhaps later than this returns.
        """
        with self._lock:
            chosen = self._choose(None)
        _begin(chosen, aside=aside)

    def _flush(self, line: _Line) -> None:
        """Start what is held back, and what another thread has chosen of this group and is about to start."""
        self.start_all(aside=True)
        line.begin_all()

    def count_out(self, call: _Call) -> None:
        """`call` is in flight no more; no effect on one that is not."""
        with self._lock:
            self._in_flight_bytes -= call.in_flight_bytes
            call.in_flight_bytes = 0

    def _take(self, line: _Line, request: Request | Together) -> _Call:
        call = _Call(self, line, request)
        try:
            with self._lock:
                self._held.append(call)
                chosen = self._choose(self._limit_bytes)
            _begin(chosen, aside=True)
        except BaseException:  # of an interrupt: nobody gets the call, so nobody would count it out
            call.is_given_up = True
            call.num_bytes = 0
            self.count_out(call)
            raise
        if call.error is not None:
            raise call.error
        return call

    def _choose(self, limit_bytes: int | None) -> list[_Call]:
        """What may start now, in its order; a call that is larger than the limit when nothing is in flight."""
        chosen: list[_Call] = []
        while self._held:
            index = choose_next([(call.line, call.priority) for call in self._held])
            total_bytes = self._in_flight_bytes + self._held[index].num_bytes
            if limit_bytes is not None and self._in_flight_bytes and total_bytes > limit_bytes:
                break
            call = self._held[index]
            call.line.chosen.append(call)  # first: an interrupt may leave it in both, but not in neither
            del self._held[index]
            self._in_flight_bytes = total_bytes
            call.in_flight_bytes = call.num_bytes
            chosen.append(call)
        return chosen


def _begin(chosen: Sequence[_Call], *, aside: bool = False) -> None:
    """Start this thread's own calls, and then those of others, or at the same time and `aside`.

    Starting one may wait for other ranks, whose threads may wait for a call of this one's. Not aside on accelerators:
    a call is ordered behind the current stream of the thread that starts it.
    """
    here = threading.get_ident()
    own = [call for call in chosen if call.thread == here]
    others = [call for call in chosen if call.thread != here]
    if others and aside and all(call.is_on_cpu for call in others):
        threading.Thread(target=_begin_each, args=(others,), name="zcore starts", daemon=True).start()
        others = []
    _begin_each([*own, *others])


def _begin_each(calls: Sequence[_Call]) -> None:
    for call in calls:
        call.begin()


def _checked(limit_bytes: int | None) -> int | None:
    if limit_bytes is not None and not (isinstance(limit_bytes, int) and limit_bytes >= 1):
        raise ConfigError(
            f"The limit on bytes in flight is {limit_bytes!r}; expected a number of bytes, 1 or more. "
            "None lifts it. A call that is larger than the limit still goes, alone."
        )
    return limit_bytes


FLOW = Flow()  # of the functions of zcore.comm in this process


def limit_in_flight(limit_bytes: int | None) -> None:
    """Hold back calls of `zcore.comm` beyond `limit_bytes` in flight, over all groups; None, the default, lifts it.

    Every rank sets the same limit, at the same place among its calls. What is held back starts by its `priority`
    (unless given, all_gather, broadcast and all_to_all before reductions) with the first `wait` of any call, or when
    the limit is lifted: lift it before ranks wait for each other by other means than `zcore.comm`.

    Raises ConfigError for what is no number, or below 1.
    """
    FLOW.limit_bytes = limit_bytes
