"""The contract over NCCL, as torch.distributed has it, with what torch leaves to others: a watch, and memory it knows.

The core's `TorchCollectives` starts each call on NCCL's stream and orders the current stream behind it in `wait()`. No
host waits, so the watch's thread looks after each call, and says in the log which is late, on which ranks, and what
they did instead. That comes beside torch's own watchdog, which ends the process after the group's timeout and writes
what its flight recorder holds (TORCH_FR_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT).

With ZCORE_COMM_REGISTER=1 buffers are born in a pool that NCCL has registered, so that it reads and writes them where
they are (user buffer registration), without copies into buffers of its own.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.comm.calls.requests import Together
from zcore.comm.ranks.journal import Journal
from zcore.core import compat
from zcore.core.collectives import CallLog, Traffic, derived_label
from zcore.core.torch_collectives import TorchCollectives, TorchPending

__all__ = ["AcceleratorCollectives"]


class AcceleratorCollectives:
    """The contract between ranks with an accelerator each. `name` is what reports call the group."""

    def __init__(self, group: dist.ProcessGroup, journal: Journal, *, name: str) -> None:
        self._inner = TorchCollectives(group, name=name)
        self._group = group
        self._journal = journal
        self._log = CallLog(name)
        self._registers = os.environ.get("ZCORE_COMM_REGISTER") == "1"

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._inner.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._inner.size

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        return self._inner.traffic

    def algorithm_for(self, op: str, payload_bytes: int) -> str:
        """How a call is served, in words."""
        return f"torch {compat.backend_name(self._group)}"

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer, in registered memory if that is asked for."""
        with self._pool(device):
            return self._inner.empty(numel, dtype=dtype, device=device)

    def free_storage(self, buffer: Tensor) -> None:
        """See `Collectives.free_storage`."""
        self._inner.free_storage(buffer)

    def alloc_storage(self, buffer: Tensor) -> None:
        """See `Collectives.alloc_storage`."""
        with self._pool(buffer.device):
            self._inner.alloc_storage(buffer)

    def own_storage(self, buffer: Tensor) -> None:
        """Every buffer has memory of its own here."""

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.all_gather`."""
        self.alloc_storage(output)
        return self._follow("all_gather", label, output, lambda: self._inner.all_gather(output, input, label=label))

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.reduce_scatter`."""
        return self._follow(
            "reduce_scatter", label, input, lambda: self._inner.reduce_scatter(output, input, label=label)
        )

    def all_reduce(self, tensor: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.all_reduce`."""
        return self._follow("all_reduce", label, tensor, lambda: self._inner.all_reduce(tensor, label=label))

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> TorchPending:
        """See `Collectives.all_to_all`."""
        return self._follow("all_to_all", label, input, lambda: self._inner.all_to_all(output, input, label=label))

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> TorchPending:
        """See `Collectives.broadcast`."""
        words = derived_label(f"{label} from rank {src}", parts=[label])
        return self._follow("broadcast", words, tensor, lambda: self._inner.broadcast(tensor, src=src, label=label))

    def send(self, tensor: Tensor, *, dst: int, label: str) -> TorchPending:
        """See `Collectives.send`."""
        return self._inner.send(tensor, dst=dst, label=label)

    def recv(self, tensor: Tensor, *, src: int, label: str) -> TorchPending:
        """See `Collectives.recv`."""
        return self._inner.recv(tensor, src=src, label=label)

    def starts_together(self, op: str) -> bool:
        """See `StartsTogether`."""
        return op in ("all_gather", "reduce_scatter", "all_reduce")

    def start_together(self, together: Together) -> TorchPending:
        """See `StartsTogether`."""
        parts = together.parts
        calls = [self._log.note(part.op, part.label, part.larger) for part in parts]
        for call in calls:
            self._journal.start(call)
        pending = self._inner.start_coalesced(together.op, [(part.output, part.input, part.label) for part in parts])
        for call in calls:
            self._journal.follow(call, pending.is_completed)
        return pending

    def _follow(self, op: str, label: str, tensor: Tensor, start: Callable[[], TorchPending]) -> TorchPending:
        call = self._log.note(op, label, tensor)
        self._journal.start(call)
        pending = start()
        self._journal.follow(call, pending.is_completed)
        return pending

    def _pool(self, device: torch.device) -> AbstractContextManager[None]:
        if not self._registers or device.type != "cuda":
            return nullcontext()
        return torch.cuda.use_mem_pool(_registered_pool(self._group, device), device)


_pools: "WeakKeyDictionary[dist.ProcessGroup, torch.cuda.MemPool]" = WeakKeyDictionary()


def _registered_pool(group: dist.ProcessGroup, device: torch.device) -> "torch.cuda.MemPool":
    """Memory that NCCL allocates, and registers as it grows; of the one device that this rank has in `group`."""
    if group not in _pools:
        backend = compat.backend_of(group, device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        backend.register_mem_pool(pool)
        _pools[group] = pool
    return _pools[group]
