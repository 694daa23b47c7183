"""A group with its calls seen by whoever records: `Recorded` is put around a group once, for good.

    caller --all_gather(...)--> Recorded --> the group that serves        nobody records: one look at an empty list
                                   |
                                   `--CallRecord--> every Listener in `LISTENERS`, at the start and when it is done

Labels are passed on as they are. Seconds are those of the host: on CUDA, how long the program was held, not how long
the device was.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from zcore.comm.around import Around
from zcore.comm.calls.requests import StartsTogether, Together
from zcore.comm.recording.totals import CallRecord, Group
from zcore.core import compat
from zcore.core.collectives import Collectives, Pending

__all__ = ["LISTENERS", "Listener", "NamesAlgorithm", "Recorded"]


class Listener(Protocol):
    """Who is told of calls, from several threads."""

    @property
    def names_callers(self) -> bool:
        """Whether it wants to know which function called."""
        ...

    def takes(self, op: str) -> bool:
        """Whether it wants to know of calls of `op`."""
        ...

    def note_start(self, record: CallRecord) -> None:
        """A call starts."""
        ...

    def note_done(self, record: CallRecord) -> None:
        """A call whose start was noted is done."""
        ...


LISTENERS: list[Listener] = []  # of this process


@runtime_checkable
class NamesAlgorithm(Protocol):
    """What a group may have beyond `Collectives`: it tells how it serves a call."""

    def algorithm_for(self, op: str, payload_bytes: int) -> str:
        """In a word or two, the same on every rank: "shared memory", "pairwise exchange"."""
        ...


class Recorded(Around):
    """`inner`, which serves `group`, with its calls seen by whoever records. `name` is what reports call the group."""

    def __init__(
        self, inner: Collectives, group: dist.ProcessGroup, *, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(inner)
        self._group = Group(name, tuple(dist.get_process_group_ranks(group)))
        self._otherwise = f"torch {compat.backend_name(group)}"
        self._clock = clock
        self._index = -1  # of the last collective; sends and receives do not count, as not all ranks make them

    def algorithm_for(self, op: str, payload_bytes: int) -> str:
        """What `inner` says; the backend's name if it says nothing."""
        if isinstance(self.inner, NamesAlgorithm):
            return self.inner.algorithm_for(op, payload_bytes)
        return self._otherwise

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_gather`."""
        start = partial(self.inner.all_gather, output, input, label=label)
        return self._record("all_gather", label, [output], start)

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.reduce_scatter`."""
        start = partial(self.inner.reduce_scatter, output, input, label=label)
        return self._record("reduce_scatter", label, [input], start)

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_reduce`."""
        return self._record("all_reduce", label, [tensor], partial(self.inner.all_reduce, tensor, label=label))

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_to_all`."""
        start = partial(self.inner.all_to_all, output, input, label=label)
        return self._record("all_to_all", label, [input], start)

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.broadcast`."""
        return self._record("broadcast", label, [tensor], partial(self.inner.broadcast, tensor, src=src, label=label))

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`."""
        return self._record("send", label, [tensor], partial(self.inner.send, tensor, dst=dst, label=label))

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`."""
        return self._record("recv", label, [tensor], partial(self.inner.recv, tensor, src=src, label=label))

    def starts_together(self, op: str) -> bool:
        """See `StartsTogether`: whether `inner` does so."""
        return isinstance(self.inner, StartsTogether) and self.inner.starts_together(op)

    def start_together(self, together: Together) -> Pending:
        """See `StartsTogether`; recorded as one call."""
        assert isinstance(self.inner, StartsTogether)
        larger = [part.larger for part in together.parts]
        return self._record(together.op, together.label, larger, partial(self.inner.start_together, together))

    def _record(self, op: str, label: str, larger: Sequence[Tensor], start: Callable[[], Pending]) -> Pending:
        if op not in ("send", "recv"):
            self._index += 1
        listeners = tuple(each for each in tuple(LISTENERS) if each.takes(op)) if LISTENERS else ()
        if not listeners:
            return start()
        payload_bytes = sum(each.numel() * each.element_size() for each in larger)
        record = CallRecord(
            group=self._group,
            op=op,
            label=label,
            caller=_caller() if any(each.names_callers for each in listeners) else "",
            dtype=str(larger[0].dtype).removeprefix("torch."),
            payload_bytes=payload_bytes,
            algorithm=self.algorithm_for(op, payload_bytes),
            index=self._index,
            started_s=self._clock(),
        )
        for each in listeners:
            each.note_start(record)
        pending = start()
        record.issued_s = self._clock()
        return _Timed(pending, record, listeners, self._clock)


class _Timed:
    """A pending call whose first `wait` is timed. One that raises stays without an end."""

    __slots__ = ("_clock", "_listeners", "_pending", "_record")

    def __init__(
        self,
        pending: Pending,
        record: CallRecord,
        listeners: tuple[Listener, ...],
        clock: Callable[[], float],
    ) -> None:
        self._pending, self._record, self._listeners, self._clock = pending, record, listeners, clock

    def wait(self) -> None:
        """See `Pending.wait`."""
        listeners, self._listeners = self._listeners, ()
        if not listeners:
            self._pending.wait()
            return
        record = self._record
        record.wait_began_s = self._clock()
        self._pending.wait()
        record.done_s = self._clock()
        for each in listeners:
            each.note_done(record)


def _caller() -> str:
    """The function outside of this wheel that made the call."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("zcore.comm."):
        frame = frame.f_back
    return frame.f_code.co_qualname
