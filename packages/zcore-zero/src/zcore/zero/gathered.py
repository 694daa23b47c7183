"""Read and edit whole parameters of a sharded model, outside its forward."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

from zcore.core.errors import StateError
from zcore.zero.bucket import Bucket
from zcore.zero.hooks import Conductor
from zcore.zero.sharded_parameter import ShardedParameter

__all__ = ["GatheredParameters"]


class GatheredParameters:
    """`with GatheredParameters(params, modifier_rank=0) as full:` - inside, the parameters are whole on every rank.

    `params` is a parameter or several, as the model has them; `full` holds the whole ones, and the model's attributes
    are whole too. With `modifier_rank`, what that data-parallel rank has written is sent to all and kept on leaving;
    without, changes are dropped. Parameters that are not sharded pass through. Every rank enters and leaves.

    Raises StateError for a parameter of `zero.Init` that has no values yet.
    """

    def __init__(
        self, params: Tensor | Iterable[Tensor], modifier_rank: int | None = None, *, enabled: bool = True
    ) -> None:
        self._params = [params] if isinstance(params, Tensor) else list(params)
        self._modifier_rank = modifier_rank
        self._enabled = enabled
        self._buckets: dict[int, tuple[Bucket, Conductor]] = {}
        # To tell what was edited, where master and compute dtype differ.
        self._before: dict[tuple[int, int], Tensor] = {}

    def __enter__(self) -> tuple[Tensor, ...]:
        """Gather, bucket by bucket in the order of the plan."""
        if not self._enabled:
            return tuple(self._params)
        for param in self._params:
            if isinstance(param, ShardedParameter):
                bucket = param.owner
                conductor = bucket.host() if isinstance(bucket, Bucket) and bucket.host is not None else None
                if not isinstance(bucket, Bucket) or not isinstance(conductor, Conductor):
                    raise StateError(f"The model that {param.fqn} belongs to is gone; keep it, or its engine, alive.")
                self._buckets[bucket.index] = bucket, conductor
            elif param.is_meta:
                raise StateError(
                    "A parameter constructed inside `zero.Init` has no values before `zero.initialize` or "
                    "`zero.shard`. Edit it inside the `zero.Init` block, where edits are recorded, or after sharding."
                )
        for index in sorted(self._buckets):
            bucket, conductor = self._buckets[index]
            conductor.gatherer.pin(bucket)
            for position, each in enumerate(bucket.params):
                if self._modifier_rank is not None and bucket.memory.casts:
                    self._before[index, position] = each.full.detach().clone()
        return tuple(self._whole(param) for param in self._params)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the modifier's edits and reshard; edits are dropped when the block raised."""
        for index in sorted(self._buckets):
            bucket, conductor = self._buckets[index]
            if self._modifier_rank is not None and kind is None:
                with torch.no_grad():
                    self._keep(bucket, self._modifier_rank)
            else:
                bucket.mark_stale()  # edits that nobody is to see
            conductor.gatherer.unpin(bucket)

    def _whole(self, param: Tensor) -> Tensor:
        if not isinstance(param, ShardedParameter):
            return param
        owner = param.owner
        assert isinstance(owner, Bucket)
        return owner.params[param.position].full

    def _keep(self, bucket: Bucket, modifier_rank: int) -> None:
        wanted = {
            param.position for param in self._params if isinstance(param, ShardedParameter) and param.owner is bucket
        }
        for index in sorted(wanted):
            full: nn.Parameter = bucket.params[index].full
            bucket.broadcast(index, src=modifier_rank)
            before = self._before.get((bucket.index, index))
            bucket.write(index, full, where=None if before is None else full != before)
