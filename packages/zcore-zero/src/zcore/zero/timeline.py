"""What one optimizer step did, and when: transfers, how long the program waited for them and why, memory that lived.

    marks      forward | gather h.1, ahead | wait h.0 ... come | wait h.1, come | backward | reduce h.1 | ... | step
    transfers  each gather and reduction with its start, the moment it was needed, and the end of the wait for it

`Recorder` is told of moments while a step runs; a `Timeline` is made of them afterwards, and is pure. Times are this
process's: on a GPU a wait orders streams and takes no time here; torch.profiler shows what the device does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from zcore.core.quantities import shown_bytes
from zcore.core.tables import Table, draw_tables, shown_seconds, write_tables
from zcore.zero.buffer import Ledger

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Kind", "Mark", "Recorder", "Timeline", "Transfer"]

SHOWN_TRANSFERS = 40


class Kind(Enum):
    """What a moment is of."""

    PHASE = "phase"  # the program's next one begins
    START = "start"  # of a transfer
    NEED = "need"  # the program begins to wait for it
    COME = "come"  # and has it
    FREE = "free"  # gathered memory is given back


@dataclass(frozen=True, slots=True)
class Mark:
    """One moment."""

    at_ns: int
    kind: Kind
    name: str  # of a phase, or of a bucket
    transfer: str  # "gather", "reduce" or nothing
    why: str
    live_bytes: int  # of whole buckets


class Recorder:
    """Takes moments of the step under way; costs about a microsecond for each."""

    def __init__(self, ledger: Ledger, *, step: int) -> None:
        self._ledger = ledger
        self.step = step
        self.marks: list[Mark] = []

    def note(self, kind: Kind, name: str, *, transfer: str = "", why: str = "", at_ns: int = 0) -> None:
        """It happens now, or has at `at_ns` of perf_counter_ns."""
        self.marks.append(Mark(at_ns or perf_counter_ns(), kind, name, transfer, why, self._ledger.live_bytes))


@dataclass(frozen=True, slots=True)
class Transfer:
    """A gather or a reduction of one bucket. Times are seconds since the step began."""

    kind: str  # "gather" or "reduce"
    bucket: str
    payload_bytes: int
    started_s: float
    needed_s: float | None  # when the program began to wait for it; None if it never did in this step
    done_s: float | None
    why: str  # it started when it did, and who waited

    @property
    def wait_s(self) -> float:
        """How long the program waited."""
        return 0.0 if self.needed_s is None or self.done_s is None else self.done_s - self.needed_s

    @property
    def ahead_s(self) -> float:
        """How long before it was needed it had started."""
        return 0.0 if self.needed_s is None else self.needed_s - self.started_s


@dataclass(frozen=True, slots=True)
class Timeline:
    """One optimizer step of this rank. Print it, give it to Rich, or take `to_dict()`; `save_trace` draws it."""

    step: int
    rank: int
    duration_s: float
    phases: tuple[tuple[str, float, float], ...]  # name, begin and end in seconds since the step began
    transfers: tuple[Transfer, ...]  # in the order in which they started
    memory: tuple[tuple[float, int], ...]  # bytes of whole buckets that were gathered, each time it changed

    @classmethod
    def of(cls, marks: Sequence[Mark], *, step: int, rank: int, sizes: Mapping[str, int]) -> "Timeline":
        """From the marks of a step, the last of which is its end."""
        start_ns, end_ns = marks[0].at_ns, marks[-1].at_ns

        def seconds(mark: Mark) -> float:
            return (mark.at_ns - start_ns) / 1e9

        begun = [mark for mark in marks if mark.kind is Kind.PHASE]
        ends = [*map(seconds, begun[1:]), (end_ns - start_ns) / 1e9]
        phases = tuple(
            (mark.name, seconds(mark), end) for mark, end in zip(begun, ends, strict=True) if end > seconds(mark)
        )
        memory = [(seconds(mark), mark.live_bytes) for mark in marks]
        changes = [each for each, before in zip(memory[1:], memory, strict=False) if each[1] != before[1]]
        return cls(
            step, rank, (end_ns - start_ns) / 1e9, phases, _transfers(marks, seconds, sizes), (memory[0], *changes)
        )

    @property
    def peak_bytes(self) -> int:
        """The most that was gathered at once."""
        return max(live for _, live in self.memory)

    def seconds_in(self, phase: str) -> float:
        """How long the program was in a phase, over all micro-batches of the step."""
        return sum(end - begin for name, begin, end in self.phases if name == phase)

    def waited_s(self, kind: str) -> float:
        """How long the program waited for transfers of a kind, "gather" or "reduce"."""
        return sum(each.wait_s for each in self.transfers if each.kind == kind)

    def summary(self) -> str:
        """The step in one line."""
        names = list(dict.fromkeys(name for name, _, _ in self.phases))
        parts = ", ".join(f"{name} {shown_seconds(self.seconds_in(name))}" for name in names)
        return (
            f"step {self.step} on rank {self.rank} took {shown_seconds(self.duration_s)}: {parts}; of it waiting for "
            f"gathers {shown_seconds(self.waited_s('gather'))}, for reductions "
            f"{shown_seconds(self.waited_s('reduce'))}; at most {shown_bytes(self.peak_bytes)} gathered at once"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        return write_tables(_tables(self))

    def __rich__(self) -> "RenderableType":
        return draw_tables(_tables(self))

    def save_trace(self, path: str | Path) -> Path:
        """Write it as a Trace Event file, which chrome://tracing and ui.perfetto.dev open."""
        path = Path(path)
        path.write_text(json.dumps(_trace_of(self)))
        return path


def _transfers(
    marks: Sequence[Mark], seconds: Callable[[Mark], float], sizes: Mapping[str, int]
) -> tuple[Transfer, ...]:
    found: list[Transfer] = []
    under_way: dict[tuple[str, str], int] = {}  # a bucket has one of a kind at a time
    needed: dict[tuple[str, str], Mark] = {}
    for mark in marks:
        key = mark.transfer, mark.name
        if mark.kind is Kind.START:
            under_way[key] = len(found)
            size = sizes.get(mark.name, 0)
            found.append(Transfer(mark.transfer, mark.name, size, seconds(mark), None, None, mark.why))
        elif mark.kind is Kind.NEED:
            needed[key] = mark
        elif mark.kind is Kind.COME and key in under_way:
            index, begun = under_way.pop(key), needed[key]
            why = "; ".join(filter(None, (found[index].why, begun.why)))
            found[index] = replace(found[index], needed_s=seconds(begun), done_s=seconds(mark), why=why)
    return tuple(found)


def _tables(timeline: Timeline) -> list[Table]:
    transfers = timeline.transfers
    shown = set(sorted(range(len(transfers)), key=lambda index: -transfers[index].wait_s)[:SHOWN_TRANSFERS])
    rows = [
        (
            f"{each.started_s * 1e3:.1f}",
            each.kind,
            each.bucket,
            shown_bytes(each.payload_bytes),
            shown_seconds(each.ahead_s) if each.needed_s is not None else "-",
            shown_seconds(each.wait_s) if each.needed_s is not None else "-",
            each.why,
        )
        for index, each in enumerate(transfers)
        if index in shown
    ]
    left_out = len(transfers) - len(rows)
    notes = (f"and {left_out} more, with shorter waits",) * bool(left_out)
    if not transfers:
        notes = ("Nothing was gathered or reduced in buckets: every rank holds all of it.",)
    columns = ("at ms", "what", "bucket", "size", "ahead", "waited", "why")
    return [Table(timeline.summary()), Table("", columns, tuple(rows), words=("what", "bucket", "why"), notes=notes)]


def _trace_of(timeline: Timeline) -> dict[str, Any]:
    tracks = {"program": 1, "waits": 2, "gather": 3, "reduce": 4}
    place = {"pid": timeline.rank}
    events: list[dict[str, Any]] = [
        {"ph": "M", **place, "tid": 0, "name": "process_name", "args": {"name": f"rank {timeline.rank}"}}
    ]
    for name, tid in tracks.items():
        events.append({"ph": "M", **place, "tid": tid, "name": "thread_name", "args": {"name": name}})

    def span(track: str, name: str, begin_s: float, end_s: float, **details: Any) -> None:
        times = {"ts": begin_s * 1e6, "dur": (end_s - begin_s) * 1e6}
        events.append({"ph": "X", **place, "tid": tracks[track], "name": name, **times, "args": details})

    for name, begin_s, end_s in timeline.phases:
        span("program", name, begin_s, end_s)
    for each in timeline.transfers:
        end_s = each.started_s if each.done_s is None else each.done_s
        span(each.kind, each.bucket, each.started_s, end_s, bytes=each.payload_bytes, why=each.why)
        if each.needed_s is not None and each.wait_s:
            span("waits", f"{each.kind} {each.bucket}", each.needed_s, end_s)
    for at_s, live in timeline.memory:
        events.append({"ph": "C", **place, "name": "gathered bytes", "ts": at_s * 1e6, "args": {"bytes": live}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
