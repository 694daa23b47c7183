"""Ranks far ahead of others, late ones, and ranks that wait in another order: results stay right, and nobody hangs."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hosts import message_of, move_to_hosts_of

import zcore.comm
from zcore.comm.choice import serve
from zcore.comm.memory.board import RING_CALLS
from zcore.core import compat
from zcore.core.testing import RankFailed
from zcore.core.torch_collectives import TorchCollectives

CPU = torch.device("cpu")


def served(kind, *, timeout_s=60.0):
    move_to_hosts_of(kind)
    return serve(dist.new_group(timeout=timedelta(seconds=timeout_s)), name="dp")


def come_after_the_timeout():
    """Rank 0 gives up; the others come afterwards, and read what it never summed."""
    group = served("shared memory", timeout_s=1.5)
    tensor = torch.full((60_000,), float(group.rank + 1))
    if group.rank == 0:
        message = message_of(lambda: group.all_reduce(tensor, label="grads").wait())
        dist.barrier()
        return message
    dist.barrier()
    return message_of(lambda: group.all_reduce(tensor, label="grads").wait())


def test_what_another_rank_has_given_up_is_not_taken_for_its_sum(ranks):
    first, *others = ranks(3, come_after_the_timeout)
    assert "the timeout of 1.5 s has passed" in first
    assert all("CollectiveError: all_reduce grads" in each and "rank 0 has given it up" in each for each in others)


def leave_after_the_timeout():
    """Rank 1 never comes; rank 2 comes when rank 0 has given up, which then leaves."""
    group, store = served("shared memory", timeout_s=1.5), compat.default_store()
    if group.rank == 0:
        message = message_of(lambda: group.all_reduce(torch.ones(4), label="grads").wait())
        store.set("rank 0 has given up", "1")
        raise RuntimeError(message)
    if group.rank == 1:
        store.wait(["rank 2 has given up"], timedelta(seconds=20))
        return
    store.wait(["rank 0 has given up"], timedelta(seconds=20))
    message = message_of(lambda: group.all_reduce(torch.ones(4), label="grads").wait())
    store.set("rank 2 has given up", "1")
    raise RuntimeError(message)


def test_who_left_for_a_missing_rank_is_not_taken_for_it(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(3, leave_after_the_timeout)
    assert [failure.rank for failure in caught.value.failures] == [0, 2]
    for failure in caught.value.failures:
        assert "did not complete: the timeout of 1.5 s has passed. Missing: rank 1 (" in failure.message


def start_many_before_waiting(kind):
    """Even ranks start 90 sums and then wait; odd ones wait for each."""
    group = served(kind)
    tensors = [torch.full((20_000,), float(group.rank + 1)) for _ in range(90)]
    if group.rank % 2 == 0:
        for pending in [group.all_reduce(each, label="grads") for each in tensors]:
            pending.wait()
    else:
        for each in tensors:
            group.all_reduce(each, label="grads").wait()
    return {value for each in tensors for value in each.unique().tolist()}


@pytest.mark.parametrize("kind", ["shared memory", "pairwise", "two levels"])
def test_ranks_may_start_more_calls_than_a_board_holds(ranks, kind):
    assert ranks(4, start_many_before_waiting, kind) == [{10.0}] * 4


def tell(rank):
    dist.send(torch.ones(1), dst=rank)


def hear(rank):
    dist.recv(torch.empty(1), src=rank)


def keep_a_call_open_over_a_ring():
    """Rank 1 comes last to each call, and waits for the first one when it has started 128 others.

    What it then says of the first one must not be taken for word of the last, which it has not summed.
    """
    group = served("shared memory")
    total = torch.full((100_000,), float(group.rank + 1))
    held = group.all_gather(torch.empty(2000), torch.full((1000,), float(group.rank)), label="held")
    if group.rank == 0:
        held.wait()
        for _ in range(RING_CALLS - 1):
            pending = group.all_reduce(torch.ones(4), label="small")
            tell(1)
            pending.wait()
        pending = group.all_reduce(total, label="large")  # starts when rank 1 is through with the first call
        is_there_early = pending.poll()
        tell(1)
    else:
        is_there_early = False
        for _ in range(RING_CALLS - 1):
            hear(0)
            group.all_reduce(torch.ones(4), label="small").wait()
        pending = group.all_reduce(total, label="large")
        held.wait()
        hear(0)  # which takes no step of a call
    pending.wait()
    return is_there_early, total.unique().tolist()


def test_a_call_kept_open_over_a_ring_of_others_is_not_taken_for_the_last(ranks):
    assert ranks(2, keep_a_call_open_over_a_ring, deadline_s=20) == [(False, [3.0])] * 2


def differ_long_ago(how):
    group = served("pairwise")
    num_elements = 101 if group.rank else 100
    pending = [group.all_reduce(torch.ones(num_elements if n == 3 else 100), label=f"g{n}") for n in range(40)]
    waited = pending if group.rank == 0 or how == "both ahead" else pending[:4]
    return message_of(lambda: [each.wait() for each in waited])


@pytest.mark.parametrize("how", ["both ahead", "one ahead"])
def test_a_difference_many_calls_ago_is_told_with_both_sides(ranks, how):
    for message in ranks(2, differ_long_ago, how):
        assert "MismatchError" in message
        assert (
            "all_reduce g3 (#3 of dp: 100 x float32" in message and "all_reduce g3 (#3 of dp: 101 x float32" in message
        )


def wait_in_another_order(how):
    """Rank 0 waits for rank 1 by other means before it waits for its sum; rank 1 waits for its sum first."""
    group = zcore.comm.collectives_of()
    other = dist.new_group()
    total, message = torch.ones(100_000), torch.ones(3)
    pending = group.all_reduce(total, label="grads")
    if how == "first use":
        acts = [lambda: zcore.comm.all_reduce(message, group=other)] * 2
    else:
        acts = [
            lambda: group.recv(message, src=1, label="m").wait(),
            lambda: group.send(message, dst=0, label="m").wait(),
        ]
    if group.rank == 0:
        acts[0]()
        pending.wait()
    else:
        pending.wait()
        acts[1]()
    return total.unique().tolist()


@pytest.mark.parametrize("how", ["message", "first use"])
def test_steps_go_on_while_a_rank_waits_for_a_message_or_a_new_group(ranks, how):
    assert ranks(2, wait_in_another_order, how, group_timeout_s=10.0) == [[2.0]] * 2


def send_between_sums(kind):
    """Some ranks exchange messages that others know nothing of, and all sum before and after."""
    if kind != "core":
        move_to_hosts_of(kind)
    group = serve(dist.group.WORLD, name="dp") if kind != "core" else TorchCollectives(dist.group.WORLD, name="dp")
    message, total = torch.full((5,), float(group.rank)), torch.ones(30_000)
    group.all_reduce(total, label="before").wait()
    if group.rank == 0:
        for dst in (1, 2):
            group.send(message, dst=dst, label="m").wait()
    elif group.rank < 3:
        group.recv(message, src=0, label="m").wait()
    group.all_reduce(total, label="after").wait()
    calls = group.traffic.calls
    return message.unique().tolist(), total.unique().tolist(), calls["send"], calls["recv"], calls["all_reduce"]


@pytest.mark.parametrize("kind", ["core", "shared memory", "pairwise", "two levels"])
def test_messages_between_some_ranks_are_counted_and_no_calls_of_the_group(ranks, kind):
    assert ranks(4, send_between_sums, kind, group_timeout_s=10.0) == [
        ([0.0], [16.0], 2, 0, 2),
        ([0.0], [16.0], 0, 1, 2),
        ([0.0], [16.0], 0, 1, 2),
        ([3.0], [16.0], 0, 0, 2),
    ]


def report_while_calls_are_held(how):
    group = zcore.comm.collectives_of()
    with zcore.comm.record() as recording:
        zcore.comm.limit_in_flight(1 << 20)
        pending = [group.all_reduce(torch.ones(1 << 18), label=label) for label in ("first", "second")]
        if group.rank == 1:
            pending[0].wait()  # starts what is held back here, not on rank 0
        report = recording.report(group if how == "held" else dist.group.WORLD)
        for each in pending:
            each.wait()
        zcore.comm.limit_in_flight(None)
    return report is not None


@pytest.mark.parametrize("how", ["held", "of a process group"])
def test_a_report_does_not_overtake_what_is_held_back(ranks, how):
    assert ranks(2, report_while_calls_are_held, how, group_timeout_s=10.0) == [True] * 2


def free_in_a_child():
    """A forked child lets go of a gathered buffer; its parent still reads it when the leader gathers another."""
    group = served("shared memory")

    def gathered(value):
        buffer = group.empty(200_000, dtype=torch.float32, device=CPU)
        group.free_storage(buffer)
        group.all_gather(buffer, torch.full((100_000,), value), label="w").wait()
        return buffer

    kept = gathered(1.0)
    dist.barrier()
    if group.rank == 1:
        child = os.fork()
        if child == 0:
            group.free_storage(kept)
            os._exit(0)
        os.waitpid(child, 0)
    else:
        group.free_storage(kept)
    dist.barrier()
    gathered(7.0)
    return kept.unique().tolist() if group.rank == 1 else [1.0]


def test_a_child_cannot_free_what_its_parent_holds(ranks):
    assert ranks(2, free_in_a_child) == [[1.0]] * 2


def come_after_connections_are_closed():
    """Rank 2 calls when the others have given up: an error that names the first, not the backend's."""
    group = served("pairwise", timeout_s=1.5)
    group.all_reduce(torch.ones(4), label="warm").wait()
    if group.rank == 2:
        dist.barrier()
    message = message_of(lambda: group.all_reduce(torch.ones(100), label="grads").wait())
    if group.rank != 2:
        dist.barrier()
    return message


def test_who_comes_after_the_others_gave_up_is_told_why(ranks):
    messages = ranks(3, come_after_connections_are_closed)
    assert all("CollectiveError" in each and "the timeout of 1.5 s has passed" in each for each in messages), messages
