"""What the watch says of calls that no host waits for; over gloo, as it does not matter here what moves the bytes."""

import logging
import threading
import time
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import zcore.comm
from zcore.comm.accelerator import AcceleratorCollectives
from zcore.comm.calls.flow import FLOW
from zcore.comm.choice import Parts
from zcore.comm.pairs.algorithms import DEFAULT_TABLE
from zcore.comm.ranks.meeting import meet
from zcore.comm.recording.recorded import Recorded
from zcore.core import compat
from zcore.core.collectives import CallLog


def served(group=None):
    group = group or dist.group.WORLD
    parts = Parts(group, meet(group, name="dp"), DEFAULT_TABLE, name="dp")
    return AcceleratorCollectives(group, parts.journal(range(dist.get_world_size()), "dp"), name="dp")


def call_everything():
    group = served()
    whole, part = torch.arange(8.0), torch.full((4,), float(group.rank))
    group.all_gather(whole, part, label="a").wait()
    summed = torch.empty(4)
    group.reduce_scatter(summed, whole, label="b").wait()
    group.all_reduce(summed, label="c").wait()
    received = torch.empty(8)
    group.all_to_all(received, whole, label="d").wait()
    group.broadcast(received, src=1, label="e").wait()
    pending = group.send(part, dst=1, label="f") if group.rank == 0 else group.recv(part, src=0, label="f")
    pending.wait()
    return whole.tolist(), summed.tolist(), received.tolist(), part.tolist(), group.algorithm_for("all_reduce", 1)


def test_calls_are_those_of_torch(ranks):
    whole = [0.0] * 4 + [1.0] * 4
    assert (
        ranks(2, call_everything)
        == [
            (whole, [2.0] * 4, [1.0] * 8, [0.0] * 4, "torch gloo"),
        ]
        * 2
    )


def call_in_blocks(depth):
    """Calls of each op that the backend starts together: what was recorded, and the results."""
    group = FLOW.around(Recorded(served(), dist.group.WORLD, name="dp"))
    own = group.rank + 1.0
    gathered = [torch.empty(2), torch.empty(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)]
    summed = [torch.empty(1), torch.empty(2)]
    reduced = [torch.full((numel,), own) for numel in (1, 2)]
    with zcore.comm.record() as recording:
        with ExitStack() as blocks:
            block = group
            for _ in range(depth):
                block = blocks.enter_context(zcore.comm.coalescing(block))
            pending = [
                *(block.all_gather(output, torch.full((output.numel() // 2,), own), label="w") for output in gathered),
                *(block.reduce_scatter(output, torch.full((2 * output.numel(),), own), label="g") for output in summed),
                *(block.all_reduce(tensor, label="n") for tensor in reduced),
            ]
        for each in pending:
            each.wait()
    recorded = [(call.op, call.label.split(" (")[0], call.payload_bytes) for call in recording.calls]
    return recorded, dict(group.traffic.calls), [each.tolist() for each in (*gathered, *summed, *reduced)]


@pytest.mark.parametrize("depth", [1, 3])
def test_what_joins_is_started_by_the_backend_where_it_lies_in_a_block_of_blocks_too(ranks, depth):
    recorded = [
        ("all_gather", "w", 8),
        ("all_gather", "w and 1 more", 64),  # of another type
        ("reduce_scatter", "g and 1 more", 24),
        ("all_reduce", "n and 1 more", 12),
    ]
    results = [[1.0, 2.0], [1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0], [3.0] * 2, [3.0], [3.0] * 2]
    calls = {"all_gather": 3, "reduce_scatter": 2, "all_reduce": 2}  # copied together they would be one
    assert ranks(2, call_in_blocks, depth) == [(recorded, calls, results)] * 2


class Told(logging.Handler):
    def __init__(self):
        super().__init__()
        self.words = []

    def emit(self, record):
        self.words.append(record.getMessage())


def leave_the_others_alone():
    told = Told()
    logging.getLogger("zcore.comm.ranks.journal").addHandler(told)
    group = served()
    group.all_reduce(torch.ones(4), label="grads.0").wait()
    tensor = torch.ones(5)
    if group.rank == 0:
        pending = group.all_reduce(tensor, label="grads.1")
    else:
        pending = group.broadcast(tensor, src=1, label="start")  # nobody receives
    deadline = time.monotonic() + 20
    while not told.words and time.monotonic() < deadline:
        dist.get_rank()  # the program goes on; nobody waits
    del pending
    return told.words


def test_a_call_that_is_late_is_told_by_the_watch_with_both_sides(ranks):
    for words in ranks(2, leave_the_others_alone):
        assert len(words) == 1
        assert words[0].startswith("MismatchError: ")
        for each in ("all_reduce grads.1", "broadcast start from rank 1", "on rank 0", "on rank 1"):
            assert each in words[0]


def follow_what_cannot_be_asked():
    """Two calls whose device has an error, and a third: what is told, and whether the third is looked at."""
    told, is_seen = Told(), threading.Event()
    logging.getLogger("zcore.comm.ranks").addHandler(told)
    group = dist.group.WORLD
    journal = Parts(group, meet(group, name="dp"), DEFAULT_TABLE, name="dp").journal(range(2), "dp")
    log = CallLog("dp")

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def see():
        is_seen.set()
        return True

    for number, is_done in enumerate((fail, fail, see)):
        call = log.note("all_reduce", f"grads.{number}", torch.ones(1))
        journal.start(call)
        journal.follow(call, is_done)
    return is_seen.wait(20), told.words


def test_a_call_that_cannot_be_asked_how_it_stands_is_told_once_and_left(ranks):
    for is_seen, words in ranks(2, follow_what_cannot_be_asked):
        assert is_seen
        assert len(words) == 1
        assert "Nobody looks after all_reduce grads.0" in words[0]
        assert "RuntimeError: CUDA error: an illegal memory access" in words[0]


def never_come():
    """Rank 0 calls alone: what is told of it, and how long before its deadline."""
    told, store, timeout_s = Told(), compat.default_store(), 6.0
    logging.getLogger("zcore.comm.ranks.journal").addHandler(told)
    group = served(dist.new_group(timeout=timedelta(seconds=timeout_s)))
    group.all_reduce(torch.ones(4), label="grads.0").wait()
    if group.rank == 1:
        store.wait(["told"], timedelta(seconds=20))
        return [], 0.0
    end = time.monotonic() + timeout_s
    pending = group.all_reduce(torch.ones(4), label="grads.1")
    while not told.words and time.monotonic() < end:
        dist.get_rank()  # the program goes on; nobody waits
    left_s = end - time.monotonic()
    store.set("told", "1")
    del pending
    return told.words, left_s


def test_who_is_missing_is_told_before_the_watchdog_ends_the_process(ranks):
    (words,), left_s = ranks(2, never_come)[0]
    assert "all_reduce grads.1" in words
    assert "the timeout of 6 s is about to pass. Missing: rank 1 (" in words
    assert left_s > 0
