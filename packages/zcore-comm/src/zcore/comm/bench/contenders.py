"""Whom `zcore comm bench` measures: every implementation, as collectives on buffers of its own, checked before timed.

torch gloo, torch nccl         torch.distributed's own calls: what the others are held against
core                           zcore.core over torch.distributed
pairwise                       messages between pairs of ranks
shared memory                  buffers born in the group: shown where they lie, gathered into one memory for all
shared memory, plain tensors   copied into shared pages first
two levels                     with the ranks of one host set apart as if they were on two
plain sockets                  no collective: 2 ranks of a host send each other what their link would carry, see wire.py
memory copy                    no collective: each rank copies as many bytes
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.comm.bench.wire import Wire
from zcore.comm.choice import Parts, serve
from zcore.comm.hierarchical import HierarchicalCollectives
from zcore.comm.memory.shared_memory import SharedMemoryCollectives
from zcore.comm.pairs.algorithms import Table, read_table
from zcore.comm.pairs.pairwise import PairwiseCollectives
from zcore.comm.ranks.meeting import meet
from zcore.comm.recording.comm_report import bus_factor
from zcore.core import compat
from zcore.core.collectives import Collectives
from zcore.core.torch_collectives import TorchCollectives

__all__ = [
    "COPY",
    "OPS",
    "SOCKETS",
    "Case",
    "Contender",
    "build_case",
    "build_contenders",
    "pairwise_over",
    "whole_numel",
]

OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "barrier")
COPY, SOCKETS = "memory copy", "plain sockets"
DTYPE = torch.float32


class _Waited(Protocol):
    def wait(self) -> object: ...


class _Calls(Protocol):
    """The part of `Collectives` that is measured."""

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> _Waited: ...
    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> _Waited: ...
    def all_reduce(self, tensor: Tensor, *, label: str) -> _Waited: ...
    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> _Waited: ...
    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> _Waited: ...


@dataclass(frozen=True, slots=True)
class Case:
    """One op of one contender on buffers of one size."""

    run: Callable[[], object]
    is_right: Callable[[], bool]  # of one run on known values: whether this rank's result is; every rank calls it


@dataclass(frozen=True, slots=True)
class Contender:
    """An implementation; `prepare(op, payload bytes)` makes its buffers, None where it has no such op."""

    name: str
    prepare: Callable[[str, int], Case | None]


def whole_numel(payload_bytes: int, size: int) -> int:
    """Elements of the larger side: as near to `payload_bytes` as equal slots for `size` ranks come, at least one each.

    >>> whole_numel(1024, 2), whole_numel(1024, 3), whole_numel(4, 2)
    (256, 255, 2)
    """
    return max(1, payload_bytes // (DTYPE.itemsize * size)) * size


def build_contenders(group: dist.ProcessGroup, device: torch.device) -> list[Contender]:
    """All that can serve `group`, torch's own calls first; every rank of it calls this."""
    backend = compat.backend_name(group)
    rank, size, tensors = dist.get_rank(group), dist.get_world_size(group), _Tensors(device)

    def over(name: str, calls: _Calls, born: Collectives | None, barrier: Callable[[], object]) -> Contender:
        return Contender(name, _Cases(calls, born, barrier, rank=rank, size=size, tensors=tensors).prepare)

    torchs, core = _TorchCalls(group), TorchCollectives(group, name="core")
    found = [
        over(f"torch {backend}", torchs, None, lambda: dist.barrier(group)),
        over("core", core, None, _barrier_by_sum(core, device)),
    ]
    if backend == "gloo":
        pairwise = pairwise_over(group, read_table(), name="pairwise")
        found.append(over("pairwise", pairwise, None, _barrier_by_sum(pairwise, device)))
        shared = serve(group, name="shared memory")
        if isinstance(shared, SharedMemoryCollectives):
            found.append(over("shared memory", shared, shared, lambda: shared.barrier(label="bench").wait()))
            found.append(over("shared memory, plain tensors", shared, None, _barrier_by_sum(shared, device)))
        with _set_apart(str(rank // _apart_size(size)) if isinstance(shared, SharedMemoryCollectives) else None):
            levels = serve(group, name="two levels")
        if isinstance(levels, HierarchicalCollectives):
            found.append(over("two levels", levels, levels, _barrier_by_sum(levels, device)))
        if isinstance(shared, SharedMemoryCollectives) and size == 2:
            found.append(Contender(SOCKETS, _Sent(Wire(group)).prepare))
    copies = _Copies(size=size, device=device)
    return [*found, Contender(COPY, copies.prepare)]


def build_case(group: Collectives, op: str, payload_bytes: int) -> Case:
    """A call of `op`, which is no barrier, on tensors of torch in memory of the host."""
    tensors = _Tensors(torch.device("cpu"))
    cases = _Cases(group, None, _nothing, rank=group.rank, size=group.size, tensors=tensors)
    return cases.prepare(op, payload_bytes)


def pairwise_over(group: dist.ProcessGroup, table: Table, *, name: str) -> PairwiseCollectives:
    """Messages between pairs of ranks wherever these are, by `table`; every rank of `group` calls this."""
    shown = meet(group, name=name)
    return Parts(group, shown, table, name=name).pairwise(range(len(shown)), of="")


def _apart_size(size: int) -> int:
    """How many ranks make one of the hosts that are made up of this one: the most that leave at least two."""
    local_size = 1
    while size % (2 * local_size) == 0 and 2 * local_size < size:
        local_size *= 2
    return local_size


@contextmanager
def _set_apart(host: str | None) -> Iterator[None]:
    """Have this rank count as one of a host of that name; None: of the one where it is."""
    before = os.environ.get("ZCORE_COMM_HOST")
    if host is not None:
        os.environ["ZCORE_COMM_HOST"] = f"{before or ''} bench {host}"
    try:
        yield
    finally:
        os.environ.pop("ZCORE_COMM_HOST", None)
        if before is not None:
            os.environ["ZCORE_COMM_HOST"] = before


def _barrier_by_sum(group: Collectives, device: torch.device) -> Callable[[], object]:
    """A barrier as `zcore.comm.barrier` makes one."""
    token = torch.zeros(1, device=device)
    return lambda: group.all_reduce(token, label="barrier").wait()


class _TorchCalls:
    """torch.distributed's own flat calls."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> _Waited:
        return _started(compat.all_gather_flat(output, input, group=self._group))

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> _Waited:
        return _started(compat.reduce_scatter_flat(output, input, group=self._group))

    def all_reduce(self, tensor: Tensor, *, label: str) -> _Waited:
        return _started(dist.all_reduce(tensor, group=self._group, async_op=True))

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> _Waited:
        return _started(compat.all_to_all_flat(output, input, group=self._group))

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> _Waited:
        return _started(dist.broadcast(tensor, group=self._group, group_src=src, async_op=True))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # None is for ranks outside the group
    return work


class _Tensors:
    """Tensors of torch that all implementations use in turn: one set for each would not fit at 1 GiB."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._by_role: dict[str, Tensor] = {}

    def take(self, role: str, numel: int) -> Tensor:
        """The tensor of that role."""
        found = self._by_role.get(role)
        if found is None or found.numel() != numel:
            self._by_role.pop(role, None)  # before there is another
            self._by_role[role] = torch.zeros(numel, dtype=DTYPE, device=self.device)
        return self._by_role[role]


class _Cases:
    """The ops of one implementation. Its buffers come from `born`, or else from `tensors`."""

    def __init__(
        self,
        calls: _Calls,
        born: Collectives | None,
        barrier: Callable[[], object],
        *,
        rank: int,
        size: int,
        tensors: _Tensors,
    ) -> None:
        self._calls, self._born, self._barrier = calls, born, barrier
        self._rank, self._size, self._tensors = rank, size, tensors
        self._ops: Mapping[str, Callable[[int], Case]] = {
            "all_gather": self._gather,
            "reduce_scatter": self._reduce_scatter,
            "all_reduce": self._all_reduce,
            "all_to_all": self._all_to_all,
            "broadcast": self._broadcast,
        }

    def prepare(self, op: str, payload_bytes: int) -> Case:
        """See `Contender`."""
        if op == "barrier":
            return Case(lambda: _discard(self._barrier()), lambda: True)
        return self._ops[op](whole_numel(payload_bytes, self._size))

    def _gather(self, numel: int) -> Case:
        calls, born, output = self._calls, self._born, self._whole(numel)
        own = self._tensors.take("part", numel // self._size)
        expected = [each + 1 for each in range(self._size)]

        def run() -> None:
            if born is not None:
                born.free_storage(output)  # as it is before each use of a sharded parameter
            calls.all_gather(output, own, label="bench").wait()

        def fill() -> None:
            own.fill_(self._rank + 1)
            if born is None:
                output.zero_()

        return _checked(run, fill, lambda: _holds(output, expected))

    def _reduce_scatter(self, numel: int) -> Case:
        calls, size = self._calls, self._size
        whole, own = self._whole(numel), self._tensors.take("part", numel // size)
        expected = size * (size + 1) // 2 + size * self._rank

        def fill() -> None:
            own.zero_()
            _fill_slots(whole, [self._rank + 1 + each for each in range(size)])

        return _checked(
            lambda: _wait(calls.reduce_scatter(own, whole, label="bench")), fill, lambda: _holds(own, [expected])
        )

    def _all_reduce(self, numel: int) -> Case:
        calls, size = self._calls, self._size
        tensor = self._whole(numel)

        def is_right() -> bool:
            found = _holds(tensor, [size * (size + 1) // 2])
            tensor.zero_()  # sums of sums would soon be infinite
            return found

        return _checked(
            lambda: _wait(calls.all_reduce(tensor, label="bench")), lambda: tensor.fill_(self._rank + 1), is_right
        )

    def _all_to_all(self, numel: int) -> Case:
        calls, size = self._calls, self._size
        sent, received = self._whole(numel), self._tensors.take("received", numel)
        expected = [each * size + self._rank for each in range(size)]

        def fill() -> None:
            received.zero_()
            _fill_slots(sent, [self._rank * size + each for each in range(size)])

        return _checked(
            lambda: _wait(calls.all_to_all(received, sent, label="bench")), fill, lambda: _holds(received, expected)
        )

    def _broadcast(self, numel: int) -> Case:
        calls, tensor = self._calls, self._whole(numel)
        return _checked(
            lambda: _wait(calls.broadcast(tensor, src=0, label="bench")),
            lambda: tensor.fill_(self._rank + 1),
            lambda: _holds(tensor, [1]),
        )

    def _whole(self, numel: int) -> Tensor:
        if self._born is None:
            return self._tensors.take("whole", numel)
        return self._born.empty(numel, dtype=DTYPE, device=self._tensors.device)


class _Sent:
    """What connections allow: the bytes that a link would carry, between 2 ranks."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def prepare(self, op: str, payload_bytes: int) -> Case:
        """See `Contender`; a barrier is a byte each."""
        num_bytes = int(bus_factor(op, 2) * whole_numel(payload_bytes, 2) * DTYPE.itemsize) if op != "barrier" else 1
        return Case(self._wire.prepare(num_bytes, is_one_way=op == "broadcast"), lambda: True)


class _Copies:
    """What memory allows: a copy of the bytes that a link would carry, by all ranks at once."""

    def __init__(self, *, size: int, device: torch.device) -> None:
        self._size, self._device = size, device

    def prepare(self, op: str, payload_bytes: int) -> Case | None:
        """See `Contender`."""
        if op == "barrier" or self._size == 1:
            return None
        numel = int(bus_factor(op, self._size) * whole_numel(payload_bytes, self._size))
        source = torch.zeros(numel, dtype=DTYPE, device=self._device)
        target = torch.empty_like(source)
        return Case(lambda: _discard(target.copy_(source)), lambda: True)


def _checked(run: Callable[[], object], fill: Callable[[], object], holds: Callable[[], bool]) -> Case:
    """A case whose check fills the tensors anew: others may have used them."""

    def is_right() -> bool:
        fill()
        run()
        return holds()

    return Case(run, is_right)


def _fill_slots(tensor: Tensor, values: list[int]) -> None:
    for slot, value in zip(tensor.tensor_split(len(values)), values, strict=True):
        slot.fill_(value)


def _wait(started: _Waited) -> None:
    started.wait()


def _nothing() -> None:
    """A barrier that nobody asks for."""


def _discard(_: object) -> None:
    """What a call returned is of no use here."""


def _holds(tensor: Tensor, slots: list[int]) -> bool:
    """Whether each of as many equal parts of `tensor` holds its value, and nothing else."""
    parts = tensor.tensor_split(len(slots))
    return all(bool((part == value).all()) for part, value in zip(parts, slots, strict=True))
