"""Calls on two levels while several threads are at them: none is left behind, and none outlives a failure.

What another thread does is done before each line of a start in turn, by a trace of the thread that starts.
"""

import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from hosts import move_to_hosts_of

from zcore.comm.choice import serve
from zcore.comm.hierarchical import HierarchicalCollectives
from zcore.comm.progress import LOCK, has_steps, is_reached_napping
from zcore.core import compat
from zcore.core.errors import ZcoreError

NUM_LINES = 16  # more than a start has
WAIT_S = 10.0
TIMEOUT_S = 10.0  # after which a call that is left behind is told


@contextmanager
def before_line(number, act):
    """Do `act` before line `number` of what begins and starts a call in this thread; gives those there were."""
    codes = [HierarchicalCollectives._starting.__wrapped__.__code__, HierarchicalCollectives._start.__code__]
    lines = []

    def trace(frame, event, _):
        if frame.f_code not in codes:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == number:
                act()
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(tracing)


def is_taken():
    """Whether another thread takes steps, or may be about to."""
    if LOCK.acquire(blocking=False):
        LOCK.release()
        return False
    return True


def close():
    """Have another thread end what is open, unless the one that starts keeps it from doing so."""
    thread = threading.Thread(target=lambda: is_reached_napping(lambda: not has_steps() or is_taken(), WAIT_S))
    thread.start()
    thread.join()


def close_while_starting():
    """On rank 0 another thread brings the only open call to its end while the next one starts."""
    move_to_hosts_of("two levels")
    group = serve(dist.new_group(timeout=timedelta(seconds=TIMEOUT_S)), name="dp")
    found = []
    for number in range(1, NUM_LINES):
        first, second = torch.ones(4), torch.full((4,), 2.0)
        under_way = group.all_reduce(first, label="first")

        if group.rank == 0:
            with before_line(number, close):
                behind = group.all_reduce(second, label="second")
        else:
            under_way.wait()
            behind = group.all_reduce(second, label="second")
        behind.wait()
        under_way.wait()
        found.append((first.unique().tolist(), second.unique().tolist()))
    return found


def test_a_call_that_starts_while_another_thread_ends_the_last_open_one_is_brought_to_its_end(ranks):
    assert ranks(4, close_while_starting, deadline_s=40) == [[([4.0], [8.0])] * (NUM_LINES - 1)] * 4


def end_of(act):
    try:
        act()
    except ZcoreError as error:
        cause = "NotImplementedError"  # that other ranks are told of, too
        return cause if cause in str(error) else type(error).__name__
    return "nothing was refused"


def break_while_starting():
    """On rank 0 a step of another thread's call fails while a call starts; the other ranks call nothing."""
    move_to_hosts_of("two levels")
    process_group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    groups = [serve(process_group, name="dp") for _ in range(NUM_LINES)]
    found = []
    for number, group in enumerate(groups if groups[0].rank == 0 else [], start=1):
        before = group.all_reduce(torch.ones(4), label="before")
        bad = partial(group.all_reduce, torch.empty(4, device="meta"), label="bad")  # has no data to show in step 1
        thread = threading.Thread(target=end_of, args=(bad,))

        def fail(thread=thread):
            thread.start()
            thread.join(0.1)  # longer than it takes, unless this thread keeps it from it

        def start(group=group):
            group.all_reduce(torch.ones(4), label="starting").wait()

        with before_line(number, fail) as lines:
            starting = end_of(start)
        if number > len(lines) or starting == "CollectiveError":  # it was left behind, and came to the timeout
            break
        thread.join()
        after = partial(group.all_reduce, torch.ones(4), label="after")
        found.append((end_of(before.wait), starting, end_of(after)))
    dist.barrier()
    return found


def test_no_call_is_left_open_when_a_step_fails_in_another_thread_while_it_starts(ranks):
    found, *_ = ranks(4, break_while_starting, deadline_s=50)
    assert len(found) > 10, found
    for before, starting, after in found:
        assert (before, after) == ("NotImplementedError", "StateError"), found  # not that the timeout has passed
        assert starting in ("NotImplementedError", "StateError"), found


def start_many_sums(count):
    """Rank 0 before it waits for the first call, which the others wait for at once; rank 2 comes late."""
    move_to_hosts_of("two levels")
    group = serve(dist.new_group(timeout=timedelta(seconds=TIMEOUT_S)), name="dp")
    sums = [torch.zeros(100) for _ in range(count)]
    if group.rank == 2:
        compat.default_store().wait(["started"])
    first = group.all_reduce(torch.ones(200_000), label="loss")
    if group.rank:
        first.wait()
    small = group.all_reduce(torch.ones(4), label="norm")  # takes one place in the host, each sum one for each host
    under_way = [first, small, *(group.reduce_scatter(each, torch.ones(400), label="grads") for each in sums)]
    if group.rank == 0:
        compat.default_store().set("started", "")
    for each in under_way:
        each.wait()
    return {each[0].item() for each in sums}


def test_as_many_sums_are_started_ahead_as_the_host_has_room_for(ranks):
    assert ranks(4, start_many_sums, 60) == [{4.0}] * 4
