"""Collectives over gloo from messages between pairs of ranks, brought to their end by a thread, and watched.

A call posts its messages at once; the bytes then travel by themselves, a worker adds what has come and starts second
steps, and `wait()` waits for the worker, looking who is missing (see journal.py). A small call that is waited for next
is ended in `wait()` itself, while another thread looks. Messages carry a tag made of all calls so far, so that after a
call which ranks made differently none completes: they wait, and it is found.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from zcore.comm.pairs.algorithms import Table
from zcore.comm.pairs.moves import Pairs
from zcore.comm.pairs.worker import Task, Worker
from zcore.comm.progress import STEP_S, Polled, Stepping, advance_all, has_steps
from zcore.comm.ranks.journal import Journal
from zcore.comm.ranks.words import has_passed
from zcore.comm.sizes import check_exchange, check_process
from zcore.core.collectives import Call, CallLog, Pending, Traffic, check_slots, derived_label, tree_sum
from zcore.core.errors import CollectiveError, StateError, ZcoreError
from zcore.core.exchange import WINDOW_PIECES, Finish
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["PairwiseCollectives"]

# A call of one step up to here is ended by who waits for it: waking a thread takes 0.1 ms. Where data go both ways, who
# waits is woken late, 1 MiB took 1.9 ms; by a worker 0.6.
DIRECT_BYTES, DIRECT_ONE_WAY_BYTES = 16 << 10, 1 << 20
CLOSING_S = 1.5  # within which the process that ended a connection is seen to have ended, on a busy machine, too


class PairwiseCollectives:
    """The contract between ranks that gloo connects; `members` are those of `group` that take part."""

    def __init__(self, peers: Pairs, journal: Journal, table: Table, *, name: str) -> None:
        self._peers = peers
        self._journal = journal
        self._table = table
        self._log = CallLog(name)
        self._plain = TorchCollectives(peers.group, name=name, traffic=self._log.traffic)  # memory, and messages
        self._worker = Worker(f"zcore {name}", abort=peers.abort)
        self._process = os.getpid()
        self._broken: ZcoreError | None = None
        self._direct_task: Task | None = None  # the last call, if it is left to who waits for it
        self._handing_over = threading.Lock()  # of it: one thread takes it

    @property
    def rank(self) -> int:
        """This process's rank among the peers."""
        return self._peers.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._peers.size

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        return self._log.traffic

    def algorithm_for(self, op: str, payload_bytes: int) -> str:
        """How a call is served, in words."""
        return f"pairwise {self._table.choose(op, size=self.size, num_bytes=payload_bytes)}"

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A plain tensor of torch."""
        return self._plain.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """See `Collectives.free_storage`."""
        self._plain.free_storage(buffer)

    def alloc_storage(self, buffer: Tensor) -> None:
        """See `Collectives.alloc_storage`."""
        self._plain.alloc_storage(buffer)

    def own_storage(self, buffer: Tensor) -> None:
        """Every buffer has memory of its own here."""

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_gather`."""
        check_slots("all_gather", label, whole=output, slot=input, size=self.size)
        with self._starting("all_gather", label, output) as (call, tag):
            self.alloc_storage(output)
            slots = output.tensor_split(self.size)
            own = slots[self.rank]
            if own.data_ptr() == input.data_ptr():
                return self._gather(call, slots, tag=tag)
            if own.dtype != input.dtype or self._choice(call) == "ring":
                own.copy_(input)
                return self._gather(call, slots, tag=tag)

            def start() -> Finish:
                finish = self._peers.exchange(slots, [input] * self.size, tag=tag)
                own.copy_(input)  # while the others' parts are on their way
                return finish

            return self._add(call, start)

    def gather_slots(self, slots: Sequence[Tensor], *, label: str, whole: Tensor) -> Polled:
        """An all_gather into slots that may lie apart; the own one is filled. `whole` is what they belong to."""
        with self._starting("all_gather", label, whole) as (call, tag):
            return self._gather(call, slots, tag=tag)

    def _gather(self, call: Call, slots: Sequence[Tensor], *, tag: int) -> Polled:
        if self._choice(call) == "ring":
            return self._add(call, lambda: self._peers.gather_in_ring(slots, tag=tag), has_one_step=False)
        return self._add(call, lambda: self._peers.gather(slots, tag=tag))

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.reduce_scatter`."""
        check_slots("reduce_scatter", label, whole=input, slot=output, size=self.size)
        with self._starting("reduce_scatter", label, input) as (call, tag):
            slots = input.tensor_split(self.size)
            return self._add(call, lambda: self._peers.sum_slots(output, slots, tag=tag, window=WINDOW_PIECES))

    def all_reduce(self, tensor: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_reduce`."""
        with self._starting("all_reduce", label, tensor) as (call, tag):
            if self._choice(call) == "gather":
                parts = [tensor if each == self.rank else torch.empty_like(tensor) for each in range(self.size)]

                def start() -> Finish:
                    gather = self._peers.gather(parts, tag=tag)

                    def finish() -> None:
                        gather()
                        tree_sum(parts, out=tensor)

                    return finish

                return self._add(call, start)
            slots = tensor.tensor_split(self.size)
            return self._add(call, lambda: self._peers.sum_everywhere(slots, tag=tag), has_one_step=False)

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Polled:
        """See `Collectives.all_to_all`."""
        check_exchange(label, output, input, size=self.size)
        with self._starting("all_to_all", label, input) as (call, tag):
            receives, sends = output.tensor_split(self.size), input.tensor_split(self.size)

            def start() -> Finish:
                finish = self._peers.exchange(receives, sends, tag=tag)
                receives[self.rank].copy_(sends[self.rank])  # while the others' parts are on their way
                return finish

            return self._add(call, start)

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Polled:
        """See `Collectives.broadcast`."""
        words = derived_label(f"{label} from rank {src}", parts=[label])
        with self._starting("broadcast", words, tensor) as (call, tag):
            if self._choice(call) == "scatter":
                return self._add(call, lambda: self._peers.scatter_to_all(tensor, src=src, tag=tag), has_one_step=False)
            return self._add(
                call, lambda: self._peers.send_to_all(tensor, src=src, tag=tag), direct_bytes=DIRECT_ONE_WAY_BYTES
            )

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`."""
        return Stepping(self._plain.send(tensor, dst=self._peers.members[dst], label=label))

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`."""
        return Stepping(self._plain.recv(tensor, src=self._peers.members[src], label=label))

    @contextmanager
    def _starting(self, op: str, label: str, tensor: Tensor) -> Iterator[tuple[Call, int]]:
        """A new call, and the tag of its messages. Whatever keeps it from being started inside ends the group.

        The others take part in it: made again here, it would be another call.
        """
        check_process(self._process, f"{op} {label}")
        if self._broken is not None:
            raise StateError(
                f"{op} {label}: this group has ended with an error, and its connections are closed. Restart the ranks."
            ) from self._broken
        call = self._log.note(op, label, tensor)
        with self._ending_if_interrupted(call):
            yield call, self._journal.start(call)

    def _choice(self, call: Call) -> str:
        return self._table.choose(call.op, size=self.size, num_bytes=call.payload_bytes)

    def _add(
        self,
        call: Call,
        start: Callable[[], Finish],
        *,
        has_one_step: bool = True,
        direct_bytes: int = DIRECT_BYTES,
    ) -> Polled:
        journal = self._journal
        try:
            finish = start()
        except RuntimeError as error:  # of gloo: another rank has closed the connections
            raise self._broken_by(call, error) from error

        def act() -> None:
            finish()
            journal.finish(call)

        task = Task(act)
        self.hand_over(self._direct_task)
        self._direct_task = task if has_one_step and call.payload_bytes <= direct_bytes else None
        if self._direct_task is None:
            self._worker.add(task)
        return _Pending(self, call, task)

    def hand_over(self, task: Task | None) -> None:
        """Have the worker do what was left to who waits for it: somebody has more to do than to wait."""
        if task is not None and self._take_direct(task):
            self._worker.add(task)

    def _take_direct(self, task: Task) -> bool:
        """Whether `task` was left to who waits for it, and now is the caller's."""
        with self._handing_over:
            is_taken = task is self._direct_task
            if is_taken:
                self._direct_task = None
        return is_taken

    def wait_for(self, call: Call, task: Task) -> None:
        """Return when the call is done. Raises what ended it, each time."""
        if self._broken is not None and not (task.wait(0) and task.error is None):
            raise self._broken
        with self._ending_if_interrupted(call):
            if has_steps():
                self.hand_over(task)
            trouble = self._run_direct(call, task)
            if trouble is not None:
                self._break(trouble)
                raise trouble
            if not task.wait(0):
                self._journal.wait_for(call, partial(_is_done_within, task))
            if task.error is not None:
                raise self._broken_by(call, task.error) from task.error

    def _run_direct(self, call: Call, task: Task) -> ZcoreError | None:
        """Bring the call to its end if that was left to who waits; what was found that cannot complete it."""
        if not self._take_direct(task):
            return None
        with self._journal.looking_after(call, self._worker.abort) as wait:
            task.run()
        return wait.trouble

    @contextmanager
    def _ending_if_interrupted(self, call: Call) -> Iterator[None]:
        """An interrupt or error inside ends the group: what was received by then is not received again."""
        try:
            yield
        except ZcoreError as error:
            self.end(error)
            raise
        except Exception as error:
            self.end(_failed_here(call, error))
            raise
        except BaseException as error:  # whoever made the call at once has no handle of it any more
            by = type(error).__name__
            self.end(CollectiveError(f"{call} was interrupted by {by}, and its result is undefined. Restart."))
            raise

    def end(self, error: ZcoreError) -> None:
        """Take part in no call any more, because of `error`, unless the group has ended before."""
        if self._broken is None:
            self._break(error)

    def _broken_by(self, call: Call, error: Exception) -> ZcoreError:
        lost = self._lost(call, error)
        self._break(lost)
        return lost

    def _break(self, error: ZcoreError) -> None:
        """End the group, and tell the others, first things first: an interrupt may come between them."""
        self._broken = error
        try:
            self._journal.give_up(error)
        finally:
            self._worker.abort()  # nothing of it is to be written into anybody's tensors later

    def _lost(self, call: Call, error: Exception) -> ZcoreError:
        """A connection broke: whoever ended it says why, or is seen to have ended, a moment later."""
        if "gloo" not in str(error):  # where gloo says what broke it begins with its own file
            return _failed_here(call, error)
        if "Timed out" in str(error):  # gloo's words for its own wait
            return self._journal.failure(call, has_passed(self._journal.deadline_s))
        began_s = known_s = time.monotonic()  # known: how many cards each rank had written
        counts: dict[int, int] = {}
        while True:
            trouble = self._journal.find_trouble(call, is_lost=True)
            if trouble is not None:
                return trouble
            if not counts:
                counts, known_s = self._journal.counts_elsewhere(), time.monotonic()
            silent, now_s = self._journal.silent_since(counts), time.monotonic()
            if now_s - known_s > self._journal.silence_s if silent else now_s - began_s > CLOSING_S:
                return self._journal.failure(call, "a connection was lost", silent=silent)
            time.sleep(0.05)


class _Pending:
    """See `Pending`."""

    __slots__ = ("_call", "_group", "_task")

    def __init__(self, group: PairwiseCollectives, call: Call, task: Task) -> None:
        self._group, self._call, self._task = group, call, task

    def wait(self) -> None:
        """See `Pending.wait`."""
        self._group.wait_for(self._call, self._task)

    def poll(self) -> bool:
        """Whether `wait` would return at once; raises what it would raise."""
        self._group.hand_over(self._task)
        if not self._task.wait(0):
            return False
        self.wait()
        return True


def _failed_here(call: Call, error: Exception) -> CollectiveError:
    return CollectiveError(
        f"{call} failed on this rank: {type(error).__name__}: {error}. What was received is lost. Mend it, and restart "
        "all ranks."
    )


def _is_done_within(task: Task, time_s: float) -> bool:
    end = time.monotonic() + time_s
    while has_steps():
        if task.wait(STEP_S):
            return True
        advance_all()
        if time.monotonic() > end:
            return False
    return task.wait(max(0.0, end - time.monotonic()))
