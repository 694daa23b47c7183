"""Recorded calls as trace events: what viewers need to draw them, and nothing that overlaps on one track."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.recording.chrome_trace import join_traces, plan_lanes, trace_of
from zcore.comm.recording.totals import CallRecord, Group
from zcore.core.errors import ConfigError

GATHER, REDUCE = Group("dp gather", (0, 1)), Group("dp reduce", (0, 1))


def a_call(started_s, wait_began_s=None, done_s=None, *, group=GATHER, label="w", caller=""):
    return CallRecord(
        group, "all_gather", label, caller, "bfloat16", 64, "ring", 3, started_s, started_s, wait_began_s, done_s
    )


def traced(*calls, rank=1, offset_s=100.0):
    return trace_of(calls, global_rank=rank, host="node7", clock_offset_s=offset_s)["traceEvents"]


def names_of_tracks(events):
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def test_a_rank_is_a_process_and_a_group_a_track():
    events = traced(a_call(1.0, 1.5, 2.0), a_call(1.0, 1.5, 2.0, group=REDUCE))
    assert {event["pid"] for event in events} == {1}
    (process,) = (event for event in events if event["name"] == "process_name")
    assert process["args"] == {"name": "rank 1 on node7"}
    assert list(names_of_tracks(events).values()) == ["dp gather", "dp reduce"]


def test_a_call_lasts_from_its_start_and_holds_its_wait():
    events = traced(a_call(1.0, 1.5, 2.0, label="layers.0", caller="step"))
    call, wait = (event for event in events if event["ph"] == "X")
    assert (call["name"], call["ts"], call["dur"]) == ("all_gather layers.0 (step)", 101_000_000, 1_000_000)
    assert (wait["name"], wait["ts"], wait["dur"]) == ("wait", 101_500_000, 500_000)
    assert call["args"] == {"bytes": 64, "dtype": "bfloat16", "algorithm": "ring", "call": 3, "group ranks": [0, 1]}
    assert call["tid"] == wait["tid"]


def test_a_call_that_never_ended_is_a_mark_at_its_start():
    (mark,) = (event for event in traced(a_call(1.0)) if event["ph"] == "i")
    assert mark["ts"] == 101_000_000


def test_calls_that_overlap_lie_on_tracks_of_their_own():
    events = traced(a_call(1.0, 3.0, 4.0), a_call(2.0, 4.0, 5.0), a_call(4.5, 5.0, 6.0))
    tracks = names_of_tracks(events)
    calls = [tracks[event["tid"]] for event in events if event["name"] == "all_gather w"]
    assert calls == ["dp gather", "dp gather (2)", "dp gather"]


times = st.lists(st.floats(0, 100), min_size=3, max_size=3).map(sorted)


@given(st.lists(st.tuples(times, st.sampled_from([GATHER, REDUCE])), max_size=20))
def test_nothing_on_a_track_overlaps_except_a_wait_inside_its_call(calls):
    events = traced(*(a_call(*three, group=group) for three, group in calls))
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * len(calls)
    by_track = {}
    for call, wait in zip(spans[::2], spans[1::2], strict=True):
        assert call["ts"] <= wait["ts"] and wait["ts"] + wait["dur"] == call["ts"] + call["dur"]
        by_track.setdefault(call["tid"], []).append((call["ts"], call["ts"] + call["dur"]))
    for lane in by_track.values():
        lane.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(lane))


@given(st.lists(times, max_size=30))
def test_no_more_lanes_than_calls_at_one_time(spans):
    spans = sorted((low, high) for low, _, high in spans)
    most = max((sum(low <= at < high or low == at for low, high in spans) for at, _ in spans), default=0)
    assert len(set(plan_lanes(spans))) <= most


def test_files_of_several_ranks_become_one(tmp_path):
    paths = [tmp_path / f"comms.rank{rank}.json" for rank in range(2)]
    for rank, path in enumerate(paths):
        path.write_text(json.dumps({"traceEvents": traced(a_call(1.0, 1.5, 2.0), rank=rank)}))
    join_traces(paths, tmp_path / "all.json")
    joined = json.loads((tmp_path / "all.json").read_text())
    assert {event["pid"] for event in joined["traceEvents"]} == {0, 1}


def test_the_folder_of_the_traces_stands_for_its_files(tmp_path):
    for rank in (2, 10):
        path = tmp_path / f"comms.rank{rank}.json"
        path.write_text(json.dumps({"traceEvents": traced(a_call(1.0, 1.5, 2.0), rank=rank)}))
    for _ in range(2):  # what it wrote is no trace of a rank
        assert join_traces(str(tmp_path)) == tmp_path / "comms.json"
    events = json.loads((tmp_path / "comms.json").read_text())["traceEvents"]
    assert list(dict.fromkeys(event["pid"] for event in events)) == [2, 10]
    assert len([event for event in events if event["name"] == "wait"]) == 2
    assert join_traces(tmp_path, tmp_path / "all.json") == tmp_path / "all.json"


def test_what_holds_no_traces_is_refused_by_name(tmp_path):
    (tmp_path / "one.json").touch()
    for arguments, message in (
        (("traces", "all.json"), "traces is no folder; expected the one that save_trace wrote to"),
        ((str(tmp_path / "one.json"), "all.json"), "one.json is no folder"),
        ((tmp_path,), f"There is no comms.rank*.json in {tmp_path}; call save_trace on each rank first."),
        (([tmp_path / "one.json"],), "expected as a second argument the file to write"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            join_traces(*arguments)
