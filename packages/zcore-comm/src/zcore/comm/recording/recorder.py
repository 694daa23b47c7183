"""Recordings of this process's collectives: what they took, in totals for ever and the last calls one by one.

    with record() as recording: ...
    print(recording.report(group))     every rank of the group calls it: counts, waiting, bandwidths, who comes last
    recording.save_trace("traces")     each rank a file, on its own

Recordings may overlap; each has every call that starts while it runs. A call is done when `wait()` returns, so one that
nobody waits for is counted and never timed.
"""

import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.distributed as dist

from zcore.comm.calls.flow import FLOW
from zcore.comm.calls.requests import DeferrableCollectives
from zcore.comm.calls.served import served_of
from zcore.comm.recording.chrome_trace import TRACE_FILE, trace_of
from zcore.comm.recording.comm_report import SYMMETRIC_OPS, CommReport, build_report
from zcore.comm.recording.recorded import LISTENERS, Recorded
from zcore.comm.recording.totals import CallRecord, Group, Kind, RankTotals, Totals
from zcore.comm.texts import exchange_texts
from zcore.core.collectives import Collectives
from zcore.core.errors import ConfigError, nearest
from zcore.core.events import log_visibly
from zcore.core.quantities import shown_bytes
from zcore.core.recording import OPS
from zcore.core.tables import shown_seconds

__all__ = ["Recording", "record", "wall_offset_s"]

logger = logging.getLogger(__name__)

RING_CALLS = 16_384  # single calls kept for the trace: about 6 MiB
COMPARED_CALLS = 1_000  # of each group, the last ones, are compared between ranks: some 30 kB to send from each
MAX_LABELS = 4_096  # that are told apart; a label that counts steps would fill the memory
TOLD_LABELS = 64  # by each rank in a report: those for which it waited longest
OTHER_LABELS = "(further labels)"
CPU = torch.device("cpu")


class Recording:
    """What this process's collectives took, from `record(...)` to `stop()`; used in a `with` it stops at the end."""

    def __init__(self, *, ops: frozenset[str], verbose: bool, names_callers: bool, clock: Callable[[], float]) -> None:
        self.names_callers = names_callers
        self._ops = ops
        self._verbose = verbose
        self._clock = clock
        self._clock_offset_s = wall_offset_s()
        self._lock = threading.Lock()  # autograd's threads call, too
        self._ended_s: float | None = None  # None while it runs
        self._forget()

    def _forget(self) -> None:
        self._began_s = self._clock()
        self._kinds: dict[Kind, Totals] = {}
        self._labels: dict[tuple[str, str], Totals] = {}
        self._waits: dict[Group, deque[tuple[int, float]]] = {}
        self._ring: deque[CallRecord] = deque(maxlen=RING_CALLS)

    @property
    def calls(self) -> tuple[CallRecord, ...]:
        """The last `RING_CALLS` calls in the order of their starts; one under way has no end yet."""
        with self._lock:
            return tuple(self._ring)

    def stop(self) -> None:
        """Record no further call; those under way may still end. Stopping twice is allowed."""
        if self in LISTENERS:
            LISTENERS.remove(self)
            self._ended_s = self._clock()

    def clear(self) -> None:
        """Forget what was recorded so far, calls under way included, as after the first steps."""
        with self._lock:
            self._forget()
            self._ended_s = None if self._ended_s is None else self._began_s

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def takes(self, op: str) -> bool:
        """Whether calls of `op` are recorded."""
        return op in self._ops

    def note_start(self, record: CallRecord) -> None:
        """A call starts."""
        with self._lock:
            for totals in self._totals_of(record):
                totals.add_start(record)
            self._ring.append(record)

    def note_done(self, record: CallRecord) -> None:
        """A call whose start was noted is done."""
        assert record.wait_began_s is not None and record.done_s is not None
        with self._lock:
            if record.started_s >= self._began_s:  # else its start is forgotten
                for totals in self._totals_of(record):
                    totals.add_done(record)
                if record.op in SYMMETRIC_OPS:
                    waits = self._waits.setdefault(record.group, deque(maxlen=COMPARED_CALLS))
                    waits.append((record.index, record.done_s - record.wait_began_s))
        if self._verbose and _global_rank() == 0:
            log_visibly(logger, "%s", _describe(record))

    def _totals_of(self, record: CallRecord) -> tuple[Totals, Totals]:
        label = record.op, record.full_label
        if label not in self._labels and len(self._labels) >= MAX_LABELS:
            label = record.op, OTHER_LABELS
        return self._kinds.setdefault(record.kind, Totals()), self._labels.setdefault(label, Totals())

    def report(self, group: dist.ProcessGroup | Collectives | None = None, *, device: torch.device = CPU) -> CommReport:
        """What the ranks of `group` have recorded so far, the same on each; every one calls it.

        Without a group what this rank has, and no other rank is asked. device: of tensors that `Collectives` move; of
        a process group it is known. The report's own calls are not recorded.
        """
        with self._lock:
            by_wait = sorted(self._labels.items(), key=lambda item: -item[1].wait_s)
            own = RankTotals(
                global_rank=_global_rank(),
                host=socket.gethostname(),
                elapsed_s=(self._clock() if self._ended_s is None else self._ended_s) - self._began_s,
                kinds=self._kinds,
                labels=dict(by_wait[:TOLD_LABELS]),
                waits={each: dict(waits) for each, waits in self._waits.items()},
            ).to_plain()
        if group is None:
            return build_report([RankTotals.from_plain(own)])
        if isinstance(group, dist.ProcessGroup):
            served = served_of(group)
            group, device = served.collectives, served.device
        texts = _exchange(json.dumps(own).encode(), group, device)
        return build_report([RankTotals.from_plain(json.loads(text)) for text in texts])

    def save_trace(self, folder: str | Path) -> Path:
        """Write the last calls of this rank to `comms.rank<N>.json` in `folder`; see chrome_trace.py."""
        global_rank = _global_rank()
        trace = trace_of(
            self.calls, global_rank=global_rank, host=socket.gethostname(), clock_offset_s=self._clock_offset_s
        )
        path = Path(folder) / TRACE_FILE.format(rank=global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trace), encoding="ascii")
        return path


def record(
    *,
    ops: Collection[str] | None = None,
    verbose: bool = False,
    names_callers: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Recording:
    """Record every collective that this process starts from now on, until `stop()` or the end of a `with`.

    ops: some of `zcore.core.recording.OPS`; None: all. verbose: each call is logged at INFO on global rank 0 when it is
    done. names_callers: labels are told apart by the function that called, too. clock: in seconds; that of the groups.

    Raises ConfigError for an op that there is not.
    """
    for op in ops or ():
        if op not in OPS:
            near = nearest(op, OPS)
            advice = f" Did you mean `{near}`?" if near else ""
            raise ConfigError(f"Cannot record `{op}`; expected some of {', '.join(OPS)}.{advice}")
    recording = Recording(
        ops=frozenset(OPS if ops is None else ops), verbose=verbose, names_callers=names_callers, clock=clock
    )
    LISTENERS.append(recording)
    return recording


def wall_offset_s() -> float:
    """What to add to time.monotonic to have the time of day: of a few readings the one that took least, within 1 us."""
    readings = []
    for _ in range(8):
        before, now, after = time.monotonic(), time.time(), time.monotonic()
        readings.append((after - before, now - (before + after) / 2))
    return min(readings)[1]


def _describe(record: CallRecord) -> str:
    assert record.wait_began_s is not None and record.done_s is not None
    payload = f"{shown_bytes(record.payload_bytes)} of {record.dtype}"
    return (
        f"{record.op} {record.full_label} (#{record.index} of {record.group.name}, {payload}) by {record.algorithm}: "
        f"waited {shown_seconds(record.done_s - record.wait_began_s)}, done "
        f"{shown_seconds(record.done_s - record.started_s)} after its start"
    )


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _exchange(text: bytes, group: Collectives, device: torch.device) -> list[bytes]:
    FLOW.start_all()  # what some ranks hold back, others may have started
    served = group
    while isinstance(served, DeferrableCollectives | Recorded):
        served = served.inner  # the exchange is no part of what is recorded
    return exchange_texts(text, served, device=device, label="report on collectives")
