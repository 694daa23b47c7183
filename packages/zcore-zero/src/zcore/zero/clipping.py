"""The global norm of the gradients and clipping by it, equal on every rank and bit-equal in every row of the table.

Each bucket is cut into as many slices as there are data ranks, whatever is sharded. A rank sums the squares of one
slice of each bucket, in fp32; the sums of slices are exchanged and added up in fp64, in order of slice. So the work is
shared, and neither what a rank owns nor who computed a slice changes a bit of the result (section 5 of the ZeRO paper
needs the same norm on every rank; arXiv 1910.02054).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.mesh import DataParallel
from zcore.zero.bucket import Bucket
from zcore.zero.buffer import DataParallelGroups

__all__ = ["clip_factor", "global_norm", "scale_gradients"]


@ops.reference("squared_norm")
def squared_norm(tensor: Tensor) -> Tensor:
    """The sum of squares of a flat floating-point tensor: one fp32 element, accumulated in fp32."""
    if tensor.dtype is torch.float64:
        return tensor.square().sum()
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm.square()


def global_norm(
    buckets: Sequence[Bucket], *, dp: DataParallel, groups: DataParallelGroups, device: torch.device
) -> float:
    """The 2-norm of the mean gradient over all parameters; every rank calls it after a reduction."""
    sums = torch.zeros(len(buckets), dp.size, dtype=torch.float64, device=device)
    mine = dp.shard_rank * dp.replicate_size + dp.replicate_rank
    for row, bucket in enumerate(buckets):
        if bucket.gradients is None or bucket.gradients.reduced is None:
            continue
        reduced, size = bucket.gradients.reduced, bucket.plan.layout.slice_numel
        start = (mine - bucket.owned.start) * size
        function = ops.get("squared_norm", device=device, dtype=reduced.dtype)
        sums[row, mine] = function(reduced[start : start + size])
    flat = sums.view(-1)
    groups.all_reduce(flat, label="norm of the gradients")
    return float(flat.sum().sqrt())


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of `norm` are multiplied by so that it becomes `max_norm`, at most 1; torch's, to the bit."""
    return min(1.0, max_norm / (norm + 1e-6))


def scale_gradients(buckets: Sequence[Bucket], factor: float) -> None:
    """Multiply every reduced gradient by `factor`."""
    if factor == 1.0:
        return
    for bucket in buckets:
        if bucket.gradients is not None and bucket.gradients.reduced is not None:
            bucket.gradients.reduced.mul_(factor)
