"""Whatever a rank does instead of what it should, each other one says soon after the deadline who it was and why."""

import os
import re
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts import HOSTS, message_of, move_to_hosts_of

import zcore.comm
from zcore.comm.choice import serve
from zcore.comm.pairs.moves import Pairs
from zcore.comm.ranks.cards import cards_of_run
from zcore.core import compat
from zcore.core.collectives import tell_contents
from zcore.core.testing import RankFailed
from zcore.core.torch_collectives import choose_collectives

DEADLINE_S = 2.0  # for a rank that does not come
AMPLE_S = 60.0  # for what is told by itself, however long a busy machine takes for the calls before it
SOON_S = 5.0  # after the deadline
NUM_CLOSED = 10  # groups; in some of them one rank's closing ends the other's wait
SMALL, LARGE = 100, 200_000  # in one step, ended by who waits; in several, by the worker
WORLDS = [  # kind, ranks, culprit, numel
    ("shared memory", 2, 0, SMALL),
    ("shared memory", 2, 1, LARGE),
    ("shared memory", 4, 0, LARGE),
    ("shared memory", 4, 1, SMALL),
    ("pairwise", 2, 0, LARGE),
    ("pairwise", 2, 1, SMALL),
    ("pairwise", 4, 0, SMALL),
    ("pairwise", 4, 1, LARGE),
    ("two levels", 4, 0, LARGE),
    ("two levels", 4, 1, SMALL),
    ("two levels", 4, 2, LARGE),
]
WORLDS_AT_A_TIME = 4
each_world = pytest.mark.parametrize("world", WORLDS, ids=lambda world: "-".join(map(str, world)))


def go_wrong(kind, culprit, how, numel):
    move_to_hosts_of(kind)
    deadline_s = DEADLINE_S if how in ("is_stopped", "is_slow") else AMPLE_S
    process_group = dist.new_group(timeout=timedelta(seconds=deadline_s))
    # The deadline is for the misdeed: what a rank does once in its life, and what ranks of a busy machine wait for each
    # other with, is done by another group before.
    store, tensor = compat.default_store(), torch.ones(numel)
    serve(dist.new_group(timeout=timedelta(seconds=AMPLE_S)), name="before").all_reduce(tensor, label="before").wait()
    group = serve(process_group, name="dp")
    for number in range(3):
        group.all_reduce(tensor, label=f"grads.{number}").wait()
    store.set(f"process {group.rank}", str(os.getpid()))
    dist.barrier()
    try:
        if group.rank == culprit:
            tell_time()
            globals()[how](group, tensor)
        for number in range(3, 6):
            group.all_reduce(tensor, label=f"grads.{number}").wait()
    finally:
        tell_time()
        if group.rank != culprit and store.add("told", 1) == group.size - 1 and how == "is_stopped":
            os.kill(int(store.get(f"process {culprit}")), signal.SIGKILL)


def tell_time():
    os.write(1, f"at {time.monotonic()}\n".encode())


def is_killed(group, tensor):
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(group, tensor):
    os.kill(os.getpid(), signal.SIGSTOP)


def is_slow(group, tensor):
    end = time.monotonic() + DEADLINE_S + SOON_S
    while compat.default_store().add("told", 0) < group.size - 1 and time.monotonic() < end:
        pass


def sends_another_size(group, tensor):
    group.all_reduce(tensor[:-1].clone(), label="grads.3").wait()


def sends_another_type(group, tensor):
    group.all_reduce(tensor.double(), label="grads.3").wait()


def is_ahead_by_one(group, tensor):
    group.all_reduce(tensor, label="grads.4").wait()


def words_of_others(ranks, world, how):
    """Of each rank but the culprit: its rank, the kind of its error, and the message. All of them came soon."""
    kind, world_size, culprit, numel = world
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, go_wrong, kind, culprit, how, numel, grace_s=DEADLINE_S + SOON_S)
    failures = {each.rank: each for each in caught.value.failures}
    told = {rank: re.findall(r"^at (\S+)$", each.output, re.MULTILINE) for rank, each in failures.items()}
    assert all(told.values()), caught.value  # else a rank failed before the misdeed
    times = {rank: float(each[0]) for rank, each in told.items()}
    others = [rank for rank in range(world_size) if rank != culprit]
    assert max(times[rank] for rank in others) - times[culprit] < DEADLINE_S + SOON_S
    return [(rank, failures[rank].type_name, failures[rank].message) for rank in others]


@pytest.fixture(scope="module")
def told(ranks):
    """`told(world, how)` is `words_of_others` there. All worlds of a misdeed run at a time: they mostly wait."""
    futures = {}

    def told_in(world, how):
        if how not in futures:
            with ThreadPoolExecutor(WORLDS_AT_A_TIME) as pool:
                futures[how] = {each: pool.submit(words_of_others, ranks, each, how) for each in WORLDS}
        return futures[how][world].result()

    return told_in


def check_who_is_missing(world, rank, message, *, state):
    """`rank` lacks the culprit; of others it says at most that they have given up and left by now."""
    kind, _, culprit, _ = world
    missing = message.partition("Missing: ")[2].partition(" Arrived: ")[0]
    states = dict(re.findall(r"rank (\d) \(process \d+ on \S+ ([^)]+)\)", missing))
    assert str(culprit) in states, message
    assert {state for other, state in states.items() if other != str(culprit)} <= {"has ended"}, message
    assert set(re.findall(r"rank (\d) has raised", message)) <= {str(culprit)}, message
    if HOSTS[kind](rank) == HOSTS[kind](culprit):  # where it can see the process
        assert re.search(rf"[rR]ank {culprit} \(process \d+ on \S+ {state}\)", message), message
    if kind == "shared memory":  # elsewhere word of a call takes half a second
        assert re.search(rf"rank {culprit} [^,]+, its last call was all_reduce grads.2 ", missing), message


@each_world
def test_a_rank_that_is_killed_is_named_by_each_other(told, world):
    kind, _, culprit, _ = world
    names = set(Path("/dev/shm").iterdir())
    words = told(world, "is_killed")
    assert not {name for name in set(Path("/dev/shm").iterdir()) - names if "zcore" in name.name}
    for rank, type_name, message in words:
        assert type_name == "CollectiveError", message
        assert "all_reduce grads.3" in message
        assert "restart all ranks" in message
        check_who_is_missing(world, rank, message, state="has ended")
        if HOSTS[kind](rank) == HOSTS[kind](culprit):
            assert f"did not complete: rank {culprit} has raised, was killed, or left" in message


@pytest.mark.parametrize(("how", "state"), [("is_stopped", "is stopped"), ("is_slow", "is (alive|not seen from here)")])
@each_world
def test_a_rank_that_does_not_come_is_named_by_each_other(told, world, how, state):
    culprit = world[2]
    for rank, type_name, message in told(world, how):
        assert type_name == "CollectiveError", message
        assert re.search(r"all_reduce grads.3 .* did not complete: the timeout of 2 s has passed", message), message
        check_who_is_missing(world, rank, message, state=state)
        if how == "is_slow":
            assert re.search(rf"rank {culprit} [^,]+, its last call was all_reduce grads.2 .* in is_slow", message)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("sends_another_size", ["grads.3 ({size} x float32", "{less} "]),
        ("sends_another_type", ["grads.3 ({size} x float32", "grads.3 ({size} x float64"]),
        ("is_ahead_by_one", ["grads.3", "grads.4"]),
    ],
)
@each_world
def test_a_rank_that_calls_something_else_is_told_with_both_sides(told, world, how, words):
    *_, culprit, numel = world
    expected = [f"on rank {culprit}", *(each.format(size=numel, less=numel - 1) for each in words)]
    for rank, type_name, message in told(world, how):
        assert type_name == "MismatchError", message
        plain = re.sub(r"#\d+ of dp[^:]*: ", "", message)  # where a call is told with its number
        line = rf"on rank {culprit}, (last seen )?at test_faults.py:\d+ in {how}"  # not of what it had called before
        assert re.search(line, message), message
        assert [each for each in expected if each not in plain] == [], (rank, message)


def is_killed_long_after_an_error_elsewhere(hosts, giver):
    """`giver` has caught an error of a side group that it still holds; the last rank is killed three calls later."""
    rank, store = dist.get_rank(), compat.default_store()
    os.environ["ZCORE_COMM_HOST"] = hosts[rank]
    killed, partner = dist.get_world_size() - 1, 1
    side_ranks = sorted([giver, partner])
    side, main = dist.new_group(side_ranks, timeout=timedelta(seconds=1)), dist.new_group()
    if rank in side_ranks:
        evaluation = serve(side, name="evaluation")
        if rank == giver:
            said = message_of(lambda: evaluation.all_reduce(torch.ones(4), label="metrics").wait())
            assert "the timeout of 1 s has passed" in said, said
            store.set("has given up", "1")
        store.wait(["has given up"])
    group = serve(main, name="dp")
    for number in range(3):
        group.all_reduce(torch.ones(SMALL), label=f"grads.{number}").wait()
    dist.barrier()
    if rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    group.all_reduce(torch.ones(SMALL), label="grads.3").wait()


@pytest.mark.parametrize(("hosts", "giver"), [("abc", 0), ("abc", 2), ("aba", 2), ("aabb", 0)])
def test_a_killed_rank_is_named_whatever_error_of_another_group_somebody_caught_before(ranks, hosts, giver):
    with pytest.raises(RankFailed) as caught:
        ranks(len(hosts), is_killed_long_after_an_error_elsewhere, hosts, giver)
    *others, killed = caught.value.failures
    for each in others:
        assert re.search(r"all_reduce grads.3 \(.*\) did not complete", each.message), each.message
        assert f"rank {killed.rank} (" in each.message.partition("Missing: ")[2].partition(" Arrived: ")[0], (
            each.message
        )
        told = re.sub(
            r" \(before, or in another group, it had given up: .*?: all_reduce metrics [^)]*\)[^)]*\)", "", each.message
        )
        assert "metrics" not in told, each.message
        if hosts[each.rank] == hosts[killed.rank]:  # where it is seen to have ended
            assert f"did not complete: rank {killed.rank} has raised, was killed, or left" in each.message
            assert ("in another group, it had given up" in each.message) == (giver == killed.rank)


def sum_two_buckets_as_one():
    with zcore.comm.coalescing():
        zcore.comm.all_reduce(torch.ones(3), label="grads.0")
        zcore.comm.all_reduce(torch.ones(4), label="grads.1")


def take_the_mean():
    zcore.comm.all_reduce(torch.ones(LARGE + 1), dist.ReduceOp.AVG, label="grads.0")


def broadcast_a_bucket():
    zcore.comm.broadcast(torch.ones(SMALL), src=0, label="grads.0")


def call_without_the_last_rank(kind, act):
    move_to_hosts_of(kind)
    tell_contents("grads.0", ["layer.weight"])
    tell_contents("grads.1", ["layer.bias"])
    zcore.comm.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        compat.default_store().wait(["told"], timedelta(seconds=AMPLE_S))
        return ""
    message = message_of(globals()[act])
    compat.default_store().set("told", "1")
    return message


@pytest.mark.parametrize(
    ("kind", "world_size", "act", "buckets"),
    [
        ("shared memory", 2, "sum_two_buckets_as_one", ["grads.0 holds layer.weight", "grads.1 holds layer.bias"]),
        ("two levels", 4, "take_the_mean", ["grads.0 holds layer.weight"]),
        ("pairwise", 2, "broadcast_a_bucket", ["grads.0 holds layer.weight"]),
    ],
)
def test_what_lies_in_the_data_is_told_whatever_has_become_of_their_label(ranks, kind, world_size, act, buckets):
    *others, _ = ranks(world_size, call_without_the_last_rank, kind, act, group_timeout_s=DEADLINE_S)
    for message in others:
        assert "CollectiveError" in message
        for bucket in buckets:
            assert f" Bucket {bucket}." in message, message


def is_killed_in_a_call_for_which_others_wait():
    """Each rank is alone on its host; the last one is killed in a call that the others make then."""
    move_to_hosts_of("pairwise")
    rank, store, x = dist.get_rank(), compat.default_store(), torch.ones(LARGE)
    zcore.comm.barrier()
    if rank == 2:
        zcore.comm.all_reduce(x, label="grads", async_op=True)
        cards_of_run().write()  # with this call on it; else it comes by itself, half a second later
        store.set("process", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    select.select([os.pidfd_open(int(store.get("process")))], [], [], AMPLE_S)
    began_s = time.monotonic()
    message = message_of(lambda: zcore.comm.all_reduce(x, label="grads"))
    return message, time.monotonic() - began_s


def test_a_rank_that_is_killed_in_a_call_where_nobody_sees_it_is_missing_and_gives_no_sign_of_life(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(3, is_killed_in_a_call_for_which_others_wait)
    assert len(caught.value.results) == 2, caught.value
    for message, took_s in caught.value.results.values():
        assert took_s < SOON_S
        missing, _, rest = message.partition("Missing: ")[2].partition(" Arrived: ")
        assert re.search(r"rank 2 \(process \d+ on \S+ gives no sign of life\), its last call was all_reduce", missing)
        assert "2" not in rest.partition(".")[0], message
        assert message.startswith("CollectiveError") and message.count("gives no sign of life") == 1, message
        assert "rank 1 (" not in missing, message


def is_killed_after_an_error_it_handled():
    zcore.comm.barrier()
    rank = dist.get_rank()
    handled = message_of(lambda: zcore.comm.all_reduce(torch.ones(SMALL + rank), label="metrics"))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return handled, message_of(lambda: zcore.comm.all_reduce(torch.ones(SMALL), label="grads"))


def test_an_error_of_an_earlier_call_is_not_the_cause_of_a_later_death(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, is_killed_after_an_error_it_handled)
    handled, message = caught.value.results[0]
    assert handled.startswith("MismatchError")
    assert re.match(
        r"CollectiveError: all_reduce grads \(.*\) did not complete: rank 1 has raised, was killed", message
    )
    assert "or left (before, or in another group, it had given up: MismatchError: Call 1 of this group" in message
    assert re.search(r"Missing: rank 1 \(process \d+ on \S+ has ended\)", message), message


def wait_where_another_service_has_closed_the_connections():
    """All ranks by `zcore.comm`, and by what engines choose for themselves, over one process group."""
    move_to_hosts_of("pairwise")
    zcore.comm.barrier()
    group, rank = choose_collectives(dist.group.WORLD, name="dp"), dist.get_rank()
    if rank == 2:
        return message_of(lambda: group.all_reduce(torch.ones(LARGE), label="grads").wait())
    return message_of(lambda: zcore.comm.all_reduce(torch.ones(SMALL + rank), label="metrics"))


def test_who_loses_connections_for_an_error_in_another_service_of_the_process_group_is_told_of_it(ranks):
    for message in ranks(3, wait_where_another_service_has_closed_the_connections, deadline_s=30):
        assert message.startswith("MismatchError: "), message
        for rank in range(2):
            made = rf"all_reduce metrics \(#1 of default_pg: {SMALL + rank} x [^)]*\) on rank {rank}"
            assert re.search(made, message), message


def close_at_the_same_time():
    """Ranks 0 and 1 close their connections; of each group rank 2 waits for both, who live."""
    rank, store, lost = dist.get_rank(), compat.default_store(), []
    for number in range(NUM_CLOSED):
        group = dist.new_group(timeout=timedelta(seconds=5))
        pairs = Pairs(group, (0, 1, 2), rank)
        dist.barrier(group)
        if rank < 2:
            pairs.abort()
            store.wait([f"lost {number}"], timedelta(seconds=AMPLE_S))
            continue
        try:
            for source in (1, 0):
                with pytest.raises(RuntimeError) as caught:
                    pairs.receive(torch.ones(1), source=source, tag=1).wait()
                lost.append("Timed out" not in str(caught.value))
        finally:
            store.set(f"lost {number}", "1")
    return lost


def test_ranks_that_give_up_at_the_same_time_close_every_connection(ranks):
    assert ranks(3, close_at_the_same_time)[2] == [True, True] * NUM_CLOSED
