"""Read and edit whole parameters of a sharded model, outside its forward."""

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from zcore.core.errors import StateError
from zcore.zero.bucket import Bucket
from zcore.zero.bucket_param import FRAGMENT
from zcore.zero.hooks import Conductor
from zcore.zero.saved import claims
from zcore.zero.sharded_parameter import ShardedParameter

__all__ = ["GatheredParameters"]


class GatheredParameters:
    """`with GatheredParameters(params, modifier_rank=0) as full:` - inside, the parameters are whole on every rank.

    `params` is a parameter or several, as the model has them; `full` holds the whole ones, and the model's attributes
    are whole too. With `modifier_rank`, what that data-parallel rank has written is sent to all and kept on leaving;
    without, changes are dropped. Values are in the dtype that is computed in: under bf16 an edit is rounded to it, and
    what was not edited keeps its fp32 master. Parameters that are not sharded pass through. Every rank enters and
    leaves.

    Raises StateError for a parameter of `zero.Init` that has no values yet.
    """

    def __init__(
        self, params: Tensor | Iterable[Tensor], modifier_rank: int | None = None, *, enabled: bool = True
    ) -> None:
        listed = [params] if isinstance(params, Tensor) else list(params)
        # Inside another GatheredParameters the model shows whole parameters; each knows its fragment.
        self._params: list[Tensor] = [getattr(param, FRAGMENT, param) for param in listed]
        self._modifier_rank = modifier_rank
        self._enabled = enabled
        self._buckets: dict[int, tuple[Bucket, Conductor]] = {}
        # To tell what was edited where master and compute dtype differ, and to take it back where they share memory.
        self._before: dict[int, list[tuple[int, Tensor]]] = {}
        self._staying: set[int] = set()  # buckets that are whole before and after, by their row or an enclosing block
        self._claims: saved_tensors_hooks | None = None

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
        if self._modifier_rank is not None and (taken := [b for b, _ in self._buckets.values() if b.is_pinned]):
            raise StateError(
                f"Parameters of {taken[0].plan.name!r} are gathered by an enclosing block, which would overwrite what "
                "is edited here when it ends. Pass modifier_rank to the outermost block."
            )
        for index in sorted(self._buckets):
            bucket, conductor = self._buckets[index]
            if not bucket.is_transient or bucket.is_pinned:
                self._staying.add(index)
            conductor.gatherer.pin(bucket)
            if index in self._staying or (self._modifier_rank is not None and bucket.memory.casts):
                self._before[index] = [
                    (position, bucket.params[position].full.detach().clone()) for position in self._asked_of(bucket)
                ]
        if any(bucket.is_transient for bucket, _ in self._buckets.values()):
            self._claims = claims()  # what is computed here may be differentiated when the parameters are gone
            self._claims.__enter__()
        return tuple(self._whole(param) for param in self._params)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the modifier's edits and reshard; edits are dropped when the block raised."""
        if self._claims is not None:
            self._claims.__exit__(kind, error, trace)
            self._claims = None
        for index in sorted(self._buckets):
            bucket, conductor = self._buckets[index]
            if self._modifier_rank is not None and kind is None:
                with torch.no_grad():
                    self._keep(bucket, self._modifier_rank)
            else:
                self._drop(bucket)
            conductor.gatherer.unpin(bucket)

    def _whole(self, param: Tensor) -> Tensor:
        if not isinstance(param, ShardedParameter):
            return param
        owner = param.owner
        assert isinstance(owner, Bucket)
        return owner.params[param.position].full

    def _asked_of(self, bucket: Bucket) -> list[int]:
        """Positions in `bucket` of the parameters that were asked for."""
        params = (param for param in self._params if isinstance(param, ShardedParameter) and param.owner is bucket)
        return sorted({param.position for param in params})

    def _keep(self, bucket: Bucket, modifier_rank: int) -> None:
        before = dict(self._before.get(bucket.index, ()))
        for position in self._asked_of(bucket):
            full: nn.Parameter = bucket.params[position].full
            bucket.broadcast(position, src=modifier_rank)
            edited = full != before[position] if bucket.memory.casts else None
            bucket.write(position, full, where=edited)

    def _drop(self, bucket: Bucket) -> None:
        if bucket.index not in self._staying:
            bucket.forget_gathered()
            return
        for position, value in self._before[bucket.index]:
            full = bucket.params[position].full
            if not torch.equal(full, value):  # else a backward to come would find it modified
                with torch.no_grad():
                    full.copy_(value)
