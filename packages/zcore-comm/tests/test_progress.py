"""Waiting gives the processor away, and still ends when its time is over."""

import itertools
import os
import time

import pytest
import torch.distributed as dist

from zcore.comm.progress import LOOKS, TURN_S, is_reached_within
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


class Machine:
    """One on which a yield takes as long as it is told to, in place of the system's clock."""

    def __init__(self, *, yield_s):
        self.now_s, self.yield_s, self.yields, self.naps = 0.0, yield_s, 0, 0

    def monotonic(self):
        return self.now_s

    def sched_yield(self):
        self.yields += 1
        self.now_s += self.yield_s

    def sleep(self, time_s):
        self.naps += 1
        self.now_s += time_s


@pytest.mark.parametrize(("yield_s", "yields", "naps"), [(TURN_S / 10, 6, 0), (10 * TURN_S, 1, 4)])
def test_who_yields_and_comes_last_again_naps_instead(monkeypatch, yield_s, yields, naps):
    machine, looks = Machine(yield_s=yield_s), itertools.count(1)
    monkeypatch.setattr("zcore.comm.progress.time", machine)
    monkeypatch.setattr("os.sched_yield", machine.sched_yield)
    assert is_reached_within(lambda: next(looks) == LOOKS + 6, 1.0)
    assert (machine.yields, machine.naps) == (yields, naps)
