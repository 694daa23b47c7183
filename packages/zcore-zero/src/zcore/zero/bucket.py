"""One bucket: its parameters, the state they are in, and which tensors are registered on the modules.

    UNINITIALIZED -> SHARDED <-> AVAILABLE
                        |            ^
                        `- INFLIGHT -'

Fragments are registered, but for modules that run: they see the whole parameters of an AVAILABLE bucket.
A bucket makes the moves it is asked for; when to make them is the business of `gathering.py` and `reduction.py`.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from zcore.core import compat
from zcore.core.collectives import Pending
from zcore.core.errors import StateError
from zcore.core.mesh import DataParallel
from zcore.zero.buffer import BucketDtypes, BucketGradients, BucketParameters, DataParallelGroups, Ledger
from zcore.zero.layout import BucketPlan, Fragment
from zcore.zero.placement import Placement, Row, owned_slices
from zcore.zero.sharded_parameter import FragmentValues, ShardedParameter, UnreducedGradient, lost_edit
from zcore.zero.units import ParamSites

__all__ = ["FRAGMENT", "MOVES", "Bucket", "BucketHost", "BucketParam", "ParamState"]


FRAGMENT = "_zcore_fragment"  # attribute of a whole parameter


class ParamState(Enum):
    """What the parameters of a bucket are right now, and what memory that costs."""

    UNINITIALIZED = auto()  # the model is on meta or still whole; the master shard is not written yet
    SHARDED = auto()  # fragments registered; of a SHARD row the gathered storage is freed
    INFLIGHT = auto()  # master shard and gathered storage live; nobody reads the latter before wait()
    AVAILABLE = auto()  # gathered storage is whole, and may be registered and read; the master shard still lives


MOVES = {
    ParamState.UNINITIALIZED: {ParamState.SHARDED},  # every fragment is written
    ParamState.SHARDED: {ParamState.INFLIGHT, ParamState.AVAILABLE},  # gather; or the gathered copy is still current
    ParamState.INFLIGHT: {ParamState.AVAILABLE},  # wait
    ParamState.AVAILABLE: {ParamState.SHARDED},  # reshard
}


class GradState(Enum):
    """What the `.grad` of a fragment was when zcore set it last; the user may have changed it since."""

    NONE = auto()  # None: no gradient since the last `zero_grad`
    ANNOUNCED = auto()  # stands for one that is not reduced yet, and can only be dropped
    DELIVERED = auto()  # a view of the reduced gradients


class BucketHost(Protocol):
    """Whoever decides when the bucket moves."""

    @property
    def is_running(self) -> bool:
        """Whether a forward or backward of the model is running."""
        ...

    def borrow(self, bucket: "Bucket") -> bool:
        """Make the bucket AVAILABLE for an operation outside its own modules; whether that may save its memory."""
        ...

    def end_borrow(self, bucket: "Bucket") -> None:
        """The operation is over."""
        ...

    def keep_for(self, bucket: "Bucket", result: object) -> None:
        """Keep the bucket AVAILABLE until the forward ends if a tensor of `result` lies in its memory."""
        ...

    def read_in_backward(self, bucket: "Bucket") -> None:
        """Make the bucket AVAILABLE for an operation of the backward that runs."""
        ...


@dataclass(frozen=True, slots=True)
class BucketParam:
    """One parameter of a bucket: the whole that the modules compute with, and the fragment that the optimizer sees."""

    full: nn.Parameter
    shard: ShardedParameter
    fragment: Fragment
    sites: tuple[tuple[weakref.ref[nn.Module], str], ...]

    def set_gradient(self, grad: Tensor | None) -> Tensor | None:
        """Set the fragment's `.grad`, whatever the fragment stands for right now; what it is then."""
        given = grad.as_subclass(FragmentValues) if grad is not None else None
        with torch._C.DisableTorchFunctionSubclass():
            self.shard.grad = given
        return given

    def announce_gradient(self) -> None:
        """Make it seen that there is a gradient, which is not reduced yet: dropping it drops that."""
        with torch._C.DisableTorchFunctionSubclass():
            stand_in = self.shard.detach().new_zeros(1).expand(self.fragment.numel)
            self.shard.grad = stand_in.as_subclass(UnreducedGradient)

    @property
    def gradient(self) -> Tensor | None:
        """The fragment's `.grad`."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.shard.grad

    @property
    def has_gradient(self) -> bool:
        """Whether the fragment has a `.grad`, and not one that was set to zero before it was reduced."""
        grad = self.gradient
        return grad is not None and not (isinstance(grad, UnreducedGradient) and grad.was_zeroed)

    @property
    def is_trainable(self) -> bool:
        """Whether the fragment requires a gradient now; users may freeze it between steps."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.shard.requires_grad

    def check_registered(self) -> None:
        """Raise StateError where the model has something else in this parameter's place."""
        for module_ref, name in self.sites:
            module = module_ref()
            found = module._parameters.get(name) if module is not None else self.full
            if found is not self.shard and found is not self.full:
                raise StateError(
                    f"{self.shard.fqn} is no longer the parameter that was sharded: {type(module).__name__}.{name} was "
                    "tied to another, replaced (as torch.func.functional_call does) or removed. Change the model "
                    "before it is sharded; to edit values use `zero.GatheredParameters`."
                )

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
        self.is_pinned = False  # inside GatheredParameters, where the fragments stand for the whole
        self._shown: set[int] = set()  # parameters of which the whole is registered on the modules
        self._num_updates = 0  # announced ones; edits in place show in the master's version
        self._gathered: tuple[int, int] | None = None  # of which values there is a whole copy
        self._computed_with: tuple[int, int] | None = None  # the values that the last forward read
        self._versions: list[int] = []  # of the whole parameters, when they became AVAILABLE
        self._grad_states = [GradState.NONE] * len(members)
        self._given: list[Tensor | None] = [None] * len(members)  # the tensors that were set as `.grad`
        self.host: weakref.ref[BucketHost] | None = None  # weak, like every edge back up: `del model` frees the memory
        self.memory = BucketParameters(
            plan, row, dp=dp, dtypes=dtypes, collectives=groups.gather, device=device, ledger=ledger
        )
        self.gradients: BucketGradients | None = None
        if plan.trainable:
            self.gradients = BucketGradients(
                plan, row, dp=dp, dtype=dtypes.master, groups=groups, device=device, ledger=ledger
            )
        self._groups = groups
        self._pending: Pending | None = None
        self.params = tuple(self._make_param(index, each) for index, each in enumerate(members))

    def _make_param(self, index: int, member: ParamSites) -> BucketParam:
        spec = member.spec
        full = nn.Parameter(self.memory.views[index], requires_grad=spec.trainable)
        full.__dict__.update(member.param.__dict__)  # tags that users and optimizers put on a parameter
        _move_hooks(member.param, full, spec.fqn)
        fragment = self.plan.layout.fragment(index, self.owned)
        held = self.memory.master[fragment.offset : fragment.offset + fragment.numel]
        shard = ShardedParameter.of(
            held, owner=self, index=index, fqn=spec.fqn, full_shape=spec.shape, start=fragment.start
        )
        shard.requires_grad_(spec.trainable)
        full.__dict__[FRAGMENT] = shard
        return BucketParam(full, shard, fragment, tuple((weakref.ref(module), name) for module, name in member.sites))

    @property
    def values(self) -> tuple[int, int]:
        """What identifies the values of the master shards; edits in place count, through any alias but `.data`."""
        return self._num_updates, self.memory.master._version

    @property
    def is_stale(self) -> bool:
        """Whether there is no whole copy of the values that the master shards have now, nor one on its way."""
        if self.state is ParamState.INFLIGHT and not self.is_transient and self._gathered is not None:
            # The master may lie in what is being gathered, whose version gloo raises on arrival: at no fixed time.
            return self._gathered[0] != self._num_updates
        return self._gathered != self.values

    def mark_stale(self) -> None:
        """The master shards have new values; on every rank alike."""
        self._num_updates += 1

    def forget_gathered(self) -> None:
        """The whole copy may have other values than the master shards; on every rank alike."""
        self._gathered = None

    def note_computation(self) -> None:
        """A forward reads the values of now."""
        if self._computed_with not in (None, self.values) and not self.is_transient:
            for param in self.params:  # so that torch refuses a backward of earlier forwards
                increment_version(param.full)
        self._computed_with = self.values

    def check_unchanged(self) -> None:
        """Raise StateError in a backward whose last forward read other values than there are now."""
        self.check_values(self._computed_with)

    def check_values(self, values: tuple[int, int] | None) -> None:
        """Raise StateError if `values` are no longer those of now."""
        if values != self.values:
            raise StateError(
                f"Parameters of {self.plan.name!r} were changed, by an optimizer or in place, between this backward "
                "and its forward, so its gradients would be those of neither. Run the forward again after a change. "
                f"These change together: {', '.join(spec.fqn for spec in self.plan.params[:4])}"
                f"{', ...' if len(self.plan.params) > 4 else ''}."
            )

    @property
    def is_transient(self) -> bool:
        """Whether resharding frees memory, so that a later use gathers again."""
        return self.row.parameters is Placement.SHARD

    def _move(self, target: ParamState) -> None:
        if target not in MOVES[self.state]:
            raise StateError(
                f"Bucket {self.plan.name!r} is {self.state.name} and cannot become {target.name}; from there it can "
                f"only become {', '.join(sorted(each.name for each in MOVES[self.state]))}. This is a fault in zcore: "
                "please report it with the model."
            )
        self.state = target

    def write(self, index: int, value: Tensor, *, where: Tensor | None = None) -> None:
        """Keep this rank's fragment of parameter `index` from its whole value, of any dtype and device.

        With `where` (bool, of the parameter's shape) only the elements it marks.
        """
        part = self.params[index].fragment
        with torch.no_grad():
            held = self.memory.master[part.offset : part.offset + part.numel]
            new = value.detach().reshape(-1)[part.start : part.stop].to(held.device)
            if where is None:
                held.copy_(new)
            else:
                marked = where.reshape(-1)[part.start : part.stop]
                held[marked] = new[marked].to(held.dtype)

    def broadcast(self, index: int, *, src: int) -> None:
        """Send the whole parameter `index` of data-parallel rank `src` to all; the bucket must be AVAILABLE."""
        full = self.params[index].full.detach().view(-1)
        self._groups.broadcast(full, src=src, label=f"edited {self.plan.params[index].fqn}")

    def gather_master(self) -> Tensor:
        """The whole bucket in the master dtype, in memory of its own; every rank calls it."""
        if self.memory.master.numel() == self.plan.layout.numel:
            return self.memory.master.clone()
        whole = torch.empty(self.plan.layout.numel, dtype=self.memory.master.dtype, device=self.memory.master.device)
        self._groups.gather.all_gather(whole, self.memory.master, label=f"{self.plan.name} (whole)").wait()
        return whole

    def seal(self) -> None:
        """UNINITIALIZED -> SHARDED: every fragment is written; register them."""
        self._move(ParamState.SHARDED)
        for param in self.params:
            param.register(param.shard)

    def gather(self) -> None:
        """SHARDED -> INFLIGHT, or straight to AVAILABLE where the gathered copy is still current."""
        if self.state is ParamState.SHARDED and not self.is_stale:
            self._make_available()
            return
        self._move(ParamState.INFLIGHT)
        with torch.no_grad():
            self._pending = self.memory.start_gather()
        # As of the start: a step while the gather is in flight makes it stale before it arrives.
        self._gathered = self.values

    def wait(self) -> None:
        """INFLIGHT -> AVAILABLE."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
        if not self.is_transient and self._gathered is not None:
            self._gathered = self._gathered[0], self.memory.master._version
        self._make_available()

    def _make_available(self) -> None:
        self._move(ParamState.AVAILABLE)
        self._versions = [param.full._version for param in self.params]

    def check_unedited(self) -> None:
        """Raise StateError if a parameter that is shown was edited in place: released, the edit would be lost."""
        for index in self._shown:
            param = self.params[index]
            if param.full._version != self._versions[index]:
                raise lost_edit(param.shard.fqn)

    def show_whole(self, which: Iterable[int] | None = None) -> None:
        """Register whole parameters: those at the positions `which`, or all. The bucket must be AVAILABLE."""
        if len(self._shown) == len(self.params):
            return
        for index in range(len(self.params)) if which is None else which:
            if index not in self._shown:
                self._shown.add(index)
                self.params[index].register(self._ready(index))

    def show_fragments(self) -> None:
        """Register the fragments again, whatever memory lives."""
        for index in self._shown:
            self.params[index].register(self.params[index].shard)
        self._shown.clear()

    def _ready(self, index: int) -> nn.Parameter:
        """The whole parameter, if the fragment is still its own; it follows what the user froze between steps."""
        param = self.params[index]
        param.check_registered()
        trains = param.is_trainable
        if trains and self.gradients is None:
            raise StateError(
                f"{param.shard.fqn} was frozen when the model was sharded and is to be trained now, but its bucket "
                "has no gradients. Set requires_grad before sharding; freezing later is fine."
            )
        if trains != param.full.requires_grad:
            param.full.requires_grad_(trains)
        return param.full

    def reshard(self) -> None:
        """AVAILABLE -> SHARDED."""
        self._move(ParamState.SHARDED)
        if self.memory.release():
            self._gathered = None
        self.show_fragments()

    def deliver(self, used: list[bool]) -> None:
        """Give every fragment its gradient; None to one that no rank used, as plain torch would."""
        for index, (param, is_used) in enumerate(zip(self.params, used, strict=True)):
            self._given[index] = param.set_gradient(self._reduced_part(index) if is_used else None)
            self._grad_states[index] = GradState.DELIVERED if is_used else GradState.NONE

    def announce(self, used: list[bool]) -> None:
        """Parameters that were used have gradients that a later backward will reduce and deliver.

        What was delivered before is part of them by now.
        """
        for index, (param, is_used) in enumerate(zip(self.params, used, strict=True)):
            if is_used:
                param.announce_gradient()
                self._grad_states[index] = GradState.ANNOUNCED

    @property
    def waits_for_reduction(self) -> bool:
        """Whether gradients were announced and not delivered yet."""
        return GradState.ANNOUNCED in self._grad_states

    @property
    def with_gradient(self) -> list[int]:
        """The parameters that got a gradient since the last `clear_gradients`."""
        return [index for index, state in enumerate(self._grad_states) if state is not GradState.NONE]

    @property
    def dropped(self) -> list[int]:
        """Those of them whose `.grad` is None by now, as `zero_grad` leaves it."""
        return [index for index in self.with_gradient if not self.params[index].has_gradient]

    def assigned(self) -> list[tuple[int, Tensor]]:
        """The gradients that the user has put in place of what was there, by parameter.

        Raises StateError where what was there is not reduced yet; assigned zeros drop it.
        """
        found: list[tuple[int, Tensor]] = []
        for index, (param, state) in enumerate(zip(self.params, self._grad_states, strict=True)):
            grad = param.gradient
            if grad is None or grad is self._given[index] or isinstance(grad, UnreducedGradient):
                continue
            if self.gradients is None:
                continue
            if state is not GradState.ANNOUNCED:
                found.append((index, grad))
            elif grad.any():
                raise StateError(
                    f"The gradient of {param.shard.fqn} was assigned before it was reduced: the last backward ran "
                    "inside no_sync(), or is not the last one of its step. Change gradients after a backward "
                    "outside no_sync()."
                )
            else:
                self.drop(index)
        return found

    def assign(self, index: int, grad: Tensor) -> None:
        """Make `grad` the reduced gradient of a parameter. It must not lie in memory of gradients."""
        own = self._reduced_part(index)
        own.copy_(grad)
        self._given[index] = self.params[index].set_gradient(own)
        self._grad_states[index] = GradState.DELIVERED

    def lies_in_gradients(self, tensor: Tensor) -> bool:
        """Whether `tensor` shares memory with reduced gradients of this bucket."""
        reduced = self.gradients.reduced if self.gradients is not None else None
        return reduced is not None and compat.storage_key(reduced) == compat.storage_key(tensor)

    def drop(self, index: int) -> None:
        """The gradient of a parameter is zero again."""
        if self.gradients is not None:
            self.gradients.drop(index)
        self._given[index] = self.params[index].set_gradient(None)
        self._grad_states[index] = GradState.NONE

    def clear_gradients(self) -> None:
        """Forget the gradients of fragments and buffers."""
        for param in self.params:
            param.set_gradient(None)
        self._grad_states = [GradState.NONE] * len(self.params)
        self._given = [None] * len(self.params)
        if self.gradients is not None:
            self.gradients.clear()

    def _reduced_part(self, index: int) -> Tensor:
        """Where the reduced gradient of a parameter lies, a view."""
        assert self.gradients is not None
        part = self.params[index].fragment
        return self.gradients.live_reduced()[part.offset : part.offset + part.numel]

    def read_in_backward(self) -> None:
        """Autograd is about to read the gathered memory."""
        host = self.host() if self.host is not None else None
        if host is None:
            raise StateError(f"The model of {self.plan.name!r} is gone; keep it, or its engine, until the backward.")
        host.read_in_backward(self)

    # What a fragment asks of its bucket (see ParameterOwner).

    def stands_for_whole(self) -> bool:
        """See ParameterOwner."""
        return self.is_pinned

    def keeps_edits(self) -> bool:
        """See ParameterOwner."""
        return self.is_pinned or not self.is_transient

    def may_gather(self) -> bool:
        """See ParameterOwner."""
        return self._running_host is not None

    def whole(self, index: int) -> Tensor:
        """See ParameterOwner."""
        return self._ready(index)

    def lend(self, index: int) -> Tensor:
        """See ParameterOwner. A copy, where autograd might keep a view of memory that is freed."""
        host = self._running_host
        may_be_saved = host is None or host.borrow(self)
        whole = self._ready(index)
        return whole if may_be_saved or not self.is_transient else whole.clone()

    def take_back(self) -> None:
        """See ParameterOwner."""
        if (host := self._running_host) is not None:
            host.end_borrow(self)

    def keep_for(self, result: object) -> None:
        """See ParameterOwner."""
        if (host := self._running_host) is not None:
            host.keep_for(self, result)

    @property
    def _running_host(self) -> BucketHost | None:
        host = self.host() if self.host is not None else None
        return host if host is not None and host.is_running else None


def _move_hooks(original: nn.Parameter, full: nn.Parameter, fqn: str) -> None:
    """Hooks on the gradient act on the whole gradient of this rank, before it is reduced."""
    if getattr(original, "_post_accumulate_grad_hooks", None):
        raise StateError(
            f"{fqn} has a hook that waits for its .grad, as an optimizer step inside the backward does. A sharded "
            "gradient is there after the backward: remove the hook, and step the optimizer as usual."
        )
    for hook in (original._backward_hooks or {}).values():
        full.register_hook(hook)
