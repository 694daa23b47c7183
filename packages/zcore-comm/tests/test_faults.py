"""A rank that is killed, stopped or does not come is named on all others, with what it did last."""

import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from zcore.comm.choice import offer
from zcore.core.testing import RankFailed


def work_until_it_happens(signal_number, size):
    world = dist.new_group(timeout=timedelta(seconds=2))
    group = offer(world, name="dp")
    assert group is not None
    for number in range(3):
        group.all_reduce(torch.ones(100), label=f"grads.{number}").wait()
    if group.rank == 1:
        os.kill(os.getpid(), signal_number)
    tensor = torch.ones(size)
    group.all_reduce(tensor, label="grads.3").wait()


@pytest.mark.parametrize("size", [100, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_that_is_killed_is_named_by_all_others(ranks, world_size, size):
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, work_until_it_happens, signal.SIGKILL, size)
    others = [failure for failure in caught.value.failures if failure.rank != 1]
    assert len(others) == world_size - 1
    for failure in others:
        assert failure.type_name == "CollectiveError"
        for words in ("all_reduce grads.3 (#3 of dp", "raised, was killed, or left", "restart all ranks"):
            assert words in failure.message
    assert any(
        "rank 1 has ended, its last call was all_reduce grads.2 (100 x float32)" in each.message for each in others
    )


def test_a_rank_that_is_stopped_is_named_when_the_timeout_has_passed(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, work_until_it_happens, signal.SIGSTOP, 100, grace_s=1.0)
    (failure,) = [each for each in caught.value.failures if each.rank == 0]
    assert failure.type_name == "CollectiveError"
    for words in ("the timeout of 2 s has passed", "rank 1 is alive, its last call was all_reduce grads.2"):
        assert words in failure.message
