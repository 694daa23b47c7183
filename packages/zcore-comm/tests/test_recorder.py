"""What is recorded of a group's calls, when, and what reaches the other ranks."""

import contextlib
import io
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from zcore.comm.choice import offer
from zcore.comm.recording import recorder
from zcore.comm.recording.recorded import LISTENERS, Recorded
from zcore.comm.recording.recorder import MAX_LABELS, RING_CALLS, record, wall_offset_s
from zcore.core.errors import CollectiveError, ConfigError
from zcore.core.recording import OPS
from zcore.core.torch_collectives import TorchCollectives


def ticking(tick_s=1.0):
    """A clock that is `tick_s` later at each look."""
    return itertools.count(0.0, tick_s).__next__


def recorded(name="dp", **options):
    return Recorded(TorchCollectives(dist.group.WORLD, name=name), dist.group.WORLD, name=name, **options)


def call_everything(group):
    """Each op once; 8 floats on the larger side."""
    rank, size = group.rank, group.size
    whole, part = torch.zeros(8), torch.ones(8 // size)
    group.all_gather(whole, part, label="gather").wait()
    group.reduce_scatter(part, whole, label="scatter").wait()
    group.all_reduce(whole, label="reduce").wait()
    group.all_to_all(torch.empty(8), whole, label="exchange").wait()
    group.broadcast(whole, src=1, label="cast").wait()
    if rank == 0:
        group.send(whole, dst=1, label="message").wait()
    elif rank == 1:
        group.recv(whole, src=0, label="message").wait()
    group.all_reduce(whole, label="last").wait()
    return whole


def what_is_recorded():
    plain = call_everything(TorchCollectives(dist.group.WORLD, name="plain"))
    group = recorded()
    with record() as recording:
        assert torch.equal(call_everything(group), plain)
    assert group.traffic.calls["all_reduce"] == 2
    message = "send" if group.rank == 0 else "recv"
    expected = [
        ("all_gather", "gather", 0),
        ("reduce_scatter", "scatter", 1),
        ("all_reduce", "reduce", 2),
        ("all_to_all", "exchange", 3),
        ("broadcast", "cast", 4),
        (message, "message", 4),  # not every rank makes it, so it does not count
        ("all_reduce", "last", 5),
    ]
    assert [(call.op, call.label, call.index) for call in recording.calls] == expected
    for call in recording.calls:
        assert (call.payload_bytes, call.dtype, call.algorithm) == (32, "float32", "torch gloo")
        assert (call.group.name, call.group.ranks, call.caller) == ("dp", (0, 1), "")
        assert call.started_s <= call.issued_s <= call.wait_began_s <= call.done_s
    return [row.op for row in recording.report().ops]


def test_every_call_is_recorded_with_what_it_moved_and_how_long_it_took(ranks):
    first, second = ranks(2, what_is_recorded)
    assert sorted(first) == sorted(set(OPS) - {"recv"})
    assert sorted(second) == sorted(set(OPS) - {"send"})


def choose_and_record():
    with record() as recording:
        group = offer(dist.group.WORLD, name="dp")
        group.all_reduce(torch.ones(5), label="x").wait()
        buffer = group.empty(6, dtype=torch.float32, device=torch.device("cpu"))
        group.free_storage(buffer)
        group.all_gather(buffer, torch.full((3,), float(group.rank)), label="y").wait()
        group.own_storage(buffer)
        buffer += 1
        group.free_storage(buffer)
        group.alloc_storage(buffer)
    return [(call.label, call.algorithm) for call in recording.calls if call.group.name == "dp"]


def test_the_group_that_is_offered_is_recorded_and_tells_its_algorithm(ranks):
    assert ranks(2, choose_and_record) == [[("x", "shared memory"), ("y", "shared memory")]] * 2


def record_now_and_then():
    group, numbers = recorded(), torch.ones(4)
    pending = group.all_reduce(numbers, label="unseen")
    assert type(pending) is type(group.inner.all_reduce(numbers, label="unseen"))  # nothing is put around it
    with record() as outer:
        group.all_reduce(numbers, label="one").wait()
        with record(ops=["broadcast"]) as inner:
            group.all_reduce(numbers, label="two").wait()
            group.broadcast(numbers, src=0, label="three").wait()
        begun = group.all_reduce(numbers, label="four")
    group.all_reduce(numbers, label="unseen").wait()
    assert [call.done_s is None for call in outer.calls] == [False, False, False, True]
    begun.wait()
    begun.wait()
    assert [call.done_s is None for call in outer.calls] == [False] * 4
    elapsed_s = outer.report().ranks[0].elapsed_s
    assert outer.report().ranks[0].elapsed_s == elapsed_s  # it has stopped
    outer.stop()
    return [[(call.label, call.index) for call in each.calls] for each in (outer, inner)]


def test_recordings_overlap_and_each_has_what_starts_while_it_runs(ranks):
    # One of the unseen calls went past `Recorded`, and is not counted by it.
    assert ranks(1, record_now_and_then) == [
        [[("one", 1), ("two", 2), ("three", 3), ("four", 4)], [("three", 3)]],
    ]


def clear_between():
    group, numbers = recorded(), torch.ones(4)
    with record() as recording:
        group.all_reduce(numbers, label="start").wait()
        begun = group.all_reduce(numbers, label="under way")
        recording.clear()
        begun.wait()
        group.all_reduce(numbers, label="step").wait()
        group.all_reduce(numbers, label="left")
    (row,) = recording.report().ops
    return [call.label for call in recording.calls], row.num_calls, row.num_open


def test_what_is_cleared_is_forgotten_with_what_is_under_way(ranks):
    assert ranks(1, clear_between) == [(["step", "left"], 2, 1)]


def fill_the_memory():
    group, numbers = recorded(), torch.ones(1)
    with record() as recording:
        for index in range(RING_CALLS + 10):
            group.all_reduce(numbers, label=f"step {index}").wait()
        for index in range(MAX_LABELS):
            group.broadcast(numbers, src=0, label=f"step {index}").wait()
    rows = {row.op: row.num_calls for row in recording.report().ops}
    return len(recording.calls), rows, len(recording._labels), len(recording._waits[recording.calls[0].group])


def test_totals_stay_while_single_calls_and_labels_are_bounded(ranks):
    ((num_calls, rows, num_labels, num_waits),) = ranks(1, fill_the_memory)
    assert num_calls == RING_CALLS
    assert rows == {"all_reduce": RING_CALLS + 10, "broadcast": MAX_LABELS}
    assert num_labels == MAX_LABELS + 2  # with the one for all others, of each op
    assert num_waits == recorder.COMPARED_CALLS


def record_a_failure():
    """Rank 1 makes no call: rank 0 gives up after the group's timeout."""
    group = recorded()
    if group.rank == 1:
        return None
    with record() as recording:
        pending = group.all_reduce(torch.ones(1), label="alone")
        with pytest.raises(CollectiveError, match="alone"):
            pending.wait()
    return [(call.label, call.issued_s is None, call.wait_began_s is None, call.done_s) for call in recording.calls]


def test_a_call_that_fails_stays_without_an_end(ranks):
    told, _ = ranks(2, record_a_failure, group_timeout_s=0.5)
    assert told == [("alone", False, False, None)]


def name_callers():
    group = recorded()
    with record() as plain, record(names_callers=True) as recording:
        call_everything_once(group)
    assert plain.calls == recording.calls
    return [row.label for row in recording.report().labels]


def call_everything_once(group):
    group.all_reduce(torch.ones(1), label="x").wait()


def test_labels_name_the_caller_if_asked(ranks):
    assert ranks(1, name_callers) == [["x (call_everything_once)"]]


def log_calls(configured):
    group = recorded(clock=ticking(0.25))
    seen = io.StringIO()
    if configured:
        handler = logging.StreamHandler(seen)
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel("INFO")
    with contextlib.redirect_stderr(seen), record(verbose=True, clock=ticking()):
        group.all_reduce(torch.ones(1024), label="norm").wait()
    if configured:
        logging.getLogger().removeHandler(handler)
    return seen.getvalue()


@pytest.mark.parametrize("configured", [True, False])
def test_each_call_is_logged_on_rank_0_whether_logging_is_configured_or_not(ranks, configured):
    line = "all_reduce norm (#0 of dp, 4 KiB of float32) by torch gloo: waited 250 ms, done 750 ms after its start\n"
    assert ranks(2, log_calls, configured) == [line, ""]


def come_late(late_rank):
    """Each rank's own clock ticks in a wait; that of the late rank hardly does: it finds the others there."""
    tick_s = 0.001 if dist.get_rank() == late_rank else 0.010
    group = recorded(clock=ticking(tick_s))
    with record(clock=ticking(tick_s)) as recording:
        for index in range(20):
            group.all_reduce(torch.ones(1), label=f"norm {index}").wait()
    reports = [recording.report(group), recording.report(group)]
    assert reports[0] == reports[1]  # a report's own calls are not recorded
    return reports[0].straggler, str(reports[0])


@pytest.mark.parametrize("late_rank", [0, 2])
def test_every_rank_is_told_who_comes_last(ranks, late_rank):
    told = ranks(3, come_late, late_rank)
    assert len(set(told)) == 1
    straggler, text = told[0]
    assert straggler == late_rank
    assert f"The others wait for rank {late_rank}: last in 20 of 20 calls, by 9 ms each." in text


def record_different_calls():
    """A rank may have made more calls, and other labels, than another: reports are of different lengths."""
    pair = dist.new_group([0, 1])
    group = recorded()
    with record() as recording:
        if dist.get_rank() < 2:
            served = Recorded(TorchCollectives(pair, name="pair"), pair, name="pair")
            served.all_reduce(torch.ones(1), label="only here, at some length").wait()
        group.all_reduce(torch.ones(1), label="x").wait()
    report = recording.report(group).to_dict()
    assert recording.report(dist.group.WORLD).to_dict() == report  # as it is given to every call, too
    return report


def test_ranks_that_recorded_different_calls_get_one_report(ranks):
    told = ranks(3, record_different_calls)
    assert told[0] == told[1] == told[2]
    assert {(row["group"], row["group_size"]) for row in told[0]["ops"]} == {("pair", 2), ("dp", 3)}


def trace(folder):
    group = recorded()
    with record() as recording:
        group.all_reduce(torch.ones(1), label="x").wait()
    recording.save_trace(f"{folder}/new")
    return str(recording.save_trace(folder))


def test_each_rank_writes_its_trace_on_one_clock(ranks, tmp_path):
    paths = ranks(2, trace, str(tmp_path))
    assert paths == [str(tmp_path / f"comms.rank{rank}.json") for rank in range(2)]
    assert (tmp_path / "new" / "comms.rank1.json").exists()
    spans = []
    for rank, path in enumerate(paths):
        events = json.loads(Path(path).read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {rank}
        spans.append(next(event for event in events if event["name"] == "all_reduce x"))
    starts = [span["ts"] for span in spans]
    ends = [span["ts"] + span["dur"] for span in spans]
    # Nobody is done before everybody has started; 1 ms for the wall clock's offset, which each rank reads for itself.
    assert min(ends) + 1000 > max(starts)


def test_the_offset_of_the_wall_clock_is_the_same_at_each_reading():
    offsets = [wall_offset_s() for _ in range(5)]
    assert max(offsets) - min(offsets) < 1e-3


@pytest.mark.parametrize(
    ("op", "words"),
    [("al_gather", "Did you mean `all_gather`"), ("barrier", "expected some of all_gather, reduce_scatter")],
)
def test_an_op_that_there_is_not_is_refused(op, words):
    with pytest.raises(ConfigError, match=words):
        record(ops=[op])
    assert LISTENERS == []
