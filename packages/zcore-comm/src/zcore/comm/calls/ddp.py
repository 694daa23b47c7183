"""A communication hook for torch's DistributedDataParallel: the mean of its gradients through zcore's collectives.

    backward   bucket 0 is ready    bucket 1 is ready    the last one is ready
    hook       start its sum        start its sum        start its sum; wait for each, divide it, fulfil its future

A call of zcore comes to its end in `wait`, so somebody has to wait; DDP, which waits for its futures right after the
last bucket's call, does not know how. A callback of autograd would come too late in the first backward of a static
graph, where DDP calls hooks from a callback of its own and waits at once: there each bucket is waited for by itself.

A bucket's memory is exchanged, once, for memory of the group's: from then on backward writes gradients where the other
ranks read them. Without that copy 2 ranks on 2 busy cores need 110 ms for a backward that takes DDP 135 (25 M
parameters; no communication: 46); with it they gain nothing.

Where ranks share no memory torch sums, as without the hook: messages between pairs take as long as torch's (4 x 25 MiB,
2 ranks: 75 ms and 71), and DDP then overlaps torch's better.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, but not in its __all__

from zcore.comm.calls.served import served_of
from zcore.core import compat
from zcore.core.collectives import Collectives, Pending

__all__ = ["ddp_hook"]


@dataclass(frozen=True, slots=True, eq=False)
class _Mean:
    """A bucket on its way to its mean."""

    gradients: Tensor  # [numel], the bucket itself
    total: Pending
    future: "torch.futures.Future[Tensor]"

    def finish(self, *, divisor: int) -> None:
        """Wait for the sum, and hand the mean to DDP."""
        self.total.wait()
        self.future.set_result(self.gradients.div_(divisor))


_under_way: "WeakKeyDictionary[Collectives, list[_Mean]]" = WeakKeyDictionary()  # in the order of the hook's calls


def ddp_hook(state: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """For `model.register_comm_hook(state, ddp_hook)` on every rank; the mean of `bucket` over ranks, in place.

    state: the group over whose ranks the model is replicated, as given to DDP; None is the default group. With 2 ranks
    gradients are those of DDP without a hook, to the bit; with more they are sums in zcore's order, a tree over ranks,
    divided afterwards. Two models on one group may share a backward. Where ranks share no memory, torch sums.

    The backward raises CollectiveError if a rank died or left, and StateError as `collectives_of` does.
    """
    served = served_of(state)
    if not served.shares_memory:
        return _by_torch(served.group, bucket)
    group, gradients = served.collectives, bucket.buffer()
    _move_into_group(gradients, group)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    under_way = _under_way.setdefault(group, [])
    under_way.append(_Mean(gradients, group.all_reduce(gradients, label=f"gradients.{bucket.index()}"), future))
    if bucket.is_last() or compat.current_node() is None:  # no node: the first backward of a static graph
        ready = under_way.copy()
        under_way.clear()  # first, as one that fails is not tried again
        for mean in ready:
            mean.finish(divisor=group.size)
    return future


def _by_torch(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook(group, bucket)


_moved: dict[int, int] = {}  # storage -> address of the group's memory that it was given


def _move_into_group(bucket: Tensor, group: Collectives) -> None:
    """Exchange a bucket's memory for memory born in the group, contents and all; every view of it sees that."""
    storage = bucket.untyped_storage()
    key = compat.storage_key(bucket)
    num_bytes = bucket.numel() * bucket.element_size()
    if _moved.get(key) == storage.data_ptr() or storage.nbytes() != num_bytes or not num_bytes:
        return
    born = group.empty(bucket.numel(), dtype=bucket.dtype, device=bucket.device).copy_(bucket)
    compat.swap_memory(storage, born.untyped_storage())
    _moved[key] = storage.data_ptr()
