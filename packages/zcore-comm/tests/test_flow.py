"""Calls beyond the limit wait their turn: by priority between groups, in the order of the calls within one."""

import re
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import zcore.comm
from zcore.comm.calls.flow import FLOW, Flow, choose_next
from zcore.comm.calls.requests import DeferrableCollectives
from zcore.core.errors import CollectiveError, ConfigError, StateError
from zcore.core.torch_collectives import TorchCollectives

held_calls = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=30)


@given(held_calls)
def test_starts_keep_the_order_of_each_group_and_nothing_urgent_stands_behind_another_group(held):
    left, started = list(enumerate(held)), []
    while left:
        urgent = min(priority for _, (_, priority) in left)
        index, (group, priority) = left.pop(choose_next([call for _, call in left]))
        # Either it is as urgent as any, or it stands before one of its group that is.
        assert priority == urgent or any(each == (group, urgent) for _, each in left)
        started.append((group, index))
    for name in "abc":
        indices = [index for group, index in started if group == name]
        assert indices == sorted(indices)


@pytest.mark.parametrize("limit", [0, -1, "64MB", 1e6])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit):
    expected = f"limit on bytes in flight is {limit!r}; expected a number of bytes, 1 or more. None lifts it"
    for act in (Flow, zcore.comm.limit_in_flight):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            act(limit)
    assert FLOW.limit_bytes is None


def noted(group, starts):
    """The group, with what starts on it noted."""

    def start(request):
        starts.append(request.label)
        return request.start_on(group)

    return DeferrableCollectives(group, start=start, flush=lambda: None)


def two_groups(flow):
    starts = []
    sums, gathers = (TorchCollectives(dist.new_group(), name=name) for name in ("sums", "gathers"))
    return starts, flow.around(noted(sums, starts)), flow.around(noted(gathers, starts))


def run_ahead():
    """Four calls of 400 bytes under a limit of 800; ranks wait in opposite orders."""
    flow = Flow(800)
    starts, sums, gathers = two_groups(flow)
    rank = sums.rank
    tensors = [torch.full((100,), float(rank + number)) for number in range(4)]
    gathered = torch.empty(100)
    pending = [sums.all_reduce(tensors[0], label="sum 0"), sums.all_reduce(tensors[1], label="sum 1")]
    pending.append(sums.all_reduce(tensors[2], label="sum 2"))
    pending.append(sums.all_reduce(tensors[3], label="sum 3", priority=2))
    pending.append(gathers.all_gather(gathered, torch.full((50,), float(rank)), label="gather"))
    seen = [(list(starts), flow.in_flight_bytes, flow.held_bytes)]
    for each in pending if rank else reversed(pending):
        each.wait()
        each.wait()
        seen.append((list(starts), flow.in_flight_bytes, flow.held_bytes))
    return seen, [tensor[0].item() for tensor in tensors], gathered[[0, 99]].tolist()


def test_what_is_beyond_the_limit_starts_at_the_first_wait_urgent_calls_first(ranks):
    everything = ["sum 0", "sum 1", "gather", "sum 2", "sum 3"]
    for seen, sums, gathered in ranks(2, run_ahead):
        assert seen[0] == (["sum 0", "sum 1"], 800, 1200)
        assert [each[0] for each in seen[1:]] == [everything] * 5
        assert [each[1:] for each in seen[1:]] == [(1600 - 400 * number, 0) for number in range(5)]
        assert (sums, gathered) == ([1.0, 3.0, 5.0, 7.0], [0.0, 1.0])


def large_and_lifted():
    flow = Flow(100)
    starts, sums, gathers = two_groups(flow)
    tensors = [torch.ones(100) for _ in range(3)]
    first = sums.all_reduce(tensors[0], label="larger than the limit")
    after_first = list(starts)
    second = sums.all_reduce(tensors[1], label="held")
    after_second = list(starts)
    if sums.rank == 0:
        sums.send(tensors[2], dst=1, label="message").wait()
    else:
        sums.recv(tensors[2].zero_(), src=0, label="message").wait()
    after_message = list(starts)
    third = gathers.broadcast(tensors[2], src=0, label="held, too")
    after_third = list(starts)
    flow.limit_bytes = None
    after_lifting = list(starts)
    for pending in (third, second, first):
        pending.wait()
    return after_first, after_second, after_message, after_third, after_lifting, [each.sum().item() for each in tensors]


def test_a_call_larger_than_the_limit_goes_alone_and_lifting_the_limit_or_a_message_starts_the_rest(ranks):
    names = ["larger than the limit", "held", "held, too"]
    expected = names[:1], names[:1], names[:2], names[:2], names, [200.0, 200.0, 100.0]
    assert ranks(2, large_and_lifted) == [expected] * 2


class Done:
    def wait(self):
        """Nothing is to be waited for."""


class Gate:
    """A group whose call "slow" starts once `open` is set, as one that waits for other ranks."""

    def __init__(self):
        self.is_at_it, self.open, self.starts = threading.Event(), threading.Event(), []
        self.collectives = DeferrableCollectives(None, start=self.start, flush=lambda: None)

    def start(self, request):
        if request.label == "slow":
            self.is_at_it.set()
            assert self.open.wait(10), "the call that would open it did not start"
        self.starts.append(request.label)
        return Done()


def test_a_start_that_waits_for_other_ranks_keeps_no_call_of_another_group_from_starting():
    flow, gate = Flow(), Gate()
    slow = flow.around(gate.collectives)
    quick = flow.around(DeferrableCollectives(None, start=lambda request: gate.open.set() or Done(), flush=None))
    thread = threading.Thread(target=lambda: slow.all_reduce(torch.ones(1), label="slow").wait())
    thread.start()
    assert gate.is_at_it.wait(10)
    quick.all_reduce(torch.ones(1), label="quick").wait()
    thread.join()
    assert (gate.starts, flow.in_flight_bytes, flow.held_bytes) == (["slow"], 0, 0)


def test_a_thread_does_not_wait_in_the_start_of_another_ones_call():
    flow, gate, mailbox = Flow(4), Gate(), Mailbox()
    theirs, own = flow.around(gate.collectives), flow.around(mailbox.collectives)
    has_begun, may_wait, pending = threading.Event(), threading.Event(), []

    def use_the_other_group():
        pending.extend(theirs.all_reduce(torch.ones(1), label=label) for label in ("first", "slow"))
        has_begun.set()
        assert may_wait.wait(10)
        for each in pending:
            each.wait()

    thread = threading.Thread(target=use_the_other_group)
    thread.start()
    assert has_begun.wait(10)
    call = own.all_reduce(torch.ones(1), label="own")
    assert (gate.starts, mailbox.starts, flow.held_bytes) == (["first"], [], 8)
    call.wait()  # starts "slow" as well, which waits for what comes after this
    assert (gate.starts, mailbox.starts) == (["first"], ["own"])
    gate.open.set()
    may_wait.set()
    thread.join()
    assert (gate.starts, flow.in_flight_bytes, flow.held_bytes) == (["first", "slow"], 0, 0)


def test_a_call_whose_start_was_interrupted_in_the_wait_for_another_one_says_so():
    flow, started = Flow(4), []

    def start(request):
        if request.label == "held":
            raise KeyboardInterrupt
        started.append(request.label)
        return Done()

    group = flow.around(DeferrableCollectives(None, start=start, flush=None))
    first, held, last = (group.all_reduce(torch.ones(1), label=label) for label in ("first", "held", "last"))
    with pytest.raises(KeyboardInterrupt):
        first.wait()
    assert (flow.in_flight_bytes, flow.held_bytes) == (8, 0)  # of the first and the last
    for _ in range(2):
        with pytest.raises(CollectiveError, match="all_reduce held was interrupted when it was to start"):
            held.wait()
    first.wait()
    with pytest.raises(StateError, match="all_reduce last: this group has ended, as all_reduce held was interrupted"):
        last.wait()  # to the others it is the call after the one that was interrupted
    assert (started, flow.in_flight_bytes) == (["first"], 0)


def test_a_call_that_nobody_got_is_not_counted_nor_started_later():
    flow, started = Flow(4), []

    def start(request):
        if request.label == "held":
            raise KeyboardInterrupt
        started.append(request.label)
        return Done()

    group = flow.around(DeferrableCollectives(None, start=start, flush=None))
    first, held = (group.all_reduce(torch.ones(1), label=label) for label in ("first", "held"))
    flow.count_out(first)  # as a wait in another thread does, which is about to start what is held
    with pytest.raises(KeyboardInterrupt):
        group.all_reduce(torch.ones(1), label="last")  # starts what is held
    with pytest.raises(CollectiveError):
        held.wait()
    first.wait()
    assert (started, flow.in_flight_bytes, flow.held_bytes) == (["first"], 0, 0)


def test_a_call_that_another_groups_start_kept_from_its_maker_is_not_started_later():
    flow, started = Flow(4), []

    def interrupted(request):
        raise KeyboardInterrupt

    def start(request):
        started.append(request.label)
        return Done()

    first, second = (flow.around(DeferrableCollectives(None, start=each, flush=None)) for each in (start, interrupted))
    before = first.all_reduce(torch.ones(1), label="before")
    second.all_reduce(torch.ones(1), label="held")
    flow.count_out(before)  # as a wait in another thread does, which is about to start what is held
    with pytest.raises(KeyboardInterrupt):
        first.all_reduce(torch.ones(1), label="lost")  # its tensor may be something else from here on
    with pytest.raises(StateError, match="all_reduce lost was interrupted before it was to start"):
        first.all_reduce(torch.ones(1), label="next").wait()
    assert (started, flow.in_flight_bytes) == (["before"], 0)


def test_calls_of_a_group_start_in_their_order_whichever_threads_start_them():
    flow, gate = Flow(1), Gate()
    group = flow.around(gate.collectives)
    first = group.all_reduce(torch.ones(1), label="first")
    slow = group.all_reduce(torch.ones(1), label="slow")  # held back
    elsewhere = threading.Thread(target=first.wait)
    elsewhere.start()
    assert gate.is_at_it.wait(10)  # another thread's wait is starting it
    own = threading.Thread(target=lambda: [group.all_reduce(torch.ones(1), label="last").wait(), slow.wait()])
    own.start()
    gate.open.set()
    for thread in (elsewhere, own):
        thread.join()
    assert (gate.starts, flow.in_flight_bytes) == (["first", "slow", "last"], 0)


class Mailbox:
    """A group that takes messages, and notes in which order all of it goes out."""

    def __init__(self):
        self.starts = []
        self.collectives = DeferrableCollectives(self, start=self.start, flush=lambda: None)

    def start(self, request):
        if request.label == "bad":
            raise StateError("bad does not start")
        return self.note(request.label)

    def note(self, label):
        self.starts.append(label)
        return Done()

    def send(self, tensor, *, dst, label):
        return self.note(label)

    def recv(self, tensor, *, src, label):
        return self.note(label)


each_way = pytest.mark.parametrize("way", ["send", "recv"])
PEER = {"send": {"dst": 1}, "recv": {"src": 1}}


def message(group, way):
    getattr(group, way)(torch.ones(1), **PEER[way], label="message").wait()


@each_way
def test_a_message_goes_behind_what_another_thread_has_chosen_of_its_group_and_not_begun(way):
    flow, gate, mailbox = Flow(1), Gate(), Mailbox()
    slow, group = flow.around(gate.collectives), flow.around(mailbox.collectives)
    first = slow.all_reduce(torch.ones(1), label="first")
    slow.all_reduce(torch.ones(1), label="slow")  # from here on calls are held back
    bad, good = [group.all_reduce(torch.ones(1), label=label) for label in ("bad", "good")]
    elsewhere = threading.Thread(target=first.wait)
    elsewhere.start()
    assert gate.is_at_it.wait(10)  # it has chosen all of them, and is starting "slow", which waits for other ranks
    assert (flow.held_bytes, mailbox.starts) == (0, [])
    message(group, way)
    assert mailbox.starts == ["good", "message"]
    gate.open.set()
    elsewhere.join()
    good.wait()
    with pytest.raises(StateError, match="bad does not start"):  # here, not where the message went
        bad.wait()
    assert (gate.starts, mailbox.starts) == (["first", "slow"], ["good", "message"])


@each_way
def test_a_message_goes_behind_a_call_of_its_group_that_another_thread_is_starting(way):
    flow, mailbox = Flow(), Mailbox()
    is_at_it, open_gate = threading.Event(), threading.Event()

    def start(request):
        is_at_it.set()
        assert open_gate.wait(10)
        return mailbox.note(request.label)

    group = flow.around(DeferrableCollectives(mailbox, start=start, flush=lambda: None))
    threads = [
        threading.Thread(target=lambda: group.all_reduce(torch.ones(1), label="slow").wait()),
        threading.Thread(target=message, args=(group, way)),
    ]
    threads[0].start()
    assert is_at_it.wait(10)
    threads[1].start()
    threads[1].join(0.1)  # it is not to go
    assert mailbox.starts == []
    open_gate.set()
    for thread in threads:
        thread.join()
    assert mailbox.starts == ["slow", "message"]


def limit_the_functions():
    zcore.comm.limit_in_flight(100)
    tensors = [torch.ones(20) for _ in range(4)]
    works = [zcore.comm.all_reduce(tensor, async_op=True) for tensor in tensors]
    held = FLOW.held_bytes
    works[3].wait()
    left = FLOW.held_bytes, FLOW.in_flight_bytes
    zcore.comm.limit_in_flight(None)
    for work in works:
        work.wait()
    return held, left, FLOW.in_flight_bytes, [tensor[0].item() for tensor in tensors]


def test_the_functions_of_the_package_keep_the_limit_of_the_process(ranks):
    assert ranks(2, limit_the_functions) == [(240, (0, 240), 0, [2.0] * 4)] * 2
