"""An interrupt, wherever it comes in a call, never makes a wrong result: the call ends with an error on every rank.

It is raised in place of one line of ours, where a signal may come, and the program goes on as none should.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from random import Random

import pytest
import torch
import torch.distributed as dist
from hosts import message_of, move_to_hosts_of

import zcore.comm
from zcore.comm.choice import serve
from zcore.comm.pairs.moves import Pairs
from zcore.comm.pairs.worker import Task
from zcore.comm.progress import LOCK
from zcore.comm.ranks.cards import Cards
from zcore.core import compat
from zcore.core.errors import ZcoreError
from zcore.core.testing import RankFailed

CPU = torch.device("cpu")
TIMEOUT_S, SOON_S = 20, 10
LARGE = 4_000_000  # elements of fp32


def served(kind):
    move_to_hosts_of(kind)
    return serve(dist.new_group(timeout=timedelta(seconds=TIMEOUT_S)), name="dp")


class Interrupting:
    """`inner`, but for a method that is interrupted the first time, before or after it has done its work."""

    def __init__(self, inner, method, *, is_done=False):
        self.inner, self.method, self.is_done, self.is_over = inner, method, is_done, False

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        if name != self.method or self.is_over:
            return found

        def interrupted(*args, **kwargs):
            self.is_over = True
            if self.is_done:
                found(*args, **kwargs)
            raise KeyboardInterrupt

        return interrupted


def is_interrupted_when_it_announces(is_done):
    """Rank 0, in the 201st of calls that are alike: in the ring of 128 entries another one stands at its place."""
    group, draw = served("shared memory"), Random(0)
    under_way, wrong = [], []
    for index in range(300):
        x = torch.full((4,), float(1000 * index * (group.rank == 0) + index))
        if group.rank == 0 and index == 200:
            neighbours = group._neighbours
            neighbours.board = Interrupting(neighbours.board, "start", is_done=is_done)
            with pytest.raises(KeyboardInterrupt):
                group.all_reduce(x, label="loss")
            continue
        under_way.append((index, x, group.all_reduce(x, label="loss")))
        while len(under_way) > (draw.randint(0, 5) if index < 299 else 0):
            at, total, pending = under_way.pop(0)
            said = message_of(pending.wait)
            if said != "nothing was refused" or total[0].item() != 1002 * at:
                wrong.append((at, said.partition(":")[0]))
    return wrong


@pytest.mark.parametrize("is_done", [False, True])
def test_a_call_that_is_half_announced_ends_as_one_call_on_every_rank(ranks, is_done):
    own, others = ranks(2, is_interrupted_when_it_announces, is_done)
    assert own == []
    assert others in ([], [(200, "CollectiveError")])  # it may have read what is shown before it is taken back


def is_interrupted_in_its_part(where):
    """The leader, in the second of three gathers into the same buffer, of which all ranks hold the memory."""
    group = served("shared memory")
    gathered = group.empty(200_000, dtype=torch.float32, device=CPU)
    told = []
    for step in range(3):
        group.free_storage(gathered)
        mine = torch.full((100_000,), float(10 * step + group.rank + 1))
        if group.rank == 0 and step == 1:
            neighbours = group._neighbours
            if where == "storage_of":
                group._neighbours = Interrupting(neighbours, where)
            else:
                neighbours.boards = [Interrupting(neighbours.boards[0], where), *neighbours.boards[1:]]
            with pytest.raises(KeyboardInterrupt):
                group.all_gather(gathered, mine, label="weights").wait()
            told.append("interrupted")
            continue
        said = message_of(group.all_gather(gathered, mine, label="weights").wait)
        told.append(gathered[[0, 100_000]].tolist() if said == "nothing was refused" else said.partition(":")[0])
    return told


@pytest.mark.parametrize("where", ["storage_of", "is_same"])
def test_a_part_that_was_not_written_is_nobodys_result_nor_written_later(ranks, where):
    first, second = ranks(2, is_interrupted_in_its_part, where)
    assert first == [[1.0, 2.0], "interrupted", [21.0, 22.0]]
    assert second == [[1.0, 2.0], "CollectiveError", [21.0, 22.0]]


def is_interrupted_when_it_has_read():
    group = served("shared memory")
    pending = group.all_reduce(torch.ones(100_000), label="grads")
    store = compat.default_store()
    if group.rank == 1:
        group._neighbours.board = Interrupting(group._neighbours.board, "set_stage")
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
        store.set("1", "")
    elif group.rank == 0:
        store.wait(["1"])
        message_of(pending.wait)
        store.set("0", "")
    else:
        store.wait(["0"])  # which has given the call up, too
    return message_of(pending.wait)


def test_the_rank_that_was_interrupted_is_named_by_those_that_hear_of_it_last(ranks):
    first, own, last = ranks(3, is_interrupted_when_it_has_read)
    assert "was interrupted" in own
    assert "rank 1 has given it up" in first
    assert "rank 1 has given it up" in last


def is_interrupted_when_it_starts_a_message():
    group = served("pairwise")
    group.all_reduce(torch.ones(4), label="before").wait()
    if group.rank == 0:
        send = Pairs.send

        def interrupted(*_, **__):
            Pairs.send = send
            raise KeyboardInterrupt

        Pairs.send = interrupted
        with pytest.raises(KeyboardInterrupt):
            group.all_reduce(torch.ones(4), label="grads")
    began_s = time.monotonic()
    said = message_of(lambda: group.all_reduce(torch.ones(4), label="grads").wait())
    return said, time.monotonic() - began_s


def test_a_start_that_was_interrupted_between_pairs_ends_the_group_at_once(ranks):
    (own, own_s), (other, other_s) = ranks(2, is_interrupted_when_it_starts_a_message)
    assert own.startswith("StateError: all_reduce grads: this group has ended with an error")
    assert "First seen by rank 0" in other
    assert "was interrupted by KeyboardInterrupt" in other
    assert max(own_s, other_s) < SOON_S


def codes_of(thread):
    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def interrupt_a_wait():
    """Rank 0 gets SIGINT while it waits for rank 1, which comes only then; and waits again."""
    move_to_hosts_of("pairwise")
    group, store = serve(dist.new_group(), name="dp"), compat.default_store()
    if group.rank == 1:
        store.wait(["interrupted"])
        return message_of(group.all_reduce(torch.ones(4), label="grads").wait).partition(":")[0]
    waiting = threading.current_thread()

    def interrupt():
        while Task.run.__code__ not in codes_of(waiting):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        store.set("interrupted", "1")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    pending = group.all_reduce(torch.ones(4), label="grads")
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    return [message_of(pending.wait) for _ in range(2)]


def test_who_waits_again_after_an_interrupt_is_refused_and_does_not_come_to_the_timeout(ranks):
    refused, other = ranks(2, interrupt_a_wait, deadline_s=40)
    assert all("all_reduce grads" in each and "was interrupted by" in each for each in refused), refused
    assert other in ("CollectiveError", "nothing was refused")  # as its part came before the end, or behind it


def interrupt_a_read(numel):
    """Rank 0 is interrupted between reading the others' data and telling that it has; and waits again."""
    group = serve(dist.group.WORLD, name="dp")
    pending = group.all_reduce(torch.ones(numel), label="grads")
    board, tell = group._neighbours.board, group._neighbours.board.set_stage

    def interrupted(index, stage):
        board.set_stage = tell
        raise KeyboardInterrupt

    if group.rank == 1:
        return [message_of(pending.wait)]
    board.set_stage = interrupted
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    return [message_of(pending.wait) for _ in range(2)]


@pytest.mark.parametrize("numel", [4, 100_000])
def test_a_sum_that_was_interrupted_is_refused_wherever_it_may_be_wrong(ranks, numel):
    refused, (other,) = ranks(2, interrupt_a_read, numel, deadline_s=40)
    assert all("all_reduce grads" in each and "was interrupted" in each for each in refused), refused
    is_given_up = other.startswith("CollectiveError") and "rank 0 has given it up" in other
    assert is_given_up or (numel == 4 and other == "nothing was refused"), other  # of few each rank adds all itself


def is_interrupted_again():
    """A signal in a wait, and another one while the others are told of it."""
    group, store = served("pairwise"), compat.default_store()
    if group.rank == 1:
        store.wait(["interrupted"])
        message_of(group.all_reduce(torch.ones(4), label="grads").wait)  # only its part wakes who waits inside of gloo
        return None
    main = threading.current_thread()

    write = Cards.write

    def interrupted(cards):
        Cards.write = write
        write(cards)
        raise KeyboardInterrupt

    def interrupt():
        while Task.run.__code__ not in codes_of(main):
            time.sleep(1e-4)
        Cards.write = interrupted
        os.kill(os.getpid(), signal.SIGINT)
        store.set("interrupted", "")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    pending = group.all_reduce(torch.ones(4), label="grads")
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    thread.join()
    began_s = time.monotonic()
    said = message_of(pending.wait)
    return said, time.monotonic() - began_s


def test_a_second_signal_does_not_keep_the_group_open(ranks):
    (said, took_s), _ = ranks(2, is_interrupted_again)
    assert "all_reduce grads" in said
    assert "was interrupted by KeyboardInterrupt" in said
    assert took_s < SOON_S


def is_interrupted_between_hosts():
    """Ranks 0 and 1, while their parts are on their way to the other host, whose ranks come later."""
    group, store = served("two levels"), compat.default_store()
    x = torch.ones(LARGE)
    if group.rank >= 2:
        store.wait(["given up 0", "given up 1"])
        said = message_of(lambda: group.all_reduce(x, label="grads").wait())
        store.set(f"over {group.rank}", "")
        return said
    pending = group.all_reduce(x, label="grads")
    while group._open[0].begun < 2:
        group.advance()
    advance = group._advance

    def interrupted():
        group._advance = advance
        raise KeyboardInterrupt

    group._advance = interrupted
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    said = message_of(pending.wait)
    x.fill_(7.0)  # the call is over, says the error
    store.set(f"given up {group.rank}", "")
    store.wait(["over 2", "over 3"])
    return said if x.eq(7.0).all() else "it was written later"


def test_on_two_levels_nothing_of_an_interrupted_call_is_sent_or_written_later(ranks):
    for said in ranks(4, is_interrupted_between_hosts):
        assert "all_reduce grads" in said, said
        assert "was interrupted" in said, said


def zeroes_its_gradients_when_interrupted(kind, numel):
    """Rank 0, by SIGINT in the second of three calls, of which it has no handle; rank 1 comes to that one late."""
    move_to_hosts_of(kind)
    zcore.comm.barrier()
    rank, store, told = dist.get_rank(), compat.default_store(), []
    grads = zcore.comm.empty(numel, torch.float32)
    for step in range(3):
        grads.fill_(rank + 1.0)
        try:
            if step == 1 and rank == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            if step == 1 and rank == 1:
                if kind == "pairwise":  # else it has the data before
                    store.wait(["zeroed"])
                under_way = zcore.comm.all_reduce(grads, label="grads", async_op=True)
                store.wait(["zeroed"])
                under_way.wait()
            else:
                zcore.comm.all_reduce(grads, label="grads")
        except KeyboardInterrupt:
            grads.zero_()
            store.set("zeroed", "")
        except ZcoreError:
            told.append("refused")
        else:
            told.append(grads.unique().tolist())
    return told


@pytest.mark.parametrize(
    ("kind", "size", "numel"), [("shared memory", 2, 100_000), ("pairwise", 2, 8_000_000), ("two levels", 4, 100_000)]
)
def test_what_a_program_does_with_its_tensors_after_an_interrupt_is_in_nobodys_sum(ranks, kind, size, numel):
    own, late, *others = ranks(size, zeroes_its_gradients_when_interrupted, kind, numel, deadline_s=60)
    whole = [size * (size + 1) / 2]
    assert own[0] == late[0] == whole
    for told in (own[1:], late[1:], *(each[1:] for each in others)):
        assert all(each in (whole, "refused") for each in told), (own, late, others)
    assert "refused" in late


def fails_before_it_is_announced(where):
    """A start of rank 0, in the third of some calls that are alike."""
    group = served("two levels" if where == "pad" else "shared memory")
    wrong = []
    for index in range(6):
        x = torch.full((20_001,), float(index))
        if group.rank == 0 and index == 2:
            if where == "pad":
                pad = torch.nn.functional.pad
                torch.nn.functional.pad = lambda *_: (_ for _ in ()).throw(MemoryError("no memory"))
                with pytest.raises(MemoryError):
                    group.all_reduce(x, label="loss")
                torch.nn.functional.pad = pad
            else:
                group._pages = Interrupting(group._pages, where)
                with pytest.raises(KeyboardInterrupt):
                    group.all_reduce(x, label="loss")
            continue
        said = message_of(lambda: group.all_reduce(x, label="loss").wait())  # noqa: B023 - called at once
        if said != "nothing was refused" or x.unique().tolist() != [float(index * group.size)]:
            wrong.append((index, said.partition(":")[0]))
    return wrong


@pytest.mark.parametrize("where", ["take", "tensor"])
def test_a_start_that_fails_counts_as_the_call_that_the_others_make(ranks, where):
    assert ranks(2, fails_before_it_is_announced, where) == [[], [(2, "CollectiveError")]]


def test_on_two_levels_a_start_that_fails_ends_the_group(ranks):
    own, *others = ranks(4, fails_before_it_is_announced, "pad")
    assert own == [(each, "StateError") for each in (3, 4, 5)]
    assert others == [[(2, "CollectiveError"), *own]] * 3


def writes_after_the_timeout(op):
    """Rank 0, while rank 1 has started the call and comes to read only then."""
    move_to_hosts_of("shared memory")
    group, store = serve(dist.new_group(timeout=timedelta(seconds=1)), name="dp"), compat.default_store()
    x = group.empty(100_000, dtype=torch.float32, device=CPU)
    x.fill_(group.rank + 1.0)
    part = torch.zeros(50_000)
    pending = group.all_reduce(x, label="grads") if op == "all_reduce" else group.reduce_scatter(part, x, label="grads")
    if group.rank == 0:
        said = message_of(pending.wait)
        x.fill_(1000.0)  # the call is over, says the error
        store.set("over", "")
        return said
    store.wait(["over"])
    return message_of(pending.wait)


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter"])
def test_who_reads_after_another_rank_has_given_up_does_not_trust_it(ranks, op):
    own, late = ranks(2, writes_after_the_timeout, op)
    assert "the timeout of 1 s has passed" in own
    assert "rank 0 has given it up" in late


def wait_until_interrupted(pending, *, after_s):
    signal.setitimer(signal.ITIMER_REAL, after_s)
    pending.wait()
    time.sleep(SOON_S)  # until the signal comes, where the wait has met an error before


def is_interrupted_often():
    """The main thread, in its waits; then another thread makes calls."""
    first, second = (serve(dist.new_group(timeout=timedelta(seconds=5)), name=name) for name in "ab")
    if first.rank == 1:
        return message_of(second.all_reduce(torch.ones(4), label="y").wait)

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for number in range(100):  # as many as a ring has room for, since nobody else comes
        pending = first.all_reduce(torch.ones(4), label="x")
        with pytest.raises(KeyboardInterrupt):
            wait_until_interrupted(pending, after_s=1e-5 * (1 + number % 50))
    assert not LOCK._is_owned()
    said = []
    thread = threading.Thread(target=lambda: said.append(message_of(second.all_reduce(torch.ones(4), label="y").wait)))
    thread.start()
    thread.join(SOON_S)
    return said[0]


def test_no_signal_leaves_other_threads_waiting(ranks):
    assert ranks(2, is_interrupted_often) == ["nothing was refused"] * 2


def is_killed_in_its_next_call():
    zcore.comm.barrier()
    rank = dist.get_rank()
    handled = message_of(lambda: zcore.comm.all_reduce(torch.ones(4 + rank), label="metrics"))
    x = torch.ones(100_000)
    if rank == 1:
        zcore.comm.all_reduce(x, label="grads", async_op=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return handled, message_of(lambda: zcore.comm.all_reduce(x, label="grads"))


def test_an_error_that_was_handled_is_not_the_cause_of_a_death_right_after(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, is_killed_in_its_next_call)
    handled, said = caught.value.results[0]
    assert handled.startswith("MismatchError")
    assert said.startswith("CollectiveError: all_reduce grads (#2")
    assert "rank 1 has raised, was killed, or left (before, or in another group, it had given up: Mismatch" in said


def sum_under_inference_mode(kind):
    move_to_hosts_of(kind)
    with torch.inference_mode():
        small, odd, large = torch.ones(4), torch.ones(100_001), torch.ones(200_000)
        for each in (small, odd, large):
            zcore.comm.all_reduce(each, label="metrics")
        mean = torch.full((100_001,), 8.0)
        later = zcore.comm.all_reduce(mean, op=dist.ReduceOp.AVG, label="mean", async_op=True)
    later.wait()  # outside of it
    return {*small.tolist(), *odd.tolist(), *large.tolist()}, mean.unique().tolist()


@pytest.mark.parametrize(("kind", "size"), [("shared memory", 2), ("pairwise", 2), ("two levels", 4)])
def test_sums_are_made_under_inference_mode_by_whichever_thread(ranks, kind, size):
    assert ranks(size, sum_under_inference_mode, kind) == [({float(size)}, [8.0])] * size
