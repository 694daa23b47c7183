r"""The `Collectives` contract: one process group's collectives on flat tensors, and its torch.distributed default.

Every call starts at once and returns a `Pending`; nobody reads or writes the tensors before its `wait()`. The group
also says where a buffer is born, so that an implementation may put it into pages that its ranks share.

Sums have ONE order, whoever serves: a balanced binary tree over the ranks, a function of rank alone.

    rank   0   1   2   3   4       A sum over 4 ranks equals a sum over 2 hosts of 2 ranks, bit for bit, so flat and
            \ /     \ /    |       hierarchical sharding, and every implementation, give the same gradients.
            0+1     2+3    4
               \   /       |       gloo's own reductions split the tensor into segments and start each at another rank:
                +          4       their order depends on where an element lies. They are also slower than an exchange
                 \________/        and one sum (16 MiB, 2 ranks: 20.5 ms against 5.6). NCCL reduces in its own order.
"""

import atexit
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core import compat, extensions
from zcore.core.errors import CollectiveError

__all__ = [
    "Call",
    "Collectives",
    "Pending",
    "TorchCollectives",
    "Traffic",
    "choose_collectives",
    "last_collective",
    "tree_sum_",
]

logger = logging.getLogger(__name__)

SMALL_BYTES = 64 * 1024  # an all_reduce up to here is one all_gather and a local sum: one latency instead of two


@dataclass(frozen=True, slots=True)
class Call:
    """One started collective, as reports and tests read it."""

    op: str
    label: str  # whose data: a bucket's name, or what the step needs it for
    numel: int
    payload_bytes: int  # of the larger side: the gathered output, the scattered input
    group: str
    index: int  # position among this group's calls, equal on every rank

    def __str__(self) -> str:
        return f"{self.op} {self.label} (#{self.index} of {self.group}, {self.payload_bytes / 2**20:.3g} MiB)"


_recent: deque[Call] = deque(maxlen=1)  # for the report on a hung process, which must not need its cooperation


def last_collective() -> str | None:
    """The collective that this process started last, or None before the first."""
    return str(_recent[-1]) if _recent else None


@dataclass(slots=True)
class Traffic:
    """How often and with how many bytes each collective of a group was called."""

    calls: Counter[str] = field(default_factory=Counter)
    payload_bytes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Start counting anew."""
        self.calls.clear()
        self.payload_bytes.clear()


class Pending(Protocol):
    """A collective on its way."""

    def wait(self) -> None:
        """Return when the result is there (on CUDA: when the current stream is ordered behind it).

        Raises CollectiveError if a rank died or left. Waiting twice is allowed.
        """
        ...


class Collectives(Protocol):
    """What zcore asks of a process group. All tensors are flat and contiguous; reductions are sums."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        ...

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        ...

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat buffer, born where this group's collectives can use it without a copy."""
        ...

    def free_storage(self, buffer: Tensor) -> None:
        """Give the memory of a buffer from `empty` back. The tensor and its views stay, without contents."""
        ...

    def alloc_storage(self, buffer: Tensor) -> None:
        """Give a freed buffer memory again; its contents are undefined. No effect on one that has memory."""
        ...

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """`output[r * n:(r + 1) * n] = input of rank r`; `input` may be the own slot of `output`."""
        ...

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """`output = sum over ranks of input[rank * n:(rank + 1) * n]`; `output` may be the own slot of `input`."""
        ...

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """`tensor = sum over ranks of tensor`, in place."""
        ...

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """Slot r of `input` goes to rank r; slot r of `output` comes from it."""
        ...

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """`tensor = tensor of rank src`, `src` being a rank in the group."""
        ...

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """Send to rank `dst` of the group, which must `recv`."""
        ...

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """Receive from rank `src` of the group."""
        ...


def tree_sum_(parts: Sequence[Tensor], *, out: Tensor) -> None:
    """Sum equal tensors into `out` as a balanced binary tree over their index; `parts` is scratch afterwards.

    `out` may be one of `parts`, or share no memory with them.

    >>> parts = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]
    >>> total = torch.empty(1)
    >>> tree_sum_(parts, out=total)
    >>> total.item()
    7.0
    """
    count, stride = len(parts), 1
    while stride < count:
        last = stride * 2 >= count
        for low in range(0, count - stride, stride * 2):
            torch.add(parts[low], parts[low + stride], out=out if last else parts[low])
        stride *= 2
    if count == 1:
        out.copy_(parts[0])


class _Pending:
    """Works of torch, waited for in order, then whatever arithmetic is left."""

    __slots__ = ("_call", "_finish", "_works", "after")

    def __init__(self, call: Call, works: Sequence[dist.Work | None], finish: Callable[[], None] | None = None) -> None:
        self._call = call
        self.after: _Pending | None = None  # what has to be finished first, where finishing communicates
        self._works = [work for work in works if work is not None]
        self._finish = finish

    def wait(self) -> None:
        """Wait, and name the collective if it failed."""
        after, self.after = self.after, None
        if after is not None:
            after.wait()
        works, self._works = self._works, []
        finish, self._finish = self._finish, None
        for work in works:
            try:
                work.wait()
            except RuntimeError as error:
                raise failed_collective(self._call, error) from error
        if finish is not None:
            finish()


def failed_collective(call: Call, error: BaseException) -> CollectiveError:
    """The paragraph a user reads when a peer is gone."""
    reason = str(error).splitlines()[0].encode("ascii", "ignore").decode()
    reason = re.sub(r"\s*\b(GLHF|Good luck)\b.*", "", reason).strip()  # gloo wishes well, with a pictogram
    return CollectiveError(
        f"{call} did not complete: another rank has raised, was killed, took another path through the model, or did "
        "not reach this call within the process group's timeout. Look for the first error in the other ranks' output, "
        f"mend it, and restart all ranks from the last checkpoint. (The backend's words: {reason})"
    )


@cache
def _settle_at_exit() -> None:
    """Have gloo's threads let go of the last tensors before the interpreter ends.

    They free them under Python's lock; one that waits for it when the interpreter goes ends the process with SIGABRT.
    """
    atexit.register(time.sleep, 0.05)  # seconds; gives the lock away


class TorchCollectives:
    """The contract over torch.distributed, for any backend.

    On gloo sums are an exchange and one tree sum; on others the backend's own. `group` is the process group, `name`
    what reports call it. With one rank nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup, *, name: str) -> None:
        self._group = group
        self._name = name
        self._index = 0
        self._ordered = dist.get_backend(group) == "gloo"
        if self._ordered:
            _settle_at_exit()
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._traffic = Traffic()
        self._chained: _Pending | None = None  # the last started call whose second half starts when it is waited for

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
        return self._traffic

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A plain tensor of torch: gloo and NCCL take any memory."""
        return torch.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """Resize the storage to nothing; every view of it goes on existing."""
        buffer.untyped_storage().resize_(0)

    def alloc_storage(self, buffer: Tensor) -> None:
        """Resize the storage back to what the buffer's elements need."""
        storage = buffer.untyped_storage()
        needed_bytes = (cast("int", buffer.storage_offset()) + buffer.numel()) * buffer.element_size()
        if storage.nbytes() != needed_bytes:
            storage.resize_(needed_bytes)

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_gather`."""
        call = self._begin("all_gather", label, output)
        if self._size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input)
            return _Pending(call, [])
        return self._start(call, lambda: compat.all_gather_flat(self._raw(output), self._raw(input), group=self._group))

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.reduce_scatter`."""
        call = self._begin("reduce_scatter", label, input)
        if self._size == 1:
            if output.data_ptr() != input.data_ptr():
                output.copy_(input)
            return _Pending(call, [])
        if not self._ordered:
            return self._start(call, lambda: compat.reduce_scatter_flat(output, input, group=self._group))
        received = torch.empty_like(input)
        parts = list(received.view(self._size, -1).unbind())
        return self._start(
            call,
            lambda: compat.all_to_all_flat(self._raw(received), self._raw(input), group=self._group),
            finish=lambda: tree_sum_(parts, out=output),
        )

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_reduce`."""
        call = self._begin("all_reduce", label, tensor)
        if self._size == 1 or not tensor.numel():
            return _Pending(call, [])
        if not self._ordered:
            return self._start(call, lambda: dist.all_reduce(tensor, group=self._group, async_op=True))
        if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
            gathered = tensor.new_empty(self._size * tensor.numel())
            parts = list(gathered.view(self._size, *tensor.shape).unbind())
            return self._start(
                call,
                lambda: compat.all_gather_flat(self._raw(gathered), self._raw(tensor), group=self._group),
                finish=lambda: tree_sum_(parts, out=tensor),
            )
        return self._all_reduce_by_exchange(call, tensor)

    def _all_reduce_by_exchange(self, call: Call, tensor: Tensor) -> Pending:
        """Each rank sums its slot of every rank's tensor, then all gather the sums.

        The second half needs the result of the first, so it starts inside `wait()`; in whichever order a rank waits for
        several, second halves start in the order of the calls.
        """
        slot_numel = -(-tensor.numel() // self._size)
        padded = tensor
        if slot_numel * self._size != tensor.numel():
            padded = torch.nn.functional.pad(tensor, (0, slot_numel * self._size - tensor.numel()))
        received = torch.empty_like(padded)
        parts = list(received.view(self._size, -1).unbind())
        own = padded[self._rank * slot_numel : (self._rank + 1) * slot_numel]

        def sum_and_gather() -> None:
            tree_sum_(parts, out=own)
            gather = compat.all_gather_flat(self._raw(padded), self._raw(own.clone()), group=self._group)
            _Pending(call, [gather]).wait()
            if padded is not tensor:
                tensor.copy_(padded[: tensor.numel()])

        pending = self._start(
            call,
            lambda: compat.all_to_all_flat(self._raw(received), self._raw(padded), group=self._group),
            finish=sum_and_gather,
        )
        pending.after, self._chained = self._chained, pending
        return pending

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_to_all`."""
        call = self._begin("all_to_all", label, input)
        return self._start(call, lambda: compat.all_to_all_flat(self._raw(output), self._raw(input), group=self._group))

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.broadcast`."""
        call = self._begin("broadcast", label, tensor)
        return self._start(
            call, lambda: dist.broadcast(self._raw(tensor), group=self._group, group_src=src, async_op=True)
        )

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`."""
        call = self._begin("send", label, tensor)
        return self._start(call, lambda: dist.isend(self._raw(tensor), group=self._group, group_dst=dst))

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`."""
        call = self._begin("recv", label, tensor)
        return self._start(call, lambda: dist.irecv(self._raw(tensor), group=self._group, group_src=src))

    def _raw(self, tensor: Tensor) -> Tensor:
        """The same bytes in a type every backend moves: gloo knows no int16 and no float8."""
        return tensor.view(torch.uint8) if self._ordered else tensor

    def _begin(self, op: str, label: str, tensor: Tensor) -> Call:
        payload_bytes = tensor.numel() * tensor.element_size()
        call = Call(op, label, tensor.numel(), payload_bytes, self._name, self._index)
        self._index += 1
        self._traffic.calls[op] += 1
        self._traffic.payload_bytes[op] += payload_bytes
        _recent.append(call)
        return call

    def _start(
        self, call: Call, start: Callable[[], dist.Work | None], *, finish: Callable[[], None] | None = None
    ) -> _Pending:
        try:
            with torch.profiler.record_function(f"zcore::{call.op} {call.label}"):
                work = start()
        except RuntimeError as error:
            raise failed_collective(call, error) from error
        return _Pending(call, [work], finish)


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
