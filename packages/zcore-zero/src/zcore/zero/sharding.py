"""Shard a model: plan, agree, allocate, fill, register, hook. The one place where all parts are put together."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from zcore.core.errors import LayoutError, NonFiniteError, StateError
from zcore.core.mesh import DataParallel, data_parallel, inner_group, twin_group
from zcore.core.torch_collectives import choose_collectives
from zcore.zero import clipping
from zcore.zero.agreement import Plain, check_agreement
from zcore.zero.bucket import Bucket
from zcore.zero.buffer import DataParallelGroups, Ledger
from zcore.zero.deferred import TAG, recording_of
from zcore.zero.gathering import Gatherer, GatherLimits
from zcore.zero.hooks import Conductor, Site
from zcore.zero.layout import BucketPlan, plan_buckets
from zcore.zero.optimizers.building import refuse_matrix_wise
from zcore.zero.placement import Placement, Row, row_for
from zcore.zero.precision import Precision
from zcore.zero.reduction import Reducer
from zcore.zero.sharded_parameter import ShardedParameter, UnreducedGradient
from zcore.zero.timeline import Recorder
from zcore.zero.units import ParamSites, find_blocks, find_parameters, find_units

__all__ = ["Sharding", "ShardingOptions", "clip_grad_norm_", "find_shardable", "no_sync", "shard", "sharding_of"]

logger = logging.getLogger(__name__)

HANDLE = "_zcore_sharding"  # attribute of the root module
RETIRED = "_zcore_retired"  # attribute of a parameter that was replaced: its fully qualified name


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
        parameters = find_shardable(model)
        plans = plan_buckets(
            find_units(model, parameters),
            num_slices=self.dp.size,
            bucket_numel=options.bucket_numel,
            # In every row: the cut, and with it each bit, must not depend on the stage.
            small_numel=options.small_numel,
            small_total_numel=options.small_total_numel,
        )
        self._agree(model, plans, options)
        by_name = {each.spec.fqn: each for each in parameters}
        self.buckets = tuple(
            self._make_bucket(index, plan, by_name, options.precision) for index, plan in enumerate(plans)
        )
        self._fill(model, by_name)
        gatherer = Gatherer(self.buckets, _limits(self.buckets, options))
        self.gatherer = gatherer
        self.reducer = Reducer(
            self.buckets,
            dp=self.dp,
            groups=self.groups,
            device=self.device,
            max_inflight=1 if options.overlap else 0,
            take_digest=gatherer.take_digest,
        )
        self.conductor = Conductor(self.buckets, gatherer=gatherer, reducer=self.reducer, precision=options.precision)
        self.conductor.attach(model, _find_sites(model, self.buckets))
        self._step_hooks = (
            register_optimizer_step_pre_hook(_refuse_step),
            register_optimizer_step_post_hook(_note_step),
        )
        for hook in self._step_hooks:
            weakref.finalize(self, hook.remove)
        self._state_dict_hooks = [
            hook
            for module in model.modules()
            for hook in (
                module.register_state_dict_pre_hook(_refuse_state_dict),
                module.register_load_state_dict_pre_hook(_refuse_load),
            )
        ]
        model.__dict__[HANDLE] = self
        self._model = weakref.ref(model)

    def _agree(self, model: nn.Module, plans: tuple[BucketPlan, ...], options: ShardingOptions) -> None:
        facts: dict[str, Plain] = {
            "ZeRO stage": self.zero_stage,
            "torch": torch.__version__,
            "parameter": {
                spec.fqn: f"{list(spec.shape)} {spec.dtype} {'trainable' if spec.trainable else 'frozen'}"
                for plan in plans
                for spec in plan.params
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

    def _fill(self, model: nn.Module, by_name: dict[str, ParamSites]) -> None:
        """Write every fragment with the values of data rank 0, then let the originals go, bucket after bucket."""
        # One piece of memory for all of them: glibc would keep what each of them lets go.
        largest = max((bucket.plan.layout.numel * bucket.plan.dtype.itemsize for bucket in self.buckets), default=0)
        memory = torch.empty(largest, dtype=torch.uint8, device=self.device)
        for bucket in self.buckets:
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
            _retire(each.param, each.spec.fqn)
        for module_name, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._start_buffer(model, buffer, f"{module_name}.{name}")
        for module in model.modules():
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
        for hook in (*self._step_hooks, *self._state_dict_hooks):
            hook.remove()
        model = self._model()
        if model is not None:
            model.__dict__.pop(HANDLE, None)


def shard(model: nn.Module, mesh: DeviceMesh, *, stage: int = 3, options: ShardingOptions | None = None) -> nn.Module:
    """Shard `model` in place over the data-parallel axes of `mesh` and return it; every rank calls it.

    Its parameters become this rank's fragments, to be passed to any element-wise `torch.optim` class;
    training is torch's usual loop. Gradients are averaged over all data ranks at the end of each backward;
    inside `no_sync(model)` they only accumulate. Clip with `zero.clip_grad_norm_`. `stage` is a row of the
    placement table (see `placement.py`).

    Raises MismatchError where ranks differ, LayoutError for a model that is sharded already, ConfigError for the stage.
    """
    Sharding(model, mesh, zero_stage=stage, options=options or ShardingOptions())
    return model


def sharding_of(model: nn.Module) -> Sharding:
    """The sharding of a model that `shard` or `initialize` got. Raises StateError for another."""
    found = model.__dict__.get(HANDLE)
    if not isinstance(found, Sharding):
        raise StateError(
            f"This {type(model).__name__} is not sharded. Pass the model that was given to `zero.shard` or "
            "`zero.initialize` itself, not a submodule or a wrapper of it."
        )
    return found


def clip_grad_norm_(model: nn.Module, max_norm: float, *, error_if_nonfinite: bool = False) -> float:
    """Scale the gradients of a sharded model to a global 2-norm of at most `max_norm`; every rank calls it.

    Returns the norm before clipping, equal on every rank. With `error_if_nonfinite` it raises NonFiniteError instead,
    on every rank, where that is infinite or not a number.
    """
    norm = sharding_of(model).clip(max_norm)
    if error_if_nonfinite and not isfinite(norm):
        raise NonFiniteError(
            f"The norm of the gradients is {norm}. Do not step: drop them with zero_grad(), and look at the data of "
            "this step, or lower the learning rate."
        )
    return norm


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside only accumulate gradients on this rank; the first one after it reduces all of them."""
    with sharding_of(model).no_sync():
        yield


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


def _find_sites(model: nn.Module, buckets: tuple[Bucket, ...]) -> list[tuple[nn.Module, Site]]:
    """Modules that own parameters, and blocks: a block has its buckets gathered once, before it starts."""
    used: dict[nn.Module, set[int]] = {}
    owned: dict[nn.Module, dict[int, list[int]]] = {}  # positions by bucket
    for bucket in buckets:
        for position, param in enumerate(bucket.params):
            for module_ref, _ in param.sites:
                module = module_ref()
                assert module is not None
                used.setdefault(module, set()).add(bucket.index)
                owned.setdefault(module, {}).setdefault(bucket.index, []).append(position)
    for name, block in find_blocks(model).items():
        whole = {bucket.index for bucket in buckets if bucket.plan.unit == name}
        if whole:
            used.setdefault(block, set()).update(whole)

    def below(module: nn.Module, index: int) -> tuple[int, ...]:
        return tuple(each for part in module.modules() for each in owned.get(part, {}).get(index, ()))

    names = {module: name for name, module in model.named_modules()}
    return [
        (module, Site(names[module], tuple((buckets[index], below(module, index)) for index in sorted(indices))))
        for module, indices in used.items()
    ]


def _refuse_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Before any optimizer's step: it needs reduced gradients, and fragments, and not more of a parameter than that."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not isinstance(param, ShardedParameter) or param.owner is None:
                continue
            refuse_matrix_wise(optimizer)
            if isinstance(param.grad, UnreducedGradient):
                raise StateError(
                    f"{name} steps {param.fqn}, whose gradient is not reduced yet: the last backward ran inside "
                    "no_sync(), or is not the last one of its step. Step after a backward outside no_sync()."
                )
            if param.owner.stands_for_whole():
                raise StateError(
                    f"{name} steps {param.fqn} inside GatheredParameters, where it is whole, and the optimizer's "
                    "states are of this rank's part. Step outside the block."
                )


def _note_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """After any optimizer's step: what it stepped is out of date where it is gathered. The same on every rank."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, ShardedParameter) and isinstance(param.owner, Bucket):
                param.owner.mark_stale()
            elif fqn := getattr(param, RETIRED, None):
                raise StateError(
                    f"This {type(optimizer).__name__} was built before the model was sharded: it holds {fqn} as it "
                    "was, which the model no longer uses, and trains nothing. Build the optimizer after `zero.shard`, "
                    "or pass it to `zero.initialize`."
                )


def _retire(param: nn.Parameter, fqn: str) -> None:
    """Mark a parameter that fragments have replaced, so that whoever goes on using it is told."""
    param.__dict__[RETIRED] = fqn
    if param.requires_grad:
        param.register_post_accumulate_grad_hook(_refuse_gradient_of_retired)


def _refuse_gradient_of_retired(param: Tensor) -> None:
    fqn = getattr(param, RETIRED)
    raise StateError(
        f"{fqn} is used in the forward by another reference than its module's attribute, such as a list or a closure, "
        "which holds it as it was before sharding; it would never be trained. Use the module's attribute, or an "
        "nn.ParameterList."
    )


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise StateError(
        "state_dict() of a sharded model would hold this rank's fragments. Call `engine.consolidated_state_dict()` on "
        "every rank for the whole weights, or `zero.consolidated_state_dict(model)` without an engine."
    )


def _refuse_load(module: nn.Module, state_dict: object, prefix: str, *rest: object) -> None:
    raise StateError(
        "load_state_dict() cannot put whole weights into fragments. Load them before `zero.initialize` or "
        "`zero.shard`; to continue a run of the engine use `engine.load_checkpoint`."
    )
