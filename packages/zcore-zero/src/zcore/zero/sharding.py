"""Shard a model: plan, agree, allocate, fill, register, hook. The one place where all parts are put together."""

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from zcore.core.errors import LayoutError, StateError
from zcore.core.mesh import DataParallel, data_parallel, inner_group, twin_group
from zcore.core.torch_collectives import choose_collectives
from zcore.zero import clipping
from zcore.zero.accumulation import Accumulation
from zcore.zero.agreement import Plain, check_agreement
from zcore.zero.bucket import Bucket
from zcore.zero.buffer import DataParallelGroups, Ledger
from zcore.zero.deferred import TAG, recording_of
from zcore.zero.external import external_fragments
from zcore.zero.gathering import Gatherer, GatherLimits
from zcore.zero.guards import Newcomers, note_step, refuse_load, refuse_state_dict, refuse_step, retire
from zcore.zero.hooks import Conductor, Site
from zcore.zero.layout import BucketPlan, plan_buckets
from zcore.zero.placement import Placement, Row, row_for
from zcore.zero.precision import Precision
from zcore.zero.quantised import refuse_quantised, statistics_of
from zcore.zero.reduction import Reducer
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.timeline import Recorder
from zcore.zero.units import ParamSites, find_blocks, find_parameters, find_units

__all__ = ["Sharding", "ShardingOptions", "find_shardable", "sharding_of"]

logger = logging.getLogger(__name__)

HANDLE = "_zcore_sharding"  # attribute of the root module


@dataclass(frozen=True, slots=True)
class ShardingOptions:
    """How a model is cut and moved. Sizes are in elements; see `ZeroOptimization` for what each means."""

    precision: Precision = field(default_factory=Precision)
    bucket_numel: int = 500_000_000
    small_numel: int = 8_192
    small_total_numel: int | None = None
    prefetch_numel: int | None = None  # None: as much as the largest bucket
    max_live_numel: int = 1_000_000_000
    max_reuse_numel: int = 1_000_000_000
    overlap: bool = True
    secondary_size: int = 1  # hpZ: consecutive ranks over which a second copy of parameters is sharded; 1: none


class Sharding:
    """A sharded model's states: buckets, their traffic, and what an engine or a hand-written loop may ask of them."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, *, zero_stage: int, options: ShardingOptions) -> None:
        self.dp: DataParallel = data_parallel(mesh)
        self.zero_stage = zero_stage
        self.row: Row = row_for(zero_stage, shard_size=self.dp.shard_size)
        self.device = torch.device(mesh.device_type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Reductions have a process group of their own: neither they nor gathers wait for the other.
        self._twin: dist.ProcessGroup | None = twin_group(mesh, self.dp.shard_axis)
        self._inner: dist.ProcessGroup | None = None
        if self.row.parameters is Placement.SHARD and 1 < options.secondary_size < self.dp.shard_size:
            self._inner = inner_group(mesh, self.dp.shard_axis, size=options.secondary_size)
        self.groups = _groups_of(mesh, self.dp, self._twin, self._inner)
        self.ledger = Ledger()
        self.buckets: tuple[Bucket, ...] = ()
        self._model = weakref.ref(model)
        self._options = options
        self._accumulation = Accumulation()
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose parameters and buffers were seen to
        self._newcomers = Newcomers()
        self._state_dict_hooks: list[RemovableHandle] = []
        parameters = find_shardable(model)
        self._take_in(model, parameters, self._plan(model, parameters), model.modules())
        self._hooks = (
            register_optimizer_step_pre_hook(refuse_step),
            register_optimizer_step_post_hook(note_step),
            model.register_forward_pre_hook(torch.compiler.disable(self._newcomers), prepend=True),
        )
        for hook in self._hooks:
            weakref.finalize(self, hook.remove)
        model.__dict__[HANDLE] = self

    def _plan(self, model: nn.Module, parameters: tuple[ParamSites, ...]) -> tuple[BucketPlan, ...]:
        """How `parameters` are cut. Raises MismatchError where ranks differ; nothing is changed yet."""
        options = self._options
        for each in parameters:
            refuse_quantised(each.param, each.spec.fqn, options.precision)
        plans = plan_buckets(
            find_units(model, parameters),
            num_slices=self.dp.size,
            bucket_numel=options.bucket_numel,
            # In every row: the cut, and with it each bit, must not depend on the stage.
            small_numel=options.small_numel,
            small_total_numel=options.small_total_numel,
        )
        if self.buckets:
            taken = {bucket.plan.name for bucket in self.buckets}
            plans = tuple(replace(plan, name=_unlike(plan.name, taken)) for plan in plans)
        self._agree(model, parameters, plans, options)
        return plans

    def _take_in(
        self,
        model: nn.Module,
        parameters: tuple[ParamSites, ...],
        plans: tuple[BucketPlan, ...],
        modules: Iterable[nn.Module],
    ) -> None:
        """Shard `parameters` and `modules` of `model` beside what is sharded: allocate, fill, hook."""
        options, new = self._options, list(modules)
        by_name = {each.spec.fqn: each for each in parameters}
        added = tuple(
            self._make_bucket(index, plan, by_name, options.precision)
            for index, plan in enumerate(plans, start=len(self.buckets))
        )
        self._fill(model, added, by_name, new)
        self.buckets += added
        self.gatherer = Gatherer(self.buckets, _limits(self.buckets, options))
        self.reducer = Reducer(
            self.buckets,
            dp=self.dp,
            groups=self.groups,
            device=self.device,
            accumulation=self._accumulation,
            max_inflight=1 if options.overlap else 0,
            take_digest=self.gatherer.take_digest,
        )
        self.conductor = Conductor(
            self.buckets, gatherer=self.gatherer, reducer=self.reducer, precision=options.precision
        )
        self.conductor.attach(model, _find_sites(model, self.buckets))
        self._state_dict_hooks += [
            hook
            for module in new
            for hook in (
                module.register_state_dict_pre_hook(refuse_state_dict),
                module.register_load_state_dict_pre_hook(refuse_load),
            )
        ]
        self._modules.update(new)
        self._newcomers.sharded |= by_name.keys()

    def add(self) -> list[ShardedParameter]:
        """See `shard_added`."""
        model = self._model()
        assert model is not None
        self.conductor.recover()
        self.reducer.take_users_view()
        if self.conductor.is_running or any(bucket.is_pinned for bucket in self.buckets) or self.reducer.has_gradients:
            raise StateError(
                "Modules are sharded between optimizer steps: not inside a forward, a backward or GatheredParameters, "
                "and not while there are gradients. Call it after `step()`, or `zero_grad()` in a loop of your own."
            )
        names = set(Newcomers.names(model))
        parameters = tuple(each for each in find_parameters(model) if each.spec.fqn in names)
        if replaced := sorted(names & self.fragments.keys()):
            raise LayoutError(
                f"{replaced[0]} was replaced after the model was sharded, and a parameter of that name is sharded "
                "already. Give what is new another name, or replace it before sharding; to change the values of what "
                "there is use `zero.GatheredParameters`."
            )
        plans, before, recorder = self._plan(model, parameters), len(self.buckets), self.conductor.recorder
        self.note_update()  # graphs of earlier forwards lead to hooks that are gone: their backwards are refused
        self.gatherer.keep_for_inference(False)
        self.gatherer.rest()
        self.conductor.detach()
        self._take_in(model, parameters, plans, [each for each in model.modules() if each not in self._modules])
        self.explain_to(recorder)
        return [param.shard for bucket in self.buckets[before:] for param in bucket.params]

    def _agree(
        self,
        model: nn.Module,
        parameters: tuple[ParamSites, ...],
        plans: tuple[BucketPlan, ...],
        options: ShardingOptions,
    ) -> None:
        facts: dict[str, Plain] = {
            "ZeRO stage": self.zero_stage,
            "torch": torch.__version__,
            "parameter": {
                spec.fqn: f"{list(spec.shape)} {spec.dtype} {'trainable' if spec.trainable else 'frozen'}"
                for plan in plans
                for spec in plan.params
            },
            "statistics of quantised blocks": {
                each.spec.fqn: told for each in parameters if (told := statistics_of(each.param)) is not None
            },
            "buffer": {name: f"{list(buffer.shape)} {buffer.dtype}" for name, buffer in model.named_buffers()},
            "bucket": {plan.name: [spec.fqn for spec in plan.params] for plan in plans},
            "options": {each.name: repr(getattr(options, each.name)) for each in fields(options)},
        }
        check_agreement(facts, rank=self.dp.rank, num_ranks=self.dp.size, groups=self.groups, device=self.device)

    def _make_bucket(
        self, index: int, plan: BucketPlan, by_name: dict[str, ParamSites], precision: Precision
    ) -> Bucket:
        return Bucket(
            plan,
            self.row.kept_whole() if plan.keep_whole else self.row,
            index=index,
            members=tuple(by_name[spec.fqn] for spec in plan.params),
            dp=self.dp,
            dtypes=precision.dtypes_of(plan.dtype, trainable=plan.trainable),
            groups=self.groups,
            device=self.device,
            ledger=self.ledger,
        )

    def _fill(
        self,
        model: nn.Module,
        buckets: tuple[Bucket, ...],
        by_name: dict[str, ParamSites],
        modules: Sequence[nn.Module],
    ) -> None:
        """Write every fragment with the values of data rank 0, then let the originals go, bucket after bucket."""
        # One piece of memory for all of them: glibc would keep what each of them lets go.
        largest = max((bucket.plan.layout.numel * bucket.plan.dtype.itemsize for bucket in buckets), default=0)
        memory = torch.empty(largest, dtype=torch.uint8, device=self.device)
        for bucket in buckets:
            whole = memory.view(bucket.plan.dtype)[: bucket.plan.layout.numel].zero_()
            parts = [
                whole[offset : offset + spec.numel]
                for offset, spec in zip(bucket.plan.layout.offsets, bucket.plan.params, strict=True)
            ]
            for spec, part in zip(bucket.plan.params, parts, strict=True):
                param = by_name[spec.fqn].param
                recording = recording_of(model, param, spec.fqn) if param.is_meta else None
                if self.dp.rank == 0:
                    value = recording.materialize(param) if recording is not None else param.detach()
                    part.copy_(value.reshape(-1))
            self.groups.broadcast(whole, src=0, label=f"start values of {bucket.plan.name}")
            for index, part in enumerate(parts):
                bucket.write(index, part)
            bucket.seal()
        for each in by_name.values():
            retire(each.param, each.spec.fqn)
        names = {module: name for name, module in model.named_modules()}
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._start_buffer(model, buffer, f"{names[module]}.{name}")
            module.__dict__.pop(TAG, None)

    def _start_buffer(self, model: nn.Module, buffer: Tensor, name: str) -> Tensor:
        """`buffer` on the device, with the value of data rank 0."""
        value = recording_of(model, buffer, name).materialize(buffer) if buffer.is_meta else buffer
        value = value.to(self.device)
        sent = value.contiguous()
        if sent.numel():
            self.groups.broadcast(sent.view(-1).view(torch.uint8), src=0, label=f"start value of {name}")
        return value if torch.equal(value, sent) else sent

    @property
    def fragments(self) -> dict[str, ShardedParameter]:
        """Every parameter's fragment by fully qualified name, in order of the plan."""
        return {param.shard.fqn: param.shard for bucket in self.buckets for param in bucket.params}

    @property
    def masters(self) -> dict[str, Tensor]:
        """The values of the fragments as plain tensors, views of the master shards, by fully qualified name."""
        return {
            param.shard.fqn: bucket.memory.master[part.offset : part.offset + part.numel]
            for bucket in self.buckets
            for param in bucket.params
            for part in (param.fragment,)
        }

    @property
    def has_masters(self) -> bool:
        """Whether an optimizer steps parameters in a precision that keeps small steps."""
        return not any(bucket.dtypes.rounds for bucket in self.buckets)

    @property
    def num_params(self) -> int:
        """Elements of all parameters."""
        return sum(spec.numel for bucket in self.buckets for spec in bucket.plan.params)

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Compute the gradients of `loss`. Raises StateError if no parameter got one."""
        self.conductor.has_gradients, self.conductor.is_training = False, True
        try:
            loss.backward(retain_graph=retain_graph)
        finally:
            self.conductor.is_training = False
        if not self.conductor.has_gradients:
            raise StateError(
                "No trainable parameter of the model got a gradient from this loss: it was computed from something "
                "else. Compute it from what `engine(...)` returns, without detach(), and check what is frozen."
            )

    def explain_to(self, recorder: Recorder | None) -> None:
        """Tell `recorder` of every transfer and phase from now on, or nobody any more."""
        for part in (self.gatherer, self.reducer, self.conductor):
            part.recorder = recorder

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside keep their gradients on this rank, whole; the next one outside reduces all of them."""
        accumulation = self.reducer.accumulation
        before, accumulation.is_held_back = accumulation.is_held_back, True
        try:
            yield
        finally:
            accumulation.is_held_back = before

    def abandon(self) -> None:
        """Forget a backward that did not finish, with all gradients of this step."""
        self.conductor.abandon()

    def note_update(self) -> None:
        """The fragments have new values from elsewhere than an optimizer: gathered copies are out of date."""
        for bucket in self.buckets:
            bucket.mark_stale()

    def norm(self) -> float:
        """The global 2-norm of the reduced gradients; every rank calls it.

        Raises StateError if the last backward did not reduce them.
        """
        self.conductor.recover()
        self.reducer.take_users_view()
        if self.reducer.waits_for_reduction:
            raise StateError(
                "The gradients were not reduced yet: the last backward ran inside no_sync(), or is not the last one of "
                "its step. Clip after a backward outside no_sync()."
            )
        return clipping.global_norm(self.buckets, dp=self.dp, groups=self.groups, device=self.device)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients so that their global norm is at most `max_norm`; the norm before, on every rank."""
        norm = self.norm()
        self.scale_gradients(clipping.clip_factor(norm, max_norm))
        return norm

    def scale_gradients(self, factor: float) -> None:
        """Multiply every reduced gradient by `factor`."""
        clipping.scale_gradients(self.buckets, factor)

    def close(self) -> None:
        """Remove all hooks and leave the process group of the reductions; what is registered stays registered."""
        self.conductor.detach()
        for group in (self._twin, self._inner):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
        self._twin = self._inner = None
        for hook in (*self._hooks, *self._state_dict_hooks):
            hook.remove()
        model = self._model()
        if model is not None:
            model.__dict__.pop(HANDLE, None)


def sharding_of(model: nn.Module) -> Sharding:
    """The sharding of a model that `shard` or `initialize` got. Raises StateError for another."""
    found = model.__dict__.get(HANDLE)
    if not isinstance(found, Sharding):
        raise StateError(
            f"This {type(model).__name__} is not sharded. Pass the model that was given to `zero.shard` or "
            "`zero.initialize` itself, not a submodule or a wrapper of it."
        )
    return found


def _groups_of(
    mesh: DeviceMesh, dp: DataParallel, twin: dist.ProcessGroup, inner: dist.ProcessGroup | None
) -> DataParallelGroups:
    shard_group = mesh.get_group(dp.shard_axis)
    replicate = None
    if dp.replicate_axis is not None and dp.replicate_size > 1:
        replicate = choose_collectives(mesh.get_group(dp.replicate_axis), name=dp.replicate_axis)
    return DataParallelGroups(
        gather=choose_collectives(shard_group, name=f"{dp.shard_axis} gather"),
        reduce=choose_collectives(twin, name=f"{dp.shard_axis} reduce"),
        replicate=replicate,
        inner=None if inner is None else choose_collectives(inner, name=f"{dp.shard_axis} inner"),
    )


def _limits(buckets: tuple[Bucket, ...], options: ShardingOptions) -> GatherLimits:
    prefetch_numel = options.prefetch_numel
    if prefetch_numel is None:
        prefetch_numel = max((bucket.plan.layout.numel for bucket in buckets if bucket.is_transient), default=0)
    limits = GatherLimits(prefetch_numel, options.max_live_numel, options.max_reuse_numel)
    return limits if options.overlap else replace(limits, prefetch_numel=0)


def find_shardable(model: nn.Module) -> tuple[ParamSites, ...]:
    """Every parameter of `model` with its places. Raises LayoutError for one that cannot be sharded, or is already."""
    parameters = find_parameters(model)
    taken = [each.spec.fqn for each in parameters if isinstance(each.param, ShardedParameter)]
    if taken:
        raise LayoutError(
            f"{len(taken)} parameters are sharded already, among them {taken[0]}. Shard a model once, as a whole: pass "
            "the outermost module and none of its parts. After an `initialize` that raised, build the model anew."
        )
    return parameters


def _unlike(name: str, taken: set[str]) -> str:
    """A name that is not taken, and then is."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name} (part {number})", number + 1
    taken.add(found)
    return found


def _find_sites(model: nn.Module, buckets: tuple[Bucket, ...]) -> list[tuple[nn.Module, Site]]:
    """Modules that own parameters, and blocks: a block has its buckets gathered once, before it starts.

    And those of its modules that are kept whole are waited for there.
    """
    used: dict[nn.Module, set[int]] = {}
    owned: dict[nn.Module, dict[int, list[int]]] = {}  # positions by bucket
    for bucket in buckets:
        for position, param in enumerate(bucket.params):
            for module_ref, _ in param.sites:
                module = module_ref()
                assert module is not None
                used.setdefault(module, set()).add(bucket.index)
                owned.setdefault(module, {}).setdefault(bucket.index, []).append(position)
    by_name = {param.shard.fqn: param.shard for bucket in buckets for param in bucket.params}
    for module in model.modules():
        for fragment in external_fragments(module, by_name):
            assert isinstance(fragment.owner, Bucket)
            used.setdefault(module, set()).add(fragment.owner.index)
            owned.setdefault(module, {}).setdefault(fragment.owner.index, []).append(fragment.position)
    blocks = find_blocks(model)
    num_blocks = Counter(part for block in blocks.values() for part in block.modules())
    served: set[nn.Module] = set()
    for name, block in blocks.items():
        whole = {bucket.index for bucket in buckets if bucket.plan.unit == name}
        parts = [part for part in block.modules() if part in used and part is not block]
        resting = {index for part in parts for index in used[part] if not buckets[index].is_transient}
        # Nobody calls a ModuleDict. Of others even what rests is shown: adapters look at each other's dtypes.
        if (whole or resting) and getattr(block.forward, "__func__", None) is not nn.Module.forward:
            used.setdefault(block, set()).update(whole | resting)
            served.update(part for part in parts if num_blocks[part] == 1 and used[part] <= used[block])

    def below(module: nn.Module, index: int) -> tuple[int, ...]:
        return tuple(each for part in module.modules() for each in owned.get(part, {}).get(index, ()))

    def site(module: nn.Module) -> Site:
        parts = tuple((buckets[index], below(module, index)) for index in sorted(used[module]))
        return Site(names[module], parts, is_served=module in served)

    names = {module: name for name, module in model.named_modules()}
    return [(module, site(module)) for module in used]
