"""What waits for a collective of torch do: errors come each time, threads may wait together, streams are ordered.

Works, events and streams of CUDA are stand-ins with torch's methods.
"""

import os
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from zcore.core import compat
from zcore.core.collectives import CallLog
from zcore.core.errors import CollectiveError
from zcore.core.testing import RankFailed
from zcore.core.torch_collectives import TorchCollectives, TorchPending

LARGE = 100_000  # elements of fp32, above SMALL_BYTES
DEVICE = torch.device("cuda:1")  # not the thread's current one


class Work:
    """Of a device that is still at it."""

    def wait(self):
        pass

    def is_completed(self):
        return False


class Broken(Work):
    def wait(self):
        raise RuntimeError("Connection closed by peer")


class Event:
    is_reached = False

    def record(self, stream):
        assert stream.device == DEVICE

    def query(self):
        return self.is_reached


class Stream:
    def __init__(self):
        self.waits_for = []
        self.device = None

    def wait_event(self, event):
        self.waits_for.append(event)


@pytest.fixture
def streams(monkeypatch):
    """The current stream is the first of these, on whichever device is asked for."""
    found = [Stream(), Stream()]

    def current_stream(device=None):
        found[0].device = device
        return found[0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    return found


def pending(works, finish=None, *, label="w", **options):
    return TorchPending(CallLog("dp").note("all_reduce", label, torch.ones(1)), works, finish, **options)


def errors_of(waited):
    """What each wait said, up to the call's name."""
    found = []
    for each in waited:
        try:
            each.wait()
            found.append("returned")
        except CollectiveError as error:
            found.append(" ".join(str(error).split()[:2]))
    return found


def lose_a_peer():
    group = TorchCollectives(dist.group.WORLD, name="dp")
    group.all_reduce(torch.ones(1), label="all are here").wait()
    if group.rank == 1:
        os._exit(1)
    started = [
        group.all_reduce(torch.ones(LARGE), label="a"),
        group.all_reduce(torch.ones(LARGE), label="b"),
        group.reduce_scatter(torch.empty(LARGE), torch.ones(2 * LARGE), label="c"),
        group.all_reduce(torch.ones(8), label="d"),
        group.all_gather(torch.empty(2 * LARGE), torch.ones(LARGE), label="e"),
    ]
    first, second, *others = started
    return errors_of([second, first, second, first, *others, *others])


def test_each_wait_says_of_its_own_call_that_a_peer_is_gone(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, lose_a_peer)
    a, b, *others = "all_reduce a", "all_reduce b", "reduce_scatter c", "all_reduce d", "all_gather e"
    assert caught.value.results[0] == [b, a, b, a, *others, *others]


def test_a_call_that_waits_for_one_before_it_does_not_tell_its_error():
    failed, good = pending([Broken()], label="failed").line_up(), pending([Work()], label="good").line_up()
    assert errors_of([good, failed, good, failed]) == ["returned", "all_reduce failed"] * 2


class Interrupted(Work):
    """Ctrl-C comes while somebody first waits for it."""

    is_over = False

    def wait(self):
        if not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["torch's wait", "the sum"])
def test_who_waits_again_after_an_interrupt_is_refused(where):
    work = Interrupted()
    call = pending([work], label="grads") if where == "torch's wait" else pending([], work.wait, label="grads")
    with pytest.raises(KeyboardInterrupt):
        call.wait()
    for _ in range(2):
        with pytest.raises(CollectiveError, match=r"all_reduce grads .* was interrupted while .* undefined\. Restart"):
            call.wait()


def test_an_interrupt_is_told_by_the_call_it_struck_and_those_behind_it_go_on():
    struck, behind = pending([Interrupted()], label="struck").line_up(), pending([Work()], label="behind").line_up()
    with pytest.raises(KeyboardInterrupt):  # of whoever waits, for whatever call
        behind.wait()
    assert errors_of([behind, struck, behind]) == ["returned", "all_reduce struck", "returned"]


def frames_of(thread):
    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        yield frame
        frame = frame.f_back


def interrupt_a_sum(op):
    """Rank 0 gets SIGINT while it waits for rank 1, which comes only then; and waits again."""
    group, store = TorchCollectives(dist.group.WORLD, name="dp"), compat.default_store()
    whole, part = torch.ones(2 * LARGE), torch.empty(LARGE)

    def start():
        if op == "reduce_scatter":
            return group.reduce_scatter(part, whole, label="grads")
        return group.all_reduce(whole, label="grads")

    if group.rank == 1:
        store.wait(["interrupted"])
        start()
        return None
    waiting = threading.current_thread()

    def interrupt_and_go_on():
        while all(frame.f_code is not TorchPending._end_works.__code__ for frame in frames_of(waiting)):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        store.set("interrupted", "1")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    call = start()
    threading.Thread(target=interrupt_and_go_on).start()
    with pytest.raises(KeyboardInterrupt):
        call.wait()
    return errors_of([call, call])


@pytest.mark.parametrize("op", ["reduce_scatter", "all_reduce"])
def test_ctrl_c_in_a_wait_for_another_rank_hangs_nobody_who_waits_again(ranks, op):
    assert ranks(2, interrupt_a_sum, op, deadline_s=20) == [[f"{op} grads"] * 2, None]


def test_a_call_is_not_completed_before_what_is_left_to_wait_is_done():
    left_to_wait = pending([], lambda: None)
    assert not left_to_wait.is_completed()
    left_to_wait.wait()
    assert left_to_wait.is_completed()


def test_threads_that_wait_for_one_call_all_return_with_its_result():
    is_at_it, may_end, result, found = threading.Event(), threading.Event(), [], []

    def finish():
        is_at_it.set()
        assert may_end.wait(10)
        result.append("sum")

    call = pending([], finish)

    def wait():
        call.wait()
        found.append(list(result))

    threads = [threading.Thread(target=wait) for _ in range(2)]
    threads[0].start()
    assert is_at_it.wait(10)
    threads[1].start()
    threads[1].join(0.1)  # it is not to return
    may_end.set()
    for thread in threads:
        thread.join()
    assert found == [["sum"]] * 2


def test_every_stream_that_waits_is_ordered_behind_the_works_and_these_are_let_go_of(streams):
    work = Work()
    is_held = weakref.ref(work)
    call = pending([work], device=DEVICE)
    del work
    call.wait()
    first, second = streams
    assert is_held() is None  # it would hold the tensors
    assert first.waits_for == []  # torch's own wait has ordered it
    streams.reverse()
    call.wait()
    call.wait()
    (event, again) = second.waits_for
    assert event is again
    assert not call.is_completed()
    event.is_reached = True
    assert call.is_completed()


def test_a_call_whose_device_is_still_at_it_is_not_completed_wherever_a_wait_comes_between(streams):
    for stop in range(1, 10):
        call, lines = pending([Work()], device=DEVICE), []

        def wait_between(frame, event, _, call=call, lines=lines, stop=stop):
            """What another thread does while this one is before its line number `stop` of `is_completed`."""
            if frame.f_code is not TorchPending.is_completed.__code__:
                return None
            if event == "line":
                lines.append(frame.f_lineno)
                if len(lines) == stop:
                    call.wait()
            return wait_between

        tracing = sys.gettrace()
        sys.settrace(wait_between)
        try:
            is_completed = call.is_completed()
        finally:
            sys.settrace(tracing)
        assert not is_completed, lines
        if len(lines) < stop:
            return
    pytest.fail("is_completed has more lines than were tried")
