"""What is left to do with a result is done once, and every wait, of any thread or stream, is behind it.

Events and streams of CUDA are stand-ins with torch's methods, as there is a second stream on CUDA only.
"""

import threading

import pytest
import torch

from zcore.comm.calls.work import Work
from zcore.core.errors import CollectiveError


class Sum:
    def wait(self):
        """It is there."""


def test_threads_that_wait_for_one_mean_all_return_when_it_is_divided():
    is_at_it, may_end, found = threading.Event(), threading.Event(), []
    divided = []

    def divide():
        is_at_it.set()
        assert may_end.wait(10)
        divided.append(True)

    work = Work(Sum(), divide)
    threads = [threading.Thread(target=lambda: found.append(work.wait() and list(divided))) for _ in range(2)]
    threads[0].start()
    assert is_at_it.wait(10)
    threads[1].start()
    threads[1].join(0.1)  # it is not to return
    may_end.set()
    for thread in threads:
        thread.join()
    assert found == [[True]] * 2


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_threads_that_wait_for_one_mean_all_meet_what_ended_its_division_which_is_not_tried_again(failure):
    is_at_it, may_end, found, divided = threading.Event(), threading.Event(), [], []

    def divide():
        divided.append(True)
        is_at_it.set()
        assert may_end.wait(10)
        raise failure

    def wait():
        try:
            found.append(work.wait())
        except (RuntimeError, KeyboardInterrupt) as error:
            found.append(error)

    work = Work(Sum(), divide)
    threads = [threading.Thread(target=wait) for _ in range(3)]
    threads[0].start()
    assert is_at_it.wait(10)
    for thread in threads[1:]:
        thread.start()
    may_end.set()
    for thread in threads:
        thread.join()
    wait()  # afterwards, too
    assert divided == [True]  # a second division would make another number of what the first one has divided
    first, *others = found
    assert first is failure
    if isinstance(failure, RuntimeError):
        assert all(each is failure for each in others), found
    else:
        assert all(isinstance(each, CollectiveError) and each.__cause__ is failure for each in others), found
        assert "was interrupted" in str(others[0])


class Event:
    def __init__(self, log):
        self.log = log

    def record(self, stream):
        self.log.append(f"event on {stream.device}")


def test_streams_that_wait_later_are_behind_what_the_first_one_does_with_the_result(monkeypatch):
    log = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_event(self, event):
            log.append((self.device, event))

    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    second = torch.device("cuda:1")  # not the thread's current one
    work = Work(Sum(), lambda: log.append("divided"), device=second)
    assert work.wait() and work.wait() and work.wait()
    assert log[:2] == ["divided", "event on cuda:1"]
    assert [(device, type(event)) for device, event in log[2:]] == [(second, Event)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_second_stream_of_cuda_reads_what_the_first_one_has_divided():
    result = torch.full((1 << 26,), 8.0, device="cuda")

    def divide():
        torch.cuda._sleep(100_000_000)  # cycles: longer than the second stream needs to come
        result.div_(4)

    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    work = Work(Sum(), divide, device=result.device)
    with torch.cuda.stream(first):
        work.wait()
    with torch.cuda.stream(second):
        work.wait()
        seen = result.sum()
    torch.cuda.synchronize()
    assert seen.item() == 2.0 * result.numel()
