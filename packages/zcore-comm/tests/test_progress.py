"""Waiting gives the processor away, and still ends when its time is over."""

import os
import time

import torch.distributed as dist

from zcore.comm.progress import is_reached_within
from zcore.core import compat


def wait_beside_a_busy_rank():
    """On one processor with a rank that never gives it away: how long a wait of 0.05 s takes."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    store = compat.default_store()
    dist.barrier()
    if dist.get_rank() == 1:
        end = time.monotonic() + 20
        while not store.check(["waited"]) and time.monotonic() < end:
            sum(range(100_000))
        return 0.0
    began = time.monotonic()
    assert not is_reached_within(lambda: False, 0.05)
    store.set("waited", "1")
    return time.monotonic() - began


def test_a_wait_beside_a_busy_process_ends_in_time(ranks):
    assert ranks(2, wait_beside_a_busy_rank)[0] < 1.0
