"""One bucket: its parameters, the state they are in, and which tensors are registered on the modules.

    UNINITIALIZED -> SHARDED <-> AVAILABLE
                        |            ^
                        `- INFLIGHT -'

Fragments are registered, but for modules that run: they see the whole parameters of an AVAILABLE bucket.
A bucket makes the moves it is asked for; when to make them is the business of `gathering.py` and `reduction.py`.
"""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum, auto
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from zcore.core import compat
from zcore.core.collectives import Pending
from zcore.core.errors import StateError
from zcore.core.mesh import DataParallel
from zcore.zero.bucket_param import BucketParam, as_plain_tensors
from zcore.zero.buffer import BucketDtypes, BucketGradients, BucketParameters, DataParallelGroups, Ledger
from zcore.zero.fragment_gradients import FragmentGradients
from zcore.zero.layout import BucketPlan
from zcore.zero.parts import Parts
from zcore.zero.placement import Placement, Row, owned_slices
from zcore.zero.units import ParamSites

__all__ = ["MOVES", "Bucket", "BucketHost", "ParamState"]


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

    def graph(self) -> object:
        """What stands for the graph of the forward under way, held by what its nodes hold."""
        ...

    def read_in_backward(self, bucket: "Bucket") -> None:
        """Make the bucket AVAILABLE for an operation of the backward that runs."""
        ...


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
        self.is_transient = row.parameters is Placement.SHARD  # resharding frees memory, and a later use gathers again
        self.dtypes = dtypes
        self.owned = owned_slices(row, dp)
        self.state = ParamState.UNINITIALIZED
        self.is_pinned = False  # inside GatheredParameters, where the fragments stand for the whole
        self.needs_rounding = dtypes.rounds  # so that no optimizer may step it; False while it is in fp32
        self._shown: set[int] = set()  # parameters of which the whole is registered on the modules
        self._num_updates = 0  # announced ones; edits in place show in the master's version
        self._gathered: tuple[int, int] | None = None  # of which values there is a whole copy
        self._secondary: tuple[int, int] | None = None  # of which values hpZ's copy is
        self._computed_with: tuple[int, int] | None = None  # the values that the last forward with autograd read
        self._recomputed_with: tuple[int, int] | None = None  # those that were read inside a backward, computed again
        self._versions: list[int] = []  # of the whole parameters, when they became AVAILABLE
        self.host: weakref.ref[BucketHost] | None = None  # weak, like every edge back up: `del model` frees the memory
        self.memory = BucketParameters(
            plan,
            row,
            dp=dp,
            dtypes=dtypes,
            collectives=groups.gather,
            inner=groups.inner,
            device=device,
            ledger=ledger,
        )
        self.gradients: BucketGradients | None = None
        if plan.trainable:
            self.gradients = BucketGradients(
                plan, row, dp=dp, dtypes=dtypes, groups=groups, device=device, ledger=ledger
            )
        self._groups = groups
        self._dp = dp
        self._parts: dict[int, Parts] = {}
        self._pending: Pending | None = None
        self.params = tuple(self._make_param(index, each) for index, each in enumerate(members))
        self.grads = FragmentGradients(self.params, self.gradients) if self.gradients is not None else None

    def _make_param(self, index: int, member: ParamSites) -> BucketParam:
        fragment = self.plan.layout.fragment(index, self.owned)
        held = self.memory.master[fragment.offset : fragment.offset + fragment.numel]
        return BucketParam.of(member, owner=self, index=index, full=self.memory.views[index], held=held, place=fragment)

    def parts(self, index: int) -> Parts:
        """Where the parts of parameter `index` lie over the ranks; asked for in every step, and never another."""
        if index not in self._parts:
            self._parts[index] = self._find_parts(index)
        return self._parts[index]

    def _find_parts(self, index: int) -> Parts:
        layout, dp = self.plan.layout, self._dp
        held = [
            layout.fragment(index, owned_slices(self.row, replace(dp, shard_rank=rank)))
            for rank in range(dp.shard_size)
        ]
        own, mine = held[dp.shard_rank], dp.shard_rank * dp.replicate_size + dp.replicate_rank
        counted = layout.fragment(index, range(mine, mine + 1))
        start = max(counted.start - own.start, 0)
        return Parts(
            self.plan.params[index].shape,
            tuple(range(each.start, each.stop) for each in held),
            slice(start, start + counted.numel),
            self._groups,
        )

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
        """The whole copy may have other values than the master shards; on every rank alike.

        What has read values that are dropped with it finds them modified in its backward.
        """
        self._gathered = None
        for param, version in zip(self.params, self._versions, strict=True):
            if param.full._version != version:
                increment_version(param.full)

    def note_computation(self) -> None:
        """A forward reads the values of now."""
        if self._computed_with not in (None, self.values) and not self.is_transient:
            for param in self.params:  # so that torch refuses a backward of earlier forwards
                increment_version(param.full)
            self._note_versions()
        self._computed_with = self.values

    def note_recomputation(self) -> None:
        """Inside a backward a part of the forward is computed again, and reads the values of now."""
        self._recomputed_with = self.values

    def check_unchanged(self, *, is_nested: bool) -> None:
        """Raise StateError in a backward whose last forward read other values than there are now.

        In a nested backward, as of a reentrant checkpoint, which ran without autograd first, it may be that what was
        computed again has read them.
        """
        if not (is_nested and self._recomputed_with == self.values):
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
    def is_shown(self) -> bool:
        """Whether modules see all its parameters whole."""
        return len(self._shown) == len(self.params)

    @property
    def is_in_place(self) -> bool:
        """Whether it is whole and shown, and known to be computed with: a module that starts has nothing to ask for."""
        computed_with = self._computed_with
        return (
            computed_with is not None
            and self.state is ParamState.AVAILABLE
            and computed_with[1] == self.memory.master._version
            and computed_with[0] == self._num_updates
            and len(self._shown) == len(self.params)
        )

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
            self._pending = self.memory.start_gather(from_secondary=self._secondary == self.values)
        # As of the start: a step while the gather is in flight makes it stale before it arrives.
        self._gathered = self.values

    @property
    def is_on_its_way(self) -> bool:
        """Whether a gather communicates, and nobody has waited for it."""
        return self._pending is not None

    def wait(self) -> None:
        """INFLIGHT -> AVAILABLE."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
        if not self.is_transient and self._gathered is not None:
            self._gathered = self._gathered[0], self.memory.master._version
        if self.memory.secondary is not None and self._secondary != self._gathered:
            self.memory.keep_secondary()
            self._secondary = self._gathered
        self._make_available()

    def _make_available(self) -> None:
        self._move(ParamState.AVAILABLE)
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [param.full._version for param in self.params]

    @property
    def loses_edits(self) -> bool:
        """Whether what is edited in place, whole, is freed, or written anew from a master in another dtype."""
        return self.is_transient or self.memory.casts

    def find_edited(self) -> str | None:
        """The name of a parameter that is shown and was edited in place since it was gathered."""
        for index in self._shown:
            param = self.params[index]
            if param.full._version != self._versions[index]:
                return param.shard.fqn
        return None

    def show_whole(self, which: Iterable[int] | None = None) -> None:
        """Register whole parameters: those at the positions `which`, or all. The bucket must be AVAILABLE."""
        if len(self._shown) == len(self.params):
            return
        memory = compat.storage_key(self.memory.gathered)
        with as_plain_tensors():
            for index in range(len(self.params)) if which is None else which:
                if index not in self._shown:
                    self._shown.add(index)
                    self.params[index].register(self._ready(index, memory))

    def show_fragments(self) -> None:
        """Register the fragments again, whatever memory lives."""
        for index in self._shown:
            self.params[index].register(self.params[index].shard)
        self._shown.clear()

    def _ready(self, index: int, memory: int) -> nn.Parameter:
        """The whole parameter, if the fragment is still its own; it follows what the user froze between steps.

        Inside of `as_plain_tensors`. `memory` is what identifies that of `gathered`.
        """
        param = self.params[index]
        param.check_registered()
        if compat.storage_key(param.full) != memory:
            if not param.full.is_floating_point():
                raise StateError(
                    f"{param.shard.fqn}, which is quantised, was given other memory by its layer, as bitsandbytes does "
                    "on the CPU where it does not train. Call `model.train()` before the first forward, and leave it "
                    "so for evaluation (set dropout to 0 there)."
                )
            raise StateError(
                f"{param.shard.fqn} was given other memory, as `module.to(dtype)`, `param.data = ...` or resizing do, "
                "and would no longer follow the optimizer. Resize before sharding, and leave parameters in their "
                "dtype: cast inputs and results, or compute under `torch_autocast` in place of `bf16` and `fp16`."
            )
        trains = param.shard.requires_grad
        if trains and self.gradients is None:
            raise StateError(
                f"{param.shard.fqn} was frozen when the model was sharded and is to be trained now, but its bucket "
                "has no gradients. Leave it trainable until the model is sharded, and freeze it then: thawing is fine."
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

    def graph(self) -> object | None:
        """What a node holds that has saved of the gathered memory; None where the model is gone."""
        host = self._live_host
        return host.graph() if host is not None else None

    def read_in_backward(self) -> None:
        """Autograd is about to read the gathered memory."""
        host = self._live_host
        if host is None:
            raise StateError(f"The model of {self.plan.name!r} is gone; keep it, or its engine, until the backward.")
        host.read_in_backward(self)

    # What a fragment asks of its bucket (see ParameterOwner).

    def stands_for_whole(self) -> bool:
        """See ParameterOwner."""
        return self.is_pinned

    def keeps_edits(self) -> bool:
        """See ParameterOwner."""
        return self.is_pinned or not self.loses_edits

    def may_gather(self) -> bool:
        """See ParameterOwner."""
        return self._running_host is not None

    def whole(self, index: int) -> nn.Parameter:
        """See ParameterOwner."""
        with as_plain_tensors():
            return self._ready(index, compat.storage_key(self.memory.gathered))

    def lend(self, index: int) -> Tensor:
        """See ParameterOwner. A copy, where autograd might keep a view of memory that is freed."""
        host = self._running_host
        may_be_saved = host is None or host.borrow(self)
        whole = self.whole(index)
        return whole if may_be_saved or not self.is_transient else whole.clone()

    def take_back(self) -> None:
        """See ParameterOwner."""
        if (host := self._running_host) is not None:
            host.end_borrow(self)

    def follow(self, index: int, *, is_trained: bool) -> None:
        """See ParameterOwner. Thawed at once: autograd skips what is frozen, in the backward of an older forward, too.

        What is frozen is frozen from the next forward on, since autograd would not call for what came before.
        """
        if self.gradients is not None and (is_trained or self.may_gather()):
            self.params[index].full.requires_grad_(is_trained)

    def keep_for(self, result: object) -> None:
        """See ParameterOwner."""
        if (host := self._running_host) is not None:
            host.keep_for(self, result)

    @property
    def _live_host(self) -> BucketHost | None:
        return self.host() if self.host is not None else None

    @property
    def _running_host(self) -> BucketHost | None:
        host = self._live_host
        return host if host is not None and host.is_running else None
