"""What a training step sends: what is handed to collectives, and what then crossed the loopback device.

A payload is the larger side of a call: what was gathered, what is to be scattered. Of it a rank of N has to send at
least (N - 1)/N, of what is all-reduced twice that; counted so, in bytes of all parameters, a stage of ZeRO sends 2 or 3
(docs/zero.md, Stages). Shared memory sends nothing over a device: ranks read what the others have written.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zcore import zero

__all__ = ["count_payload", "in_parameters", "loopback_bytes"]

DEVICES = Path("/proc/net/dev")


def in_parameters(payload_bytes: dict[str, int], *, parameters_bytes: int) -> float:
    """The sum of payloads, of all-reduces twice, in bytes of all parameters.

    >>> in_parameters({"all_reduce": 100, "all_gather": 200}, parameters_bytes=100)
    4.0
    """
    return sum(num_bytes * (2 if op == "all_reduce" else 1) for op, num_bytes in payload_bytes.items()) / (
        parameters_bytes
    )


def count_payload(step: Callable[[], object], engine: zero.Engine | None) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes and calls of this rank by op, of one step: by zcore's own counters, or as torch dispatches them."""
    if engine is None:
        with _Counted() as counted:
            step()
        return dict(counted.payload_bytes), dict(counted.calls)
    before_bytes, before_calls = _own_counters(engine)
    step()
    after_bytes, after_calls = _own_counters(engine)
    return dict(after_bytes - before_bytes), dict(after_calls - before_calls)


def _own_counters(engine: zero.Engine) -> tuple[Counter[str], Counter[str]]:
    traffic = engine.traffic().values()
    return sum((each.payload_bytes for each in traffic), Counter()), sum((each.calls for each in traffic), Counter())


class _Counted(TorchDispatchMode):
    """Sees every collective of torch.distributed, whether Python or C++ (as DDP's reducer) starts it."""

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sides = [
                sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(side) if isinstance(leaf, Tensor))
                for side in args
            ]
            op = _name_of(func._opname)
            if op != "barrier":
                self.payload_bytes[op] += max(sides, default=0)
                self.calls[op] += 1
        return func(*args, **(kwargs or {}))


def _name_of(op: str) -> str:
    """The contract's word for one of torch's.

    >>> [_name_of(op) for op in ("allreduce_", "_allgather_base_", "reduce_scatter_tensor_coalesced_", "broadcast_")]
    ['all_reduce', 'all_gather', 'reduce_scatter', 'broadcast']
    """
    op = op.strip("_").replace("allreduce", "all_reduce").replace("allgather", "all_gather")
    op = op.replace("alltoall", "all_to_all")
    return op.removesuffix("_coalesced").removesuffix("_base").removesuffix("_into_tensor").removesuffix("_tensor")


def loopback_bytes(step: Callable[[], object], *, repeats: int) -> int:
    """Bytes of one step, of all ranks together, over the loopback device. Every rank calls this.

    Of `repeats` steps the least, as what else uses the device meanwhile counts, too.
    """
    sent_bytes = []
    for _ in range(repeats):
        dist.barrier()
        before_bytes = _loopback_bytes()
        dist.barrier()
        step()
        dist.barrier()
        sent_bytes.append(_loopback_bytes() - before_bytes)
    sent = torch.tensor(min(sent_bytes))
    dist.broadcast(sent, src=0)
    return int(sent.item())


def _loopback_bytes() -> int:
    (line,) = (line for line in DEVICES.read_text(encoding="ascii").splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])  # sent: each byte is received there, too
