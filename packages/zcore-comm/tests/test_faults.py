"""Whatever a rank does instead of what it should, all others say within seconds of the deadline who it was and why."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts import move_to_hosts_of

from zcore.comm.choice import serve
from zcore.core.testing import RankFailed

DEADLINE_S = 1.5
CULPRIT = 1
each_kind = pytest.mark.parametrize(
    ("kind", "world_size"),
    [("shared memory", 2), ("shared memory", 4), ("pairwise", 2), ("pairwise", 4), ("two levels", 4)],
)


def go_wrong(kind, how, size):
    move_to_hosts_of(kind)
    world = dist.new_group(timeout=timedelta(seconds=DEADLINE_S))
    group = serve(world, name="dp")
    tensor = torch.ones(size)
    for number in range(3):
        group.all_reduce(tensor, label=f"grads.{number}").wait()
    if group.rank == CULPRIT:
        globals()[how](group, tensor)
    group.all_reduce(tensor, label="grads.3").wait()
    group.all_reduce(tensor, label="grads.4").wait()
    group.all_reduce(tensor, label="grads.5").wait()


def is_killed(group, tensor):
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(group, tensor):
    os.kill(os.getpid(), signal.SIGSTOP)


def is_slow(group, tensor):
    end = time.monotonic() + 2 * DEADLINE_S
    while time.monotonic() < end:
        pass


def sends_another_size(group, tensor):
    group.all_reduce(tensor[:-1].clone(), label="grads.3").wait()


def sends_another_type(group, tensor):
    group.all_reduce(tensor.double(), label="grads.3").wait()


def is_ahead_by_one(group, tensor):
    group.all_reduce(tensor, label="grads.4").wait()


def failures_of(ranks, kind, world_size, how, size):
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, go_wrong, kind, how, size, grace_s=1.5 if how == "is_stopped" else 5.0)
    return {failure.rank: failure for failure in caught.value.failures}


@pytest.mark.parametrize("size", [100, 100_000], ids=["small", "large"])
@each_kind
def test_a_rank_that_is_killed_is_named_by_all_others(ranks, kind, world_size, size):
    names = set(Path("/dev/shm").iterdir())
    failures = failures_of(ranks, kind, world_size, "is_killed", size)
    assert not {name for name in set(Path("/dev/shm").iterdir()) - names if "zcore" in name.name}
    for rank in set(range(world_size)) - {CULPRIT}:
        assert failures[rank].type_name == "CollectiveError", failures[rank].message
        assert "restart all ranks" in failures[rank].message
        assert "grads.3" in failures[rank].last_collective
    told = " ".join(failures[rank].message for rank in failures if rank != CULPRIT)
    if kind != "pairwise":  # where another rank of its host sees its process
        assert "rank 1 has raised, was killed, or left" in told
    assert re.search("Missing: [^.]*rank 1 ", told), told


@pytest.mark.parametrize(
    ("how", "state"),
    [("is_stopped", "is stopped"), ("is_slow", "is (alive|not seen from here)")],
)
@each_kind
def test_a_rank_that_does_not_come_is_named_with_what_it_did_last(ranks, kind, world_size, how, state):
    failures = failures_of(ranks, kind, world_size, how, 100)
    for rank in set(range(world_size)) - {CULPRIT}:
        message = failures[rank].message
        assert failures[rank].type_name == "CollectiveError", message
        assert "grads.3" in message
    told = " ".join(failures[rank].message for rank in failures if rank != CULPRIT)
    assert "the timeout of 1.5 s has passed" in told
    if kind != "pairwise":  # where another rank of its host sees its process
        assert re.search(rf"[rR]ank 1 \(process \d+ on \S+ {state}\)", told), told
    if how == "is_slow":
        assert "its last call was all_reduce grads.2" in told, told
        assert "in is_slow" in told, told


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("sends_another_size", ["100 x float32", "99 x float32"]),
        ("sends_another_type", ["100 x float32", "100 x float64"]),
        ("is_ahead_by_one", ["grads.3", "grads.4"]),
    ],
)
@each_kind
def test_a_rank_that_calls_something_else_is_told_with_both_sides(ranks, kind, world_size, how, words):
    failures = failures_of(ranks, kind, world_size, how, 100)
    others = [failures[rank] for rank in range(world_size) if rank != CULPRIT]
    told = [each for each in others if each.type_name == "MismatchError"]
    assert told
    for each in told:
        assert [word for word in [*words, "on rank 1"] if word not in each.message] == [], each.message
    assert all(each.type_name in ("MismatchError", "CollectiveError") for each in others)
