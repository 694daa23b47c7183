"""What a step did: every transfer is there with its reason, times add up, and recording changes nothing."""

import json
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny_models import TinyModel, digest, listen, refusal, settings, train_steps

from zcore import zero
from zcore.zero.timeline import Kind, Mark, Timeline

Ranks = Callable[..., Any]


def mark(at_ms: float, kind: Kind, name: str, *, transfer: str = "", why: str = "", live_bytes: int = 0) -> Mark:
    return Mark(int(at_ms * 1e6) + 1, kind, name, transfer, why, live_bytes)


STEP = [
    mark(0, Kind.PHASE, "outside the model"),
    mark(2, Kind.PHASE, "forward"),
    mark(2, Kind.START, "h.0", transfer="gather", why="the first of the step", live_bytes=100),
    mark(3, Kind.START, "h.1", transfer="gather", why="ahead", live_bytes=250),
    mark(3, Kind.NEED, "h.0", transfer="gather", why="for h.0", live_bytes=250),
    mark(7, Kind.COME, "h.0", transfer="gather", live_bytes=250),
    mark(8, Kind.FREE, "h.0", live_bytes=150),
    mark(9, Kind.PHASE, "backward", live_bytes=150),
    mark(10, Kind.START, "h.0", transfer="reduce", live_bytes=150),
    mark(11, Kind.NEED, "h.0", transfer="reduce", why="the backward is over", live_bytes=150),
    mark(13, Kind.COME, "h.0", transfer="reduce", live_bytes=150),
    mark(14, Kind.PHASE, "step", live_bytes=0),
    mark(20, Kind.PHASE, "end"),
]
SIZES = {"h.0": 100, "h.1": 150}


def test_marks_become_transfers_phases_and_memory() -> None:
    timeline = Timeline.of(STEP, step=3, rank=1, sizes=SIZES)
    first, ahead, reduced = timeline.transfers
    assert (first.kind, first.bucket, first.payload_bytes, first.why) == (
        "gather",
        "h.0",
        100,
        "the first of the step; for h.0",
    )
    assert (first.started_s, first.ahead_s, first.wait_s) == pytest.approx((2e-3, 1e-3, 4e-3))
    assert (ahead.needed_s, ahead.wait_s, ahead.why) == (None, 0.0, "ahead")
    assert reduced.wait_s == pytest.approx(2e-3)
    assert timeline.seconds_in("forward") == pytest.approx(7e-3)
    assert timeline.waited_s("gather") == pytest.approx(4e-3)
    assert timeline.peak_bytes == 250
    assert [live for _, live in timeline.memory] == [0, 100, 250, 150, 0]
    assert timeline.duration_s == pytest.approx(20e-3)


def test_it_reads_as_a_table_and_one_line() -> None:
    lines = str(Timeline.of(STEP, step=3, rank=1, sizes=SIZES)).splitlines()
    assert lines[0] == (
        "step 3 on rank 1 took 20 ms: outside the model 2 ms, forward 7 ms, backward 5 ms, step 6 ms; of it waiting "
        "for gathers 4 ms, for reductions 2 ms; at most 250 B gathered at once"
    )
    assert lines[2].split() == ["at", "ms", "what", "bucket", "size", "ahead", "waited", "why"]
    gathered, ahead = (
        "2.0 gather h.0 100 B 1 ms 4 ms the first of the step; for h.0",
        "3.0 gather h.1 150 B - - ahead",
    )
    assert [" ".join(line.split()) for line in lines[3:5]] == [gathered, ahead]


def test_of_many_transfers_those_with_the_longest_waits_are_shown() -> None:
    marks = [mark(0, Kind.PHASE, "forward")]
    for index in range(50):
        marks.append(mark(10 * index + 1, Kind.START, f"h.{index}", transfer="gather"))
        marks.append(mark(10 * index + 1, Kind.NEED, f"h.{index}", transfer="gather"))
        marks.append(mark(10 * index + 2 + index / 50, Kind.COME, f"h.{index}", transfer="gather"))
    marks.append(mark(600, Kind.PHASE, "end"))
    text = str(Timeline.of(marks, step=1, rank=0, sizes={}))
    assert text.endswith("and 10 more, with shorter waits")
    assert " h.49 " in text and " h.9 " not in text


@hypothesis.given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 50), st.integers(0, 50))))
def test_waits_are_never_longer_than_the_step(transfers: list[tuple[str, int, int]]) -> None:
    marks, now = [mark(0, Kind.PHASE, "forward")], 0
    for bucket, work, wait in transfers:
        marks.append(mark(now, Kind.START, bucket, transfer="gather"))
        marks.append(mark(now + work, Kind.NEED, bucket, transfer="gather"))
        now += work + wait
        marks.append(mark(now, Kind.COME, bucket, transfer="gather"))
    marks.append(mark(now + 1, Kind.PHASE, "end"))
    timeline = Timeline.of(marks, step=1, rank=0, sizes={})
    assert timeline.waited_s("gather") == pytest.approx(sum(wait for _, _, wait in transfers) / 1e3)
    assert timeline.waited_s("gather") <= timeline.duration_s
    assert sum(end - begin for _, begin, end in timeline.phases) == pytest.approx(timeline.duration_s)


def explain(stage: int, folder: str) -> tuple[dict[str, Any], dict[str, Any], bool]:
    engine = zero.initialize(TinyModel(), settings(stage, gradient_accumulation_steps=2))
    assert "No step was recorded yet" in refusal(engine.explain_step)
    before = {group: dict(each.calls) for group, each in engine.traffic().items()}
    engine.explain_steps(every=2)
    train_steps(engine, range(2))
    assert "No step was recorded yet" in refusal(engine.explain_step)
    before = {group: dict(each.calls) for group, each in engine.traffic().items()}
    train_steps(engine, range(2, 4))
    counts = {
        group: {op: count - before[group].get(op, 0) for op, count in each.calls.items()}
        for group, each in engine.traffic().items()
    }
    timeline = engine.explain_step()
    trace = timeline.save_trace(f"{folder}/{engine.global_rank}.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    engine.explain_steps(every=0)
    train_steps(engine, range(4, 6))
    assert engine.explain_step() is timeline
    plain = zero.initialize(TinyModel(), settings(stage, gradient_accumulation_steps=2))
    train_steps(plain, range(6))
    return timeline.to_dict(), counts, digest(engine) == digest(plain)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_recorded_step_has_every_transfer_and_trains_the_same_bits(ranks: Ranks, tmp_path: Any, stage: int) -> None:
    for rank, (timeline, counts, is_same) in enumerate(ranks(2, explain, stage, str(tmp_path))):
        assert is_same
        assert (timeline["step"], timeline["rank"]) == (2, rank)
        kinds = [each["kind"] for each in timeline["transfers"]]
        assert kinds.count("gather") == counts["gather"].get("all_gather", 0)
        if stage == 0:  # where buckets are summed by the operation that small things are
            assert kinds.count("reduce") == 5
        else:
            assert kinds.count("reduce") == counts["reduce"]["reduce_scatter"]
        names = [name for name, _, _ in timeline["phases"]]
        assert [names.count(each) for each in ("forward", "backward", "step")] == [2, 2, 2]
        waits = [each for each in timeline["transfers"] if each["needed_s"] is not None]
        assert all(0 <= each["started_s"] <= each["needed_s"] <= each["done_s"] for each in waits)
        assert (max(live for _, live in timeline["memory"]) > 0) == (stage == 3)


def break_down() -> tuple[list[str], int]:
    records = listen()
    engine = zero.initialize(TinyModel(), settings(3, wall_clock_breakdown=True, steps_per_print=2))
    train_steps(engine, range(5))
    return [line for line in records.lines if " took " in line], engine.explain_step().step


def test_wall_clock_breakdown_logs_steps_on_rank_0(ranks: Ranks) -> None:
    (lines, step), (others, other_step) = ranks(2, break_down)
    assert [line.split(" took ")[0] for line in lines] == ["step 2 on rank 0", "step 4 on rank 0"]
    assert (step, others, other_step) == (4, [], 4)


def why_not_ahead() -> list[list[str]]:
    reasons = []
    for changes in ({"overlap_comm": False}, {"stage3_prefetch_bucket_size": 10}, {"stage3_max_live_parameters": 1}):
        options = {"stage": 3, "stage3_param_persistence_threshold": 16, **changes}
        engine = zero.initialize(TinyModel(), settings(3, zero_optimization=options))
        engine.explain_steps()
        train_steps(engine, range(1))
        first = [each.why for each in engine.explain_step().transfers if each.kind == "gather"]
        train_steps(engine, range(1, 3))
        last = [each.why for each in engine.explain_step().transfers if each.kind == "gather"]
        reasons.append(["; ".join(first), "; ".join(last)])
    return reasons


def test_what_was_not_gathered_ahead_says_why(ranks: Ranks) -> None:
    (off, _), (small, smaller), (_, full) = ranks(2, why_not_ahead)[0]
    assert "not ahead: overlap_comm is off" in off
    assert "not ahead: the order is not known before the second step" in small
    assert "the first of the step" in smaller and "not ahead: larger than stage3_prefetch_bucket_size" in smaller
    assert "not ahead: stage3_max_live_parameters left no room" in full
