"""One bucket: its parameters, the state they are in, and which tensors are registered on the modules.

    UNINITIALIZED -> SHARDED <-> AVAILABLE      the state says what is registered: fragments, or whole parameters
                        |            ^
                        `- INFLIGHT -'

A bucket makes the moves it is asked for; when to make them is the business of `gathering.py` and `reduction.py`.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor, nn

from zcore.core.collectives import Pending
from zcore.core.errors import StateError
from zcore.core.mesh import DataParallel
from zcore.zero.buffer import BucketDtypes, BucketGradients, BucketParameters, DataParallelGroups, Ledger
from zcore.zero.layout import BucketPlan, Fragment
from zcore.zero.placement import Placement, Row, owned_slices
from zcore.zero.sharded_parameter import ShardedGradient, ShardedParameter
from zcore.zero.units import ParamSites

__all__ = ["MOVES", "Bucket", "BucketParam", "ParamState"]


class ParamState(Enum):
    """What the parameters of a bucket are right now, and what memory that costs."""

    UNINITIALIZED = auto()  # the model is on meta or still whole; the master shard is not written yet
    SHARDED = auto()  # fragments registered; of a SHARD row the gathered storage is freed
    INFLIGHT = auto()  # master shard and gathered storage live; nobody reads the latter before wait()
    AVAILABLE = auto()  # whole parameters registered, views of the gathered storage; the master shard still lives


MOVES = {
    ParamState.UNINITIALIZED: {ParamState.SHARDED},  # every fragment is written
    ParamState.SHARDED: {ParamState.INFLIGHT, ParamState.AVAILABLE},  # gather; or the gathered copy is still current
    ParamState.INFLIGHT: {ParamState.AVAILABLE},  # wait
    ParamState.AVAILABLE: {ParamState.SHARDED},  # reshard
}


@dataclass(frozen=True, slots=True)
class BucketParam:
    """One parameter of a bucket: the whole as the modules compute with it, and the fragment as the optimizer sees it."""

    full: nn.Parameter
    shard: ShardedParameter
    fragment: Fragment
    sites: tuple[tuple[weakref.ref[nn.Module], str], ...]

    def register(self, param: nn.Parameter) -> None:
        """Put `param` at every place of the model where this parameter belongs."""
        for module_ref, name in self.sites:
            module = module_ref()
            if module is not None:
                module._parameters[name] = param


class Bucket:
    """See the header. `index` is the position in the plan, equal on every rank."""

    def __init__(
        self,
        plan: BucketPlan,
        row: Row,
        *,
        index: int,
        members: tuple[ParamSites, ...],
        dp: DataParallel,
        dtypes: BucketDtypes,
        groups: DataParallelGroups,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        self.plan = plan
        self.index = index
        self.row = row
        self.owned = owned_slices(row, dp)
        self.state = ParamState.UNINITIALIZED
        self.is_stale = True  # whether the master shards have moved on since the last gather
        self.gather_on_use: Callable[[Bucket], None] | None = None  # set while the model may use borrowed parameters
        self.watch_result: Callable[[Bucket, object], None] | None = None
        self.memory = BucketParameters(
            plan, row, dp=dp, dtypes=dtypes, collectives=groups.gather, device=device, ledger=ledger
        )
        self.gradients: BucketGradients | None = None
        if plan.trainable:
            self.gradients = BucketGradients(
                plan, row, dp=dp, dtype=dtypes.master, groups=groups, device=device, ledger=ledger
            )
        self._pending: Pending | None = None
        self.params = tuple(self._make_param(index, each) for index, each in enumerate(members))

    def _make_param(self, index: int, member: ParamSites) -> BucketParam:
        spec, layout = member.spec, self.plan.layout
        offset = layout.offsets[index]
        # .data: a version counter apart from the buffer's, since a gather into the buffer is no in-place edit to autograd
        view = self.memory.gathered[offset : offset + spec.numel].view(spec.shape).data
        full = nn.Parameter(view, requires_grad=spec.trainable)
        full.__dict__.update(member.param.__dict__)  # tags that users and optimizers put on a parameter
        fragment = layout.fragment(index, self.owned)
        held = self.memory.master[fragment.offset : fragment.offset + fragment.numel]
        shard = ShardedParameter.of(
            held, owner=self, index=index, fqn=spec.fqn, full_shape=spec.shape, start=fragment.start
        )
        shard.requires_grad_(spec.trainable)
        return BucketParam(full, shard, fragment, tuple((weakref.ref(module), name) for module, name in member.sites))

    @property
    def is_transient(self) -> bool:
        """Whether resharding frees memory, so that a later use gathers again."""
        return self.row.parameters is Placement.SHARD

    def _move(self, target: ParamState) -> None:
        if target not in MOVES[self.state]:
            raise StateError(
                f"Bucket {self.plan.name!r} is {self.state.name} and cannot become {target.name}; from there it can only "
                f"become {', '.join(sorted(each.name for each in MOVES[self.state]))}. This is a fault in zcore: please "
                "report it with the model."
            )
        self.state = target

    def write(self, index: int, value: Tensor) -> None:
        """Keep this rank's fragment of parameter `index` from its whole value, of any dtype and device."""
        part = self.params[index].fragment
        with torch.no_grad():
            held = self.memory.master[part.offset : part.offset + part.numel]
            held.copy_(value.detach().reshape(-1)[part.start : part.stop])

    def seal(self) -> None:
        """UNINITIALIZED -> SHARDED: every fragment is written; register them."""
        self._move(ParamState.SHARDED)
        self._register_shards()

    def gather(self) -> None:
        """SHARDED -> INFLIGHT, or straight to AVAILABLE where the gathered copy is still current."""
        if not self.is_stale:
            self._make_available()
            return
        self._move(ParamState.INFLIGHT)
        with torch.no_grad():
            self._pending = self.memory.start_gather()

    def wait(self) -> None:
        """INFLIGHT -> AVAILABLE."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
        self.is_stale = False
        self._make_available()

    def _make_available(self) -> None:
        self._move(ParamState.AVAILABLE)
        for param in self.params:
            param.register(param.full)

    def reshard(self) -> None:
        """AVAILABLE -> SHARDED."""
        self._move(ParamState.SHARDED)
        if self.memory.release():
            self.is_stale = True
        self._register_shards()

    def _register_shards(self) -> None:
        for param in self.params:
            param.register(param.shard)

    def deliver(self, used: list[bool]) -> None:
        """Give every fragment its gradient; None to one that no rank used, as plain torch would."""
        assert self.gradients is not None and self.gradients.reduced is not None
        reduced = self.gradients.reduced
        for param, is_used in zip(self.params, used, strict=True):
            part = param.fragment
            grad = reduced[part.offset : part.offset + part.numel] if is_used else None
            param.shard.grad = grad.as_subclass(ShardedGradient) if grad is not None else None

    def clear_gradients(self) -> None:
        """Forget the gradients of fragments and buffers."""
        for param in self.params:
            param.shard.grad = None
        if self.gradients is not None:
            self.gradients.clear()

    # What a fragment asks of its bucket (see ParameterOwner).

    def is_available(self) -> bool:
        """See ParameterOwner."""
        return self.state is ParamState.AVAILABLE

    def may_gather(self) -> bool:
        """See ParameterOwner."""
        return self.gather_on_use is not None

    def whole(self, index: int, *, with_data: bool) -> Tensor:
        """See ParameterOwner."""
        if with_data and self.gather_on_use is not None:
            self.gather_on_use(self)
        return self.params[index].full

    def watch_backward(self, result: object) -> None:
        """See ParameterOwner."""
        if self.watch_result is not None:
            self.watch_result(self, result)
