"""The `Collectives` contract over torch.distributed, for any backend; and which implementation serves a group."""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core import compat, extensions
from zcore.core.collectives import Call, CallLog, Collectives, Traffic, check_slots, failed_collective, tag_of, tree_sum
from zcore.core.errors import CollectiveError
from zcore.core.exchange import STEP_TAGS, Peers, raw

__all__ = ["TorchCollectives", "TorchPending", "choose_collectives"]

_T = TypeVar("_T")

SMALL_BYTES = 64 * 1024  # an all_reduce up to here is one all_gather and a local sum: one latency instead of two


class _Line:
    """Calls that one thread started, over any group, whose last part is sent when they are waited for.

    In whichever order it waits for several, and whoever waits, they are brought to their end in the order of their
    starts, or ranks would wait for each other.
    """

    def __init__(self) -> None:
        self.calls: deque[TorchPending] = deque()
        self.lock = threading.RLock()


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.line = _Line()


_of_thread = _OfThread()


class TorchPending:
    """Works of torch, waited for in order, then whatever arithmetic is left.

    With a `device` a wait orders its current CUDA stream behind them, each time; no host waits. An error is this
    call's own, whoever brought it to its end, and raised by each wait for it. Several threads may wait.
    """

    __slots__ = ("_call", "_device", "_error", "_event", "_finish", "_line", "_lock", "_works")

    def __init__(
        self,
        call: Call,
        works: Sequence[dist.Work | None],
        finish: Callable[[], None] | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """`device`: where the works are done by a stream, later."""
        assert finish is None or device is None  # the stream of a later wait would not be ordered behind the arithmetic
        self._call = call
        self._device = device
        self._event: torch.cuda.Event | None = None  # behind the works; these hold the tensors, and are let go of
        self._works = [work for work in works if work is not None]
        self._finish = finish
        self._error: CollectiveError | None = None
        self._line: _Line | None = None
        self._lock = threading.RLock()  # the line's, for a call in one

    def line_up(self) -> "TorchPending":
        """Be brought to its end behind what this thread has started before; itself."""
        self._line = _of_thread.line
        self._lock = self._line.lock
        self._line.calls.append(self)
        return self

    def is_completed(self) -> bool:
        """Whether everything has ended, on an accelerator there; what is left to `wait` has not. Also after `wait`."""
        works = self._works  # before the event, which another thread's wait makes before it lets go of them
        if self._event is not None:
            return bool(self._event.query())
        return self._finish is None and all(work.is_completed() for work in works)

    def wait(self) -> None:
        """Wait, and name the collective if it failed."""
        with self._lock:
            while self._line is not None and self in self._line.calls:
                self._line.calls.popleft()._end()
            self._end()
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        elif self._error is None:
            try:
                self._end_works()
            except RuntimeError as error:
                self._fail(failed_collective(self._call, error), error)
            except BaseException as error:  # an interrupt: what was received is not received again
                words = f"{self._call} was interrupted while it was waited for, and its result is undefined. Restart."
                self._fail(CollectiveError(words), error)
                raise

    def _fail(self, error: CollectiveError, cause: BaseException) -> None:
        self._error, self._finish = error, None
        error.__cause__ = cause

    def _end_works(self) -> None:
        for work in self._works:
            work.wait()
        if self._device is not None and self._works:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))  # which need not be the thread's current device
            self._event = event
        self._works = []
        if self._finish is not None:
            self._finish()
            self._finish = None


_num_sums: "WeakKeyDictionary[dist.ProcessGroup, int]" = WeakKeyDictionary()  # made over each process group


@cache
def _settle_at_exit() -> None:
    """Have gloo's threads let go of the last tensors before the interpreter ends.

    They free them under Python's lock; one that waits for it when the interpreter goes ends the process with SIGABRT.
    """
    atexit.register(time.sleep, 0.05)  # seconds; gives the lock away


class TorchCollectives:
    """The contract over torch.distributed, for any backend.

    On gloo sums are an exchange and one tree sum; on others the backend's own. Which one it is depends, in a group that
    has several, on the tensors' device. `group` is the process group, `name` what reports call it, `traffic` where
    calls are counted, if not apart. With one rank nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup, *, name: str, traffic: Traffic | None = None) -> None:
        self._group = group
        self._log = CallLog(name, traffic)
        self._backends = compat.backends_of(group)
        if "gloo" in self._backends.values():
            _settle_at_exit()
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._peers = Peers(group, range(self._size), self._rank)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._size

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        return self._log.traffic

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A plain tensor of torch: gloo and NCCL take any memory."""
        return torch.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """Resize the storage to nothing; every view of it goes on existing."""
        buffer.untyped_storage().resize_(0)

    def alloc_storage(self, buffer: Tensor) -> None:
        """Resize the storage back to what the buffer's elements need."""
        storage = buffer.untyped_storage()
        if not storage.nbytes():
            storage.resize_((cast("int", buffer.storage_offset()) + buffer.numel()) * buffer.element_size())

    def own_storage(self, buffer: Tensor) -> None:
        """Every buffer has memory of its own here."""

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.all_gather`."""
        call = self._log.note("all_gather", label, output)
        source = self._sent_to(output, input)
        if self._size == 1:
            return TorchPending(call, [])
        return self._start(
            call, output, lambda: compat.all_gather_flat(self._raw(output), self._raw(source), group=self._group)
        )

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.reduce_scatter`."""
        call = self._log.note("reduce_scatter", label, input)
        if self._size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input)
            return TorchPending(call, [])
        if not self._is_ordered(input):
            return self._start(call, input, lambda: compat.reduce_scatter_flat(output, input, group=self._group))
        check_slots("reduce_scatter", label, whole=input, slot=output, size=self._size)
        slots, tag = input.tensor_split(self._size), self._tag(call)
        return TorchPending(call, [], self._try(call, lambda: self._peers.sum_slots(output, slots, tag=tag)))

    def all_reduce(self, tensor: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.all_reduce`."""
        call = self._log.note("all_reduce", label, tensor)
        if self._size == 1 or not tensor.numel():
            return TorchPending(call, [])
        if not self._is_ordered(tensor):
            return self._start(call, tensor, lambda: dist.all_reduce(tensor, group=self._group, async_op=True))
        if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
            gathered = tensor.new_empty(self._size * tensor.numel())
            parts = list(gathered.view(self._size, *tensor.shape).unbind())
            return self._start(
                call,
                tensor,
                lambda: compat.all_gather_flat(self._raw(gathered), self._raw(tensor), group=self._group),
                finish=lambda: tree_sum(parts, out=tensor),
            )
        slots, tag = tensor.view(-1).tensor_split(self._size), self._tag(call)
        finish = self._try(call, lambda: self._peers.sum_everywhere(slots, tag=tag))
        return TorchPending(call, [], finish).line_up()

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.all_to_all`."""
        call = self._log.note("all_to_all", label, input)
        return self._start(
            call, input, lambda: compat.all_to_all_flat(self._raw(output), self._raw(input), group=self._group)
        )

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> TorchPending:
        """See `Collectives.broadcast`."""
        call = self._log.note("broadcast", label, tensor)
        return self._start(
            call, tensor, lambda: dist.broadcast(self._raw(tensor), group=self._group, group_src=src, async_op=True)
        )

    def send(self, tensor: Tensor, *, dst: int, label: str) -> TorchPending:
        """See `Collectives.send`."""
        call = self._log.note("send", label, tensor)
        return self._start(call, tensor, lambda: dist.isend(self._raw(tensor), group=self._group, group_dst=dst))

    def recv(self, tensor: Tensor, *, src: int, label: str) -> TorchPending:
        """See `Collectives.recv`."""
        call = self._log.note("recv", label, tensor)
        return self._start(call, tensor, lambda: dist.irecv(self._raw(tensor), group=self._group, group_src=src))

    def start_coalesced(self, op: str, parts: Sequence[tuple[Tensor, Tensor, str]]) -> TorchPending:
        """Start several calls of one `op` (output, input, label) as one launch of the backend's, which sums by itself.

        `op` is all_gather, reduce_scatter or all_reduce, whose output is its input.
        """
        gathers = op == "all_gather"
        calls = [self._log.note(op, label, output if gathers else sent) for output, sent, label in parts]
        outputs = [output for output, _, _ in parts]
        inputs = [self._sent_to(output, sent) if gathers else sent for output, sent, _ in parts]
        return self._start(calls[0], outputs[0], lambda: compat.start_coalesced(op, outputs, inputs, group=self._group))

    def _sent_to(self, output: Tensor, input: Tensor) -> Tensor:
        """What is gathered from this rank: `input`, or its copy in `output` where the type is another one."""
        self.alloc_storage(output)
        if self._size > 1 and input.dtype == output.dtype:
            return input
        slot = output[self._rank * input.numel() : (self._rank + 1) * input.numel()]
        if slot.data_ptr() != input.data_ptr():
            slot.copy_(input)
        return slot

    def _tag(self, call: Call) -> int:
        """Equal on ranks that make the same sums, and another one for each, whichever object makes them."""
        count = _num_sums[self._group] = _num_sums.get(self._group, 0) + 1
        return (tag_of(call) + count) % STEP_TAGS

    def _raw(self, tensor: Tensor) -> Tensor:
        """The same bytes in a type every backend moves: gloo knows no int16 and no float8."""
        return raw(tensor) if self._is_ordered(tensor) else tensor

    def _is_ordered(self, tensor: Tensor) -> bool:
        """Whether sums of such tensors have the order of one tree."""
        return self._backends.get(tensor.device.type) == "gloo"

    def _start(
        self,
        call: Call,
        tensor: Tensor,
        start: Callable[[], dist.Work | None],
        *,
        finish: Callable[[], None] | None = None,
    ) -> TorchPending:
        """Start a call of `tensor` and such as lie where it does."""
        device = tensor.device if self._backends.get(tensor.device.type) == "nccl" else None
        return TorchPending(call, [self._try(call, start)], finish, device=device)

    def _try(self, call: Call, start: Callable[[], _T]) -> _T:
        try:
            with torch.profiler.record_function(f"zcore::{call.op} {call.label}"):
                return start()
        except RuntimeError as error:
            raise failed_collective(call, error) from error


def choose_collectives(group: dist.ProcessGroup, *, name: str) -> Collectives:
    """The best implementation at hand for `group`; every rank of it calls this, in the same order.

    An installed wheel offers one under the entry point group `zcore.collectives` as a function `(group, name) ->
    Collectives | None`, None where it does not apply. Without any, `TorchCollectives` serves.
    """
    for offer in extensions.offered("zcore.collectives"):
        make = cast("Callable[..., Collectives | None]", offer.load())
        served = make(group, name=name)
        if served is not None:
            return served
    return TorchCollectives(group, name=name)
