"""Recorded calls as a Trace Event file, which chrome://tracing and ui.perfetto.dev open. Pure, but for `join_traces`.

    rank 0            a process of the viewer
      dp gather       |all_gather layers.0 |           a track for each group; while calls of it overlap, further
                                     |wait|            ones below. Inside a call, when `wait()` held the program
      dp gather (2)         |all_gather layers.1 |

Times are microseconds of the day's clock: each rank adds to time.monotonic, which all processes of a host share, the
offset that it measured when recording began (`recorder.wall_offset_s`). Ranks of one host agree to about 1 us, ranks of
several hosts as well as their clocks are kept, by NTP usually to a millisecond.
"""

import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zcore.comm.recording.totals import CallRecord, Group
from zcore.core.errors import ConfigError

__all__ = ["TRACE_FILE", "join_traces", "plan_lanes", "trace_of"]

TRACE_FILE = "comms.rank{rank}.json"


def trace_of(records: Iterable[CallRecord], *, global_rank: int, host: str, clock_offset_s: float) -> dict[str, Any]:
    """The calls of one rank as the object that a trace file holds.

    clock_offset_s: what to add to the records' times. A call that was never waited for is a mark where it started.
    """
    by_group: dict[Group, list[CallRecord]] = {}
    for record in sorted(records, key=lambda record: record.started_s):
        by_group.setdefault(record.group, []).append(record)
    process = {"ph": "M", "pid": global_rank, "tid": 0}
    events: list[dict[str, Any]] = [
        {**process, "name": "process_name", "args": {"name": f"rank {global_rank} on {host}"}},
        {**process, "name": "process_sort_index", "args": {"sort_index": global_rank}},
    ]

    def microseconds(time_s: float) -> int:
        return int((time_s + clock_offset_s) * 1e6)

    first_track = 1
    for group, calls in by_group.items():
        lanes = plan_lanes([(each.started_s, each.started_s if each.done_s is None else each.done_s) for each in calls])
        for lane in range(max(lanes) + 1):
            name = group.name if lane == 0 else f"{group.name} ({lane + 1})"
            track = {"ph": "M", "pid": global_rank, "tid": first_track + lane}
            events.append({**track, "name": "thread_name", "args": {"name": name}})
            events.append({**track, "name": "thread_sort_index", "args": {"sort_index": first_track + lane}})
        for call, lane in zip(calls, lanes, strict=True):
            place = {"pid": global_rank, "tid": first_track + lane, "ts": microseconds(call.started_s)}
            shown = {**place, "cat": group.name, "name": f"{call.op} {call.full_label}", "args": _details(call)}
            if call.done_s is None or call.wait_began_s is None:
                events.append({**shown, "ph": "i", "s": "t"})
                continue
            done_us, wait_began_us = microseconds(call.done_s), microseconds(call.wait_began_s)
            events.append({**shown, "ph": "X", "dur": done_us - place["ts"]})
            wait = {"ts": wait_began_us, "dur": done_us - wait_began_us}
            events.append({**place, **wait, "ph": "X", "cat": group.name, "name": "wait"})
        first_track += max(lanes) + 1
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def plan_lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """The lane of each (start, end), in the order of starts: the lowest one that is free, so that none overlap.

    >>> plan_lanes([(0, 4), (1, 2), (3, 5), (4, 6)])
    [0, 1, 1, 0]
    """
    free: list[int] = []
    busy: list[tuple[float, int]] = []  # until when, lane
    lanes = []
    for start, end in spans:
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, lane))
        lanes.append(lane)
    return lanes


def join_traces(traces: str | Path | Iterable[str | Path], joined: str | Path | None = None) -> Path:
    """Write the trace files of several ranks as one, so that a viewer shows them on one time line; its path.

    traces: the folder of `save_trace`, or files. joined: by default `comms.json` in that folder.

    Raises ConfigError for a path that is no folder, and for a folder without a trace.
    """
    if isinstance(traces, str | Path):
        folder = Path(traces)
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; expected the one that save_trace wrote to, or a list of files.")
        paths = sorted(folder.glob(TRACE_FILE.format(rank="*")), key=lambda path: (len(path.name), path.name))
        if not paths:
            raise ConfigError(
                f"There is no {TRACE_FILE.format(rank='*')} in {folder}; call save_trace on each rank first."
            )
        joined = folder / "comms.json" if joined is None else joined
    else:
        paths = [Path(path) for path in traces]
        if joined is None:
            raise ConfigError("join_traces got a list of files; expected as a second argument the file to write.")
    told = [json.loads(path.read_text(encoding="ascii")) for path in paths]
    events = [event for trace in told for event in trace["traceEvents"]]
    path = Path(joined)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="ascii")
    return path


def _details(call: CallRecord) -> dict[str, Any]:
    return {
        "bytes": call.payload_bytes,
        "dtype": call.dtype,
        "algorithm": call.algorithm,
        "call": call.index,
        "group ranks": list(call.group.ranks) if len(call.group.ranks) <= 16 else len(call.group.ranks),
    }
