"""A communication hook for torch's DistributedDataParallel: the mean of its gradients through zcore's collectives.

    backward   bucket 0 is ready    bucket 1 is ready         the last one is ready
    hook       sum 0                sum 1                     sum 2
                                    divide 0, gather 0        divide 1, gather 1; divide 2, gather 2; wait for all

Each rank sums and divides its part of a bucket, then all gather the parts. A call of zcore comes to its end in `wait`,
so somebody has to wait: the hook itself, one bucket behind, and in the last bucket's call for everything. DDP waits for
its futures right after that, in the order of the buckets. (A callback of autograd would come too late in the first
backward of a static graph, where DDP calls hooks from a callback of its own and waits at once.)

A bucket's memory is exchanged, once, for memory of the group's: from then on backward writes gradients where the other
ranks read them. That spares a copy; with plain buckets the hook gains nothing on shared memory.

Where only torch itself can move the data, the hook does what torch does: an exchange by zcore's core begins its second
half only when it is waited for, which costs more than it saves (100 MB of gradients, 2 ranks: 340 ms against 140).
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, but not in its __all__

from zcore.comm.requests import DeferrableCollectives
from zcore.comm.served import served_of
from zcore.core import compat
from zcore.core.collectives import Collectives, Pending

__all__ = ["ddp_hook"]


@dataclass(eq=False, slots=True)
class _Mean:
    """A bucket on its way to its mean."""

    group: DeferrableCollectives
    bucket: Tensor  # [numel]
    part: Tensor  # what this rank divides: its part, or everything where parts would not be equal
    label: str
    future: "torch.futures.Future[Tensor]"
    sum: Pending | None
    gather: Pending | None = None

    def turn(self) -> None:
        """Divide the sum, and start to gather it. No effect the second time."""
        pending, self.sum = self.sum, None
        if pending is None:
            return
        pending.wait()
        self.part.div_(self.group.size)
        if self.part is not self.bucket:
            # Urgent: backward is done with it, and DDP waits for buckets in their order.
            self.gather = self.group.all_gather(self.bucket, self.part, label=self.label)

    def finish(self) -> None:
        """Wait for the rest, and hand the bucket to DDP."""
        if self.gather is not None:
            self.gather.wait()
        self.future.set_result(self.bucket)


_under_way: "WeakKeyDictionary[Collectives, list[_Mean]]" = WeakKeyDictionary()  # in the order of the hook's calls


def ddp_hook(state: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """For `model.register_comm_hook(state, ddp_hook)` on every rank; the mean of `bucket` over ranks, in place.

    state: the group over whose ranks the model is replicated, as given to DDP; None is the default group. With 2 ranks
    gradients are those of DDP without a hook, to the bit; with more they are sums in zcore's order, a tree over ranks,
    divided afterwards. Two models on one group may share a backward. Where nothing faster than torch serves the group,
    torch sums.

    The backward raises CollectiveError if a rank died or left, and StateError as `collectives_of` does.
    """
    served = served_of(state)
    if served.is_torchs_own:
        return _by_torch(served.group, bucket)
    group, gradients = served.collectives, bucket.buffer()
    if gradients.device.type == "cpu" and compat.CAN_SWAP_MEMORY:
        _move_into_group(gradients, group)
    under_way = _under_way.setdefault(group, [])
    mean = _start(group, gradients, label=f"gradients.{bucket.index()}")
    for earlier in under_way:
        earlier.turn()
    under_way.append(mean)
    if bucket.is_last() or compat.current_node() is None:  # no node: the first backward of a static graph
        ready = under_way.copy()
        under_way.clear()  # whatever comes: they are not tried again
        for each in ready:
            each.turn()
        for each in ready:
            each.finish()
    return mean.future


def _by_torch(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    return allreduce_hook(group, bucket)


def _start(group: DeferrableCollectives, bucket: Tensor, *, label: str) -> _Mean:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    numel, rest = divmod(bucket.numel(), group.size)
    if rest:
        return _Mean(group, bucket, bucket, label, future, group.all_reduce(bucket, label=label))
    part = bucket[group.rank * numel : (group.rank + 1) * numel]
    return _Mean(group, bucket, part, label, future, group.reduce_scatter(part, bucket, label=label))


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
