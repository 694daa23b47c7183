"""From a model and a config to an engine: `init_distributed`, `Init`, `initialize`."""

import logging
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zcore.core.device import backend_for, choose_device
from zcore.core.errors import ConfigError
from zcore.core.events import Events
from zcore.core.mesh import build_mesh, data_parallel
from zcore.core.recording import Recording, start_recording
from zcore.core.torch_collectives import choose_collectives
from zcore.zero.agreement import Plain, check_agreement
from zcore.zero.buffer import DataParallelGroups
from zcore.zero.config import DTYPES, WITHOUT_EFFECT, CommsLogger, TrainingConfig, ZeroOptimization
from zcore.zero.deferred import deferred_init
from zcore.zero.engine import Engine
from zcore.zero.names_of_deepspeed import refused_argument
from zcore.zero.optimizers.building import (
    GroupsByName,
    OptimizerSource,
    ParamGroups,
    StatesByName,
    build_optimizer,
    cut_states,
    name_groups,
    release_params,
)
from zcore.zero.precision import Precision
from zcore.zero.recompute import check_recompute, checkpoint
from zcore.zero.schedules.building import build_scheduler, of_metric
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.sharding import Sharding, ShardingOptions, find_shardable
from zcore.zero.streaming import streamed_files
from zcore.zero.units import set_leaf_modules

__all__ = ["ConfigSource", "Init", "init_distributed", "initialize"]

logger = logging.getLogger(__name__)

ConfigSource = str | Path | Mapping[str, Any] | TrainingConfig


def init_distributed(*, timeout_s: float = 300.0) -> None:
    """Join the process group that the launcher (torchrun) describes, or be the only rank without one.

    Harmless when there is a process group already. `timeout_s` is how long a rank waits in a collective for the others
    before it raises.
    """
    if dist.is_initialized():
        return
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend_for(device), timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but torch's types do not export it
        dist.init_process_group(backend_for(device), store=store, rank=0, world_size=1, timeout=timeout)


@contextmanager
def Init(config: ConfigSource | None = None, *, enabled: bool = True) -> Generator[None]:  # the field's name
    """Models constructed inside take no memory; `initialize` or `shard` computes this rank's part of each parameter.

    Values are those that plain construction would give, bit for bit, whatever the constructor does to them. A config
    given here is checked at once, before a large model is built.
    """
    if config is not None:
        TrainingConfig.read(config)
    if not enabled:
        yield
        return
    with deferred_init() as recording, streamed_files(recording):
        yield


def initialize(
    model: nn.Module,
    config: ConfigSource | None = None,
    *,
    optimizer: OptimizerSource | None = None,
    lr_scheduler: LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    model_parameters: ParamGroups | None = None,
    mesh: DeviceMesh | None = None,
    events: Events | None = None,
    **others: object,
) -> Engine:
    """Shard `model` as `config` says and return its engine; every rank calls it.

    config: path of a JSON or YAML file, dict, or TrainingConfig. optimizer: an element-wise torch optimizer, its class,
    or a function from parameter groups to it; else the config's; with none in both the engine evaluates and loads
    weights, and its `step()` raises. lr_scheduler: a schedule on that optimizer, or a function from the optimizer to
    it; else the config's. model_parameters: parameters or groups as torch takes them; by default all that are
    trainable. mesh: with axis `dp`, or `dp_replicate` and `dp_shard` for hybrid sharding; by default all ranks. events:
    where this rank's loss, the gradient norm and the learning rates of each step go.

    others: none; arguments of DeepSpeed's are refused with what to do instead.

    Raises ConfigError, MeshError, MismatchError on every rank where ranks differ, and NotInstalledError if the config
    asks for what another wheel brings.
    """
    if others:
        raise ConfigError(refused_argument(next(iter(others))))
    raw = TrainingConfig.read(config if config is not None else {})
    if optimizer is not None and raw.optimizer is not None:
        raise ConfigError("An optimizer was passed and the config has one, too. Leave one of them out.")
    if lr_scheduler is not None and raw.scheduler is not None:
        raise ConfigError("A learning-rate schedule was passed and the config has one, too. Leave one of them out.")
    _refuse_metric(lr_scheduler)
    with _recording(raw.comms_logger) as recording:
        init_distributed()
        _agree_on_config(raw)  # before the mesh: groups cut in different ways would wait for each other
        mesh = _mesh_for(raw.zero_optimization, mesh)
        _check_secondary(raw.zero_optimization, shard_size=data_parallel(mesh).shard_size)
        settings = raw.settle(dp_size=data_parallel(mesh).size)
        _warn_of_no_effect(raw, mesh)
        source = optimizer or settings.optimizer
        if lr_scheduler is not None or settings.scheduler is not None:
            _need_optimizer(source)
        # What can be refused is refused before anything is changed, so that the user may mend it and call again.
        find_shardable(model)
        _mark_leaves(model, settings)
        recompute = settings.activation_checkpointing
        if recompute.every is not None:
            check_recompute(model, every=recompute.every, save=recompute.save)
        groups: GroupsByName
        states: StatesByName = {}
        if isinstance(optimizer, torch.optim.Optimizer):
            groups, states = release_params(optimizer, model)
        else:
            groups = name_groups(model_parameters, model)
            _rehearse(settings, groups, {name: param.shape for name, param in model.named_parameters()})
        options = _options(settings, dp_size=data_parallel(mesh).size)
        sharding = Sharding(model, mesh, zero_stage=settings.zero_optimization.stage, options=options)
        if recompute.every is not None:
            over = choose_collectives(mesh.get_group("tp"), name="tp") if _partitions(settings, mesh) else None
            checkpoint(model, every=recompute.every, save=recompute.save, partition_over=over)
        built = None
        if source is not None:
            built = build_optimizer(source, groups, sharding.fragments, device=sharding.device)
            cut_states(built, states, sharding.fragments)
        schedule = lr_scheduler
        if schedule is not None and not isinstance(schedule, LRScheduler):
            assert built is not None
            schedule = schedule(built)
            _refuse_metric(schedule)
        elif schedule is None and settings.scheduler is not None:
            assert built is not None
            schedule = build_scheduler(settings.scheduler.type, settings.scheduler.params, built)
        _agree_on_objects(sharding, built, schedule)
        return Engine(
            model,
            sharding,
            optimizer=built,
            lr_scheduler=schedule,
            config=settings,
            events=events,
            recording=recording,
        )


@contextmanager
def _recording(settings: CommsLogger) -> Generator[Recording | None]:
    """Record every collective from here on, if `settings` ask for it; not beyond an error."""
    if not settings.enabled:
        yield None
        return
    recording = start_recording(ops=settings.ops, verbose=settings.verbose, names_callers=settings.debug)
    try:
        yield recording
    except BaseException:
        recording.stop()
        raise


def _rehearse(settings: TrainingConfig, groups: GroupsByName, shapes: Mapping[str, torch.Size]) -> None:
    """Raise what building the config's optimizer and schedule will raise; on stand-ins for the parameters."""
    if settings.optimizer is None:
        return
    value = torch.zeros(())  # of all of them: only their shapes count
    stand_ins = {name: nn.Parameter(value.expand(shapes[name])) for group in groups for name in group["params"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are given when it is built in earnest
        optimizer = build_optimizer(settings.optimizer, groups, stand_ins, device=torch.device("cpu"))
        if settings.scheduler is not None:
            build_scheduler(settings.scheduler.type, settings.scheduler.params, optimizer)


def _agree_on_config(config: TrainingConfig) -> None:
    world = dist.group.WORLD
    assert world is not None
    everyone = choose_collectives(world, name="world")
    check_agreement(
        {"config": config.to_dict()},
        rank=everyone.rank,
        num_ranks=everyone.size,
        groups=DataParallelGroups(gather=everyone, reduce=everyone, replicate=None),
        device=choose_device(),
    )


def _agree_on_objects(
    sharding: Sharding,
    optimizer: torch.optim.Optimizer | None,
    schedule: LRScheduler | None,
) -> None:
    """Objects that a program passes are not in the config, but must be the same on every rank as well."""
    if schedule is not None and schedule.optimizer is not optimizer:
        raise ConfigError(
            "The learning-rate schedule that was passed belongs to another optimizer than this engine's. Pass a "
            "function from the optimizer to the schedule, or both objects, the schedule made on that optimizer."
        )
    facts: dict[str, Plain] = {
        "optimizer": type(optimizer).__name__,
        "lr_scheduler": type(schedule).__name__,
        "parameter group": {
            str(index): {
                "parameters": [param.fqn for param in group["params"] if isinstance(param, ShardedParameter)],
                "settings": {key: repr(value) for key, value in group.items() if key != "params"},
            }
            for index, group in enumerate([] if optimizer is None else optimizer.param_groups)
        },
    }
    dp = sharding.dp
    check_agreement(facts, rank=dp.rank, num_ranks=dp.size, groups=sharding.groups, device=sharding.device)


def _mesh_for(zero: ZeroOptimization, given: DeviceMesh | None) -> DeviceMesh:
    world_size = dist.get_world_size()
    if given is not None:
        if zero.mics_shard_size not in (-1, size := data_parallel(given).shard_size):
            raise ConfigError(
                f"zero_optimization.mics_shard_size is {zero.mics_shard_size}, but the mesh that was passed shards "
                f"over {size} ranks. Leave one of them out."
            )
        return given
    if zero.mics_shard_size == -1:
        return build_mesh(dp=-1)
    if world_size % zero.mics_shard_size:
        raise ConfigError(
            f"zero_optimization.mics_shard_size is {zero.mics_shard_size}, which does not divide the {world_size} "
            "ranks of this run into equal groups. Take a divisor, or leave it out to shard over all ranks."
        )
    return build_mesh(dp_replicate=-1, dp_shard=zero.mics_shard_size)


def _check_secondary(zero: ZeroOptimization, *, shard_size: int) -> None:
    size = zero.zero_hpz_partition_size
    if size > 1 and shard_size % size:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {size}, which does not divide the {shard_size} ranks that "
            "share one copy of the states. Take a divisor: the ranks of a host, or 1 for no second copy."
        )
    if size > 1 and (zero.stage < 3 or size == shard_size) and dist.get_rank() == 0:
        logger.warning(
            "zero_optimization.zero_hpz_partition_size has no effect %s.",
            "below stage 3" if zero.stage < 3 else "where it is all ranks that share one copy of the states",
        )


def _options(settings: TrainingConfig, *, dp_size: int) -> ShardingOptions:
    zero = settings.zero_optimization
    return ShardingOptions(
        precision=_precision(settings, dp_size=dp_size),
        bucket_numel=min(int(zero.reduce_bucket_size), int(zero.allgather_bucket_size)),
        small_numel=int(zero.stage3_param_persistence_threshold),
        small_total_numel=int(zero.stage3_model_persistence_threshold),
        prefetch_numel=None if zero.stage3_prefetch_bucket_size is None else int(zero.stage3_prefetch_bucket_size),
        max_live_numel=int(zero.stage3_max_live_parameters),
        max_reuse_numel=int(zero.stage3_max_reuse_distance),
        overlap=bool(zero.overlap_comm),
        secondary_size=zero.zero_hpz_partition_size,
    )


def _precision(settings: TrainingConfig, *, dp_size: int) -> Precision:
    compute = torch.float16 if settings.fp16.enabled else torch.bfloat16 if settings.bf16.enabled else None
    accumulate, reduce = settings.data_types.grad_accum_dtype, settings.communication_data_type
    return Precision(
        compute,
        accumulate=None if accumulate is None else DTYPES[accumulate],
        reduce=None if reduce is None else DTYPES[reduce],
        predivide=float(dp_size) if settings.prescale_gradients else settings.gradient_predivide_factor,
        masters=not settings.bf16.bf16_master_weights_and_grads,
        states=torch.bfloat16 if settings.bf16.bf16_optimizer_states else None,
    )


def _refuse_metric(schedule: object) -> None:
    if schedule is ReduceLROnPlateau or isinstance(schedule, ReduceLROnPlateau):
        raise ConfigError(of_metric())


def _need_optimizer(source: object) -> None:
    if source is None:
        raise ConfigError("A learning-rate schedule needs an optimizer: pass one, or give the config an `optimizer`.")


def _partitions(settings: TrainingConfig, mesh: DeviceMesh) -> bool:
    """Whether blocks keep their inputs in parts over tensor-parallel ranks."""
    recompute = settings.activation_checkpointing
    has_ranks = "tp" in (mesh.mesh_dim_names or ()) and mesh["tp"].size() > 1
    return recompute.partition_activations and recompute.every is not None and has_ranks


def _warn_of_no_effect(settings: TrainingConfig, mesh: DeviceMesh) -> None:
    if dist.get_rank() != 0:
        return
    if settings.activation_checkpointing.partition_activations and not _partitions(settings, mesh):
        logger.warning(
            "activation_checkpointing.partition_activations has no effect: it needs a mesh with several ranks along "
            "`tp`, and activation_checkpointing.every."
        )
    for section, names in WITHOUT_EFFECT.items():
        given = getattr(settings, section)
        for name in names:
            if name in given.model_fields_set and getattr(given, name) != type(given).model_fields[name].default:
                logger.warning("%s.%s is accepted and has no effect here.", section, name)


def _mark_leaves(model: nn.Module, settings: TrainingConfig) -> None:
    leaf = settings.zero_optimization.leaf_module
    set_leaf_modules(model, leaf.classes, names=leaf.names, suffixes=leaf.name_suffixes)
