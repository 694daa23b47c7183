"""Groups beside each other: of one name, in several threads, after an error, in a forked child, in a second life."""

import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hosts import message_of, move_to_hosts_of

from zcore import comm
from zcore.comm.choice import offer, serve
from zcore.comm.memory.pages import available_bytes
from zcore.core import compat
from zcore.core.testing import RankFailed

CPU = torch.device("cpu")
each_kind = pytest.mark.parametrize("kind", ["shared memory", "pairwise"])


def reduce_in_two_groups_of_one_name(kind):
    move_to_hosts_of(kind)
    first, second = (offer(dist.group.WORLD, name="dp gather") for _ in range(2))
    found = []
    for _ in range(3):
        x, y = torch.full((1_000_000,), 1.0), torch.full((1_000_000,), 100.0)
        under_way = [first.all_reduce(x, label="w"), second.all_reduce(y, label="w")]
        for each in under_way:
            each.wait()
        found.append((x.unique().tolist(), y.unique().tolist()))
    return found


@each_kind
def test_groups_of_one_name_do_not_take_each_others_data(ranks, kind):
    assert ranks(2, reduce_in_two_groups_of_one_name, kind) == [[([2.0], [200.0])] * 3] * 2


def use_in_a_forked_child(kind):
    move_to_hosts_of(kind)
    kept = comm.empty(1_000, torch.float32).fill_(1.0)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        words = [message_of(lambda: comm.all_reduce(torch.ones(5)))]
        if kind == "shared memory":
            words.append(message_of(lambda: comm.empty(1_000, torch.float32)))
        os.write(writing, "\n".join(words).encode())
        os._exit(0)
    os.waitpid(child, 0)
    total = torch.ones(5)
    comm.all_reduce(total)  # the ranks go on
    return os.read(reading, 2000).decode().splitlines(), total.tolist(), kept.unique().tolist()


@each_kind
def test_a_forked_child_is_refused_wherever_it_would_touch_what_ranks_share(ranks, kind):
    for words, total, kept in ranks(2, use_in_a_forked_child, kind):
        assert (total, kept) == ([2.0] * 5, [1.0])
        for each in words:
            assert each.startswith("StateError: ")
            assert "forked child" in each


def wait_twice_for_what_failed():
    world = dist.group.WORLD
    good, bad = (serve(world, name=name) for name in ("good", "bad"))
    x = torch.ones(100)
    of_good = good.all_reduce(x, label="x")
    of_bad = bad.all_reduce(torch.ones(100 + bad.rank), label="y")
    words = [message_of(of_good.wait), message_of(of_bad.wait), message_of(of_bad.wait)]
    return words, x[0].item()


def test_an_error_is_that_of_its_own_call_and_comes_with_each_wait(ranks):
    for (good, *bad), total in ranks(2, wait_twice_for_what_failed):
        assert (good, total) == ("nothing was refused", 2.0)
        assert [each.split(":")[0] for each in bad] == ["MismatchError"] * 2


def send_more_than_there_is():
    group = serve(dist.group.WORLD, name="dp")
    # As many on each rank: of four bytes a third more than there is, as pages of the others' side.
    numel = torch.tensor(available_bytes() // 3)
    dist.broadcast(numel, src=0)
    huge = torch.empty(1).expand(int(numel))
    told = message_of(lambda: group.broadcast(huge, src=0, label="huge").wait())
    total = torch.ones(5)
    group.all_reduce(total, label="after").wait()
    return told, total.tolist()


def test_a_call_for_which_there_is_no_memory_fails_on_each_rank_and_leaves_the_group_in_step(ranks):
    (own, first), (other, second) = ranks(2, send_more_than_there_is)
    assert own.startswith("OutOfPagesError")
    assert other.startswith("CollectiveError: broadcast huge from rank 0")
    assert "rank 0 has given it up" in other
    assert [first, second] == [[2.0] * 5] * 2


NUM_OPEN = 200  # a board holds 64 calls at a time: then a start waits for the other rank


def use_a_group_in_each_thread():
    """Each thread starts many calls before it waits; rank 0 in the first group first, rank 1 in the second."""
    groups, rank = [dist.new_group(timeout=timedelta(seconds=5)) for _ in range(2)], dist.get_rank()
    for group in groups:
        comm.barrier(group)  # the first uses, in one order
    has_begun, right = threading.Event(), {}

    def work(index):
        if index != rank:
            has_begun.wait()
        calls = []
        for number in range(NUM_OPEN):
            if number == 63:
                has_begun.set()  # the next call but one waits
            whole, own = torch.empty(2), torch.full((1,), float(rank + number))
            calls.append((whole, comm.all_gather(whole, own, group=groups[index], async_op=True)))
        for _, pending in calls:
            pending.wait()
        right[index] = [whole.tolist() == [number, number + 1] for number, (whole, _) in enumerate(calls)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return right


def test_each_thread_may_use_a_group_of_its_own_with_any_number_of_open_calls(ranks):
    all_right = [True] * NUM_OPEN
    assert ranks(2, use_a_group_in_each_thread) == [{0: all_right, 1: all_right}] * 2


def live_twice(kind):
    move_to_hosts_of(kind)
    found, store, rank = [], compat.default_store(), dist.get_rank()
    for life in range(2):
        if life:
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.PrefixStore("second", store), rank=rank, world_size=2)
        total = torch.full((3,), float(life + 1))
        comm.all_reduce(total, label=f"life {life}")
        found.append(total[0].item())
    return found, [thread.name for thread in threading.enumerate()].count("zcore cards")


@each_kind
def test_a_process_may_join_a_second_run(ranks, kind):
    assert ranks(2, live_twice, kind) == [([2.0, 4.0], 1)] * 2


def stay_away_from_the_first_use():
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        serve(group, name="dp gather")


def test_who_does_not_come_to_the_first_use_of_a_group_is_named(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, stay_away_from_the_first_use)
    message = caught.value.first.message
    assert caught.value.first.type_name == "CollectiveError"
    assert "missing: rank 1" in message
    assert "first use of a group" in message


def call_over_another_backend():
    import torch.testing._internal.distributed.fake_pg  # registers a backend of torch's own tests, which sends nothing

    group = dist.new_group(backend="fake")
    with comm.record() as recording:
        comm.all_reduce(torch.ones(4), group=group, label="grads")
        comm.all_gather(torch.empty(8), torch.ones(4), group=group, label="weights")
    return [(call.op, call.label, call.algorithm) for call in recording.calls]


def test_calls_over_a_backend_that_zcore_does_not_know_are_torchs_and_recorded(ranks):
    expected = [("all_reduce", "grads", "torch fake"), ("all_gather", "weights", "torch fake")]
    assert ranks(2, call_over_another_backend) == [expected] * 2
