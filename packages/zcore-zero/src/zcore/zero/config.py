"""The keys of the engine's JSON, named as DeepSpeed users know them, and how "auto" is settled.

What a file says counts, else the default here; an object that the program passes beside the same key is refused. Where
a default differs from DeepSpeed's, the field says why.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zcore.core.config import Auto, Config
from zcore.core.errors import ConfigError, nearest
from zcore.core.recording import OPS
from zcore.zero.loss_scale import LossScale

__all__ = [
    "DTYPES",
    "BatchSizes",
    "Bf16",
    "Choice",
    "CommsLogger",
    "DataTypes",
    "Fp16",
    "TorchAutocast",
    "TrainingConfig",
    "ZeroOptimization",
    "plan_batch",
]

NUMBER = re.compile(r"[+-]?\d+\.?\d*(e[+-]?\d+)?", re.IGNORECASE)


class Choice(Config):
    """A class by name with its keyword arguments: an optimizer or a learning-rate schedule."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refuse_quoted_numbers(self) -> "Choice":
        for key, value in self.params.items():
            if isinstance(value, str) and NUMBER.fullmatch(value):
                raise ValueError(f"params.{key} is {value!r}; expected a number, written without quotes.")
        return self


class Bf16(Config):
    """Compute in bfloat16 with fp32 master shards; gradients accumulate and are reduced in fp32."""

    enabled: bool | Auto = False
    bf16_master_weights_and_grads: bool = False  # no masters: steps are rounded stochastically, gradients are bf16
    bf16_optimizer_states: bool = False  # rounded like the parameters

    @model_validator(mode="after")
    def _refuse_parts(self) -> "Bf16":
        if self.bf16_optimizer_states and not self.bf16_master_weights_and_grads:
            raise ValueError("bf16_optimizer_states needs bf16_master_weights_and_grads: set both, or neither.")
        if self.bf16_master_weights_and_grads and self.enabled is not True:
            raise ValueError('bf16_master_weights_and_grads needs bf16: set "enabled": true.')
        return self

    known_unserved: ClassVar[Mapping[str, str]] = {
        "immediate_grad_update": "Gradients move into their bucket at once.",
        "check_grad_overflow": "A step that is not finite is always refused.",
    }
    always: ClassVar[Mapping[str, object]] = {"immediate_grad_update": True, "check_grad_overflow": True}


class Fp16(Config):
    """Compute in float16 with fp32 master shards, and losses scaled so that small gradients do not vanish.

    Gradients accumulate and are reduced in fp32, with the scale taken out. Inputs are always cast.
    """

    enabled: bool | Auto = False
    loss_scale: NonNegativeFloat | Auto = 0.0  # 0: dynamic
    initial_scale_power: NonNegativeInt | Auto = 16  # the dynamic scale begins at 2 to this power
    loss_scale_window: PositiveInt | Auto = 1000  # clean steps before it doubles
    hysteresis: PositiveInt | Auto = 2  # overflows before it halves
    consecutive_hysteresis: bool | Auto = False  # each clean step makes up for the overflows before it
    min_loss_scale: PositiveFloat | Auto = 1.0
    auto_cast: bool | Auto = True  # DeepSpeed has false, and then expects fp16 inputs, which stay as they are here

    known_unserved: ClassVar[Mapping[str, str]] = {
        "fp16_master_weights_and_grads": "Masters and gradients are fp32.",
    }

    @property
    def loss_scaling(self) -> LossScale:
        """The keys as a policy; of settled values."""
        fixed = float(self.loss_scale)
        return LossScale(
            initial=fixed or 2.0 ** int(self.initial_scale_power),
            is_dynamic=not fixed,
            window=int(self.loss_scale_window),
            hysteresis=int(self.hysteresis),
            refills_each_clean_step=bool(self.consecutive_hysteresis),
            minimum=float(self.min_loss_scale),
        )


class TorchAutocast(Config):
    """Run the model's forward under `torch.autocast`; parameters and gradients stay in the dtypes they were built in.

    Under float16 losses are scaled by the keys of `fp16`.
    """

    enabled: bool | Auto = False
    dtype: Literal["bfloat16", "float16"] | Auto | None = None  # null: bfloat16

    known_unserved: ClassVar[Mapping[str, str]] = {
        "lower_precision_safe_modules": "To send gradients in 16 bits, set communication_data_type.",
    }

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """What operations are cast to; None where it is off. Of settled values."""
        if not self.enabled:
            return None
        return torch.float16 if self.dtype == "float16" else torch.bfloat16


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "bfp16": torch.bfloat16}
DtypeName = Literal["fp32", "fp16", "bf16", "bfp16"]


class DataTypes(Config):
    """In which dtype gradients accumulate over micro-batches on their rank; null: the master's, fp32."""

    grad_accum_dtype: DtypeName | Auto | None = None

    known_unserved: ClassVar[Mapping[str, str]] = {
        "param_dtype": "Set bf16 or fp16.",
        "buffer_dtype": "Buffers keep their dtype.",
        "keep_in_fp32_modules": "Not served: leave it out.",
    }


class LeafModules(Config):
    """Modules that are gathered as one, whichever of their parts a rank uses; see `zero.set_leaf_modules`."""

    classes: tuple[str, ...] = ()  # names of types, with or without the module they are defined in
    names: tuple[str, ...] = ()  # fully qualified
    name_suffixes: tuple[str, ...] = ()


class ActivationCheckpointing(Config):
    """Which blocks compute their activations again in the backward; see `zero.checkpoint`."""

    every: PositiveInt | None = None  # 1: each block, 2: every second one; null: none
    save: tuple[Literal["attention", "matmul"], ...] = ()  # results that are kept all the same
    partition_activations: bool = False  # inputs of blocks are kept in parts over the ranks of the mesh's `tp`
    # Of DeepSpeed's section, which says how its `checkpoint` saves what a model hands to it.
    contiguous_memory_optimization: bool = False
    number_checkpoints: PositiveInt | None = None
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False

    known_unserved: ClassVar[Mapping[str, str]] = {
        "cpu_checkpointing": "Saved activations stay on the device.",
    }


class ZeroOptimization(Config):
    """What is sharded, and how far ahead and in which pieces it moves. Sizes are in elements, not bytes."""

    stage: Literal[0, 1, 2, 3] = 0
    # Ranks that share one copy of the states; -1: all. More than one such group is hybrid sharding.
    mics_shard_size: PositiveInt | Literal[-1] = -1
    # hpZ: consecutive ranks, as those of a host, that share a second copy of the parameters. 1: none.
    zero_hpz_partition_size: PositiveInt = 1
    reduce_bucket_size: PositiveInt | Auto = 500_000_000  # a block larger than this is gathered and reduced in pieces
    allgather_bucket_size: PositiveInt | Auto = 500_000_000  # the same pieces: the smaller of the two counts
    overlap_comm: bool | Auto = True  # False waits for each collective where it starts
    stage3_prefetch_bucket_size: NonNegativeInt | Auto | None = None  # null: one bucket ahead; DeepSpeed has 5e7
    stage3_max_live_parameters: NonNegativeInt | Auto = 1_000_000_000
    stage3_max_reuse_distance: NonNegativeInt | Auto = 1_000_000_000  # within one pass; DeepSpeed counts across passes
    # Norms and biases; DeepSpeed's 1e5 keeps whole matrices of a small model unsharded.
    stage3_param_persistence_threshold: NonNegativeInt | Auto = 8_192
    stage3_model_persistence_threshold: NonNegativeInt | Auto = Field(default=2**63 - 1)
    leaf_module: LeafModules = LeafModules()
    # How things are always done here; another value changes no result, and is warned of (see `WITHOUT_EFFECT`).
    contiguous_gradients: bool | Auto = True
    reduce_scatter: bool | Auto = True
    allgather_partitions: bool | Auto = True
    round_robin_gradients: bool | Auto = False
    sub_group_size: PositiveInt | Auto = 1_000_000_000_000  # without offload the step is one pass whatever this says
    # consolidated_state_dict() gathers when it is called.
    stage3_gather_16bit_weights_on_model_save: bool | Auto = Field(
        default=False,
        validation_alias=AliasChoices(
            "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"
        ),
    )

    known_unserved: ClassVar[Mapping[str, str]] = {
        "offload_optimizer": "States stay on the device; leave the section out.",
        "offload_param": "Parameters stay on the device; leave the section out.",
        "cpu_offload": "States stay on the device; leave the key out.",
        "zero_quantized_weights": "Gathers move the compute dtype.",
        "zero_quantized_gradients": "Reductions move the accumulation dtype.",
        "zero_quantized_nontrainable_weights": "Gathers move the compute dtype.",
        "mics_hierarchical_params_gather": "Leave it out.",
        "zenflow": "States stay on the device.",
        "cpu_offload_param": "Parameters stay on the device.",
        "stage3_module_granularity_threshold": "Blocks are recognised.",
        "legacy_stage1": "Leave it out.",
        "zeropp_loco_param": "Reductions move the accumulation dtype.",
        "ignore_unused_parameters": "Unused parameters are always allowed.",
        "elastic_checkpoint": "Leave it out.",
        "load_from_fp32_weights": "Checkpoints always hold the master weights.",
    }
    always: ClassVar[Mapping[str, object]] = {"ignore_unused_parameters": True, "load_from_fp32_weights": True}


# Several names of DeepSpeed's are one op here.
LOGGED_OPS = {
    **{op: op for op in OPS},
    "all_gather_base": "all_gather",
    "all_gather_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_fn": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce_coalesced": "all_reduce",
    "inference_all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "isend": "send",
    "irecv": "recv",
}


class CommsLogger(Config):
    """Time every collective, for `engine.comm_report()`; needs zcore-comm. Off it costs nothing worth measuring."""

    enabled: bool = False
    verbose: bool = False  # log each call at INFO on rank 0 when it is done
    # null: all, unless `prof_ops` names some; DeepSpeed has true, under which `prof_ops` alone has no effect.
    prof_all: bool | None = None
    prof_ops: tuple[str, ...] = ()  # only these, by DeepSpeed's names, while `prof_all` is not true
    debug: bool = False  # name the calling function beside each label

    @model_validator(mode="after")
    def _name_what_there_is(self) -> "CommsLogger":
        for op in self.prof_ops:
            if op not in LOGGED_OPS:
                near = nearest(op, LOGGED_OPS)
                advice = f" Did you mean `{near}`?" if near else ""
                raise ValueError(f'prof_ops holds "{op}"; expected some of {", ".join(OPS)}.{advice}')
        if self.enabled and self.prof_all is False and not self.prof_ops:
            raise ValueError("prof_all is false and prof_ops names no collective: nothing would be recorded.")
        return self

    @property
    def ops(self) -> frozenset[str]:
        """Which collectives are recorded, by their names here."""
        recorded = OPS if self.prof_all or not self.prof_ops else map(LOGGED_OPS.__getitem__, self.prof_ops)
        return frozenset(recorded)


WITHOUT_EFFECT = {
    "zero_optimization": (
        "contiguous_gradients",
        "reduce_scatter",
        "allgather_partitions",
        "round_robin_gradients",
        "sub_group_size",
        "stage3_gather_16bit_weights_on_model_save",
    ),
    "activation_checkpointing": (
        "contiguous_memory_optimization",
        "number_checkpoints",
        "synchronize_checkpoint_boundary",
        "profile",
    ),
}


class TrainingConfig(Config):
    """Everything `zero.initialize` reads.

    >>> config = TrainingConfig.read({"train_batch_size": 32, "zero_optimization": {"stage": 3}})
    >>> config.zero_optimization.stage
    3
    """

    train_batch_size: PositiveInt | Auto | None = None  # sequences per optimizer step, over all ranks
    train_micro_batch_size_per_gpu: PositiveInt | Auto | None = None  # sequences per forward on one rank
    gradient_accumulation_steps: PositiveInt | Auto | None = None
    optimizer: Choice | None = None
    scheduler: Choice | None = None
    bf16: Bf16 = Field(default=Bf16(), validation_alias=AliasChoices("bf16", "bfloat16"))
    fp16: Fp16 = Fp16()
    torch_autocast: TorchAutocast = TorchAutocast()
    data_types: DataTypes = DataTypes()
    communication_data_type: DtypeName | Auto | None = None  # of reductions; null: as gradients accumulate
    prescale_gradients: bool = False  # divide by the ranks before gradients travel, not after
    gradient_predivide_factor: PositiveFloat = 1.0  # without it: by this much before, by the rest after
    gradient_clipping: NonNegativeFloat | Auto = 0.0  # largest global 2-norm; 0 is off, as in torch
    zero_optimization: ZeroOptimization = ZeroOptimization()
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    zero_allow_untested_optimizer: bool = True  # any element-wise optimizer is allowed, asked for or not
    steps_per_print: PositiveInt | None = None  # log loss, norm and learning rate every so many
    wall_clock_breakdown: bool = False  # log what the step spent its time on, as often as `steps_per_print`, or 10
    comms_logger: CommsLogger = CommsLogger()

    known_unserved: ClassVar[Mapping[str, str]] = {
        "amp": "Use bf16.",
        "flops_profiler": "Use torch.utils.flop_counter.",
        "tensorboard": "Log from the training loop.",
        "wandb": "Log from the training loop.",
        "csv_monitor": "Log from the training loop.",
        "aio": "Nothing is offloaded to files: leave the section out.",
        "pipeline": "The model is one stage: leave the section out.",
        "tensor_parallel": "Build the mesh with an axis `tp`, and leave the section out.",
        "data_efficiency": "Sample in the data loader.",
        "curriculum_learning": "Sample in the data loader.",
        "compression_training": "Not served: leave it out.",
        "autotuning": "Not served: leave it out.",
        "checkpoint": "Not served: leave it out.",
        "elasticity": "Not served: leave it out.",
        "compile": "Call torch.compile on the blocks.",
        "disable_allgather": "Leave it out.",
        "sequence_parallel_size": "Not served: leave it out.",
        "seq_parallel_communication_data_type": "Not served: leave it out.",
        "progressive_layer_drop": "Not served: leave it out.",
        "sparse_attention": "Use torch's flex_attention.",
        "eigenvalue": "Not served: leave it out.",
        "quantize_training": "Not served: leave it out.",
        "zero_force_ds_cpu_optimizer": "Optimizers are torch's.",
        "hybrid_engine": "Not served: leave it out.",
        "nebula": "Not served: leave it out.",
        "comet": "Log from the training loop.",
        "memory_breakdown": "Call `engine.memory_report()`.",
        "dataloader_drop_last": "Set it on the data loader.",
        "sparse_gradients": "Flat buffers hold dense gradients.",
        "dump_state": "Print the config.",
    }

    def settle(self, *, dp_size: int) -> "TrainingConfig":
        """Without "auto": what the program can know is filled in, the rest is an error that names the key."""
        batch = plan_batch(
            train_batch_size=_known(self.train_batch_size),
            micro_batch_size=_known(self.train_micro_batch_size_per_gpu),
            accumulation_steps=_known(self.gradient_accumulation_steps),
            dp_size=dp_size,
        )
        values: dict[str, Any] = {
            f"zero_optimization.{name}": field.default for name, field in ZeroOptimization.model_fields.items()
        }
        triple = {
            "train_batch_size": batch.train_batch_size,
            "train_micro_batch_size_per_gpu": batch.micro_batch_size,
            "gradient_accumulation_steps": batch.accumulation_steps,
        }
        values |= {f"fp16.{name}": field.default for name, field in Fp16.model_fields.items()}
        values |= {"data_types.grad_accum_dtype": None, "communication_data_type": None}
        values |= {"torch_autocast.enabled": False, "torch_autocast.dtype": None}
        settled = self.resolve({**values, **triple, "bf16.enabled": False, "gradient_clipping": 0.0})
        enabled = [name for name in ("bf16", "fp16", "torch_autocast") if getattr(settled, name).enabled]
        if len(enabled) > 1:
            raise ConfigError(f"{' and '.join(enabled)} are enabled; a model is computed in one way. Leave one on.")
        return settled.model_copy(update=triple)


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The batch triple: `train_batch_size = micro_batch_size * accumulation_steps * dp_size`."""

    train_batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def plan_batch(
    *, train_batch_size: int | None, micro_batch_size: int | None, accumulation_steps: int | None, dp_size: int
) -> BatchSizes:
    """Complete the batch triple from what is given; with nothing given, one sequence at a time.

    Raises ConfigError if it cannot be completed in whole numbers, or if all three are given and disagree.

    >>> plan_batch(train_batch_size=32, micro_batch_size=4, accumulation_steps=None, dp_size=2)
    BatchSizes(train_batch_size=32, micro_batch_size=4, accumulation_steps=4)
    """
    micro, steps = micro_batch_size, accumulation_steps
    if train_batch_size is None:
        micro, steps = micro or 1, steps or 1
        return BatchSizes(micro * steps * dp_size, micro, steps)
    if micro is None:
        micro = train_batch_size // (dp_size * (steps or 1))
    if steps is None:
        steps = train_batch_size // (dp_size * max(micro, 1))
    if train_batch_size % dp_size:
        raise ConfigError(
            f"train_batch_size is {train_batch_size}, which cannot be divided over {dp_size} data-parallel ranks. Take "
            "a multiple of the number of ranks."
        )
    if micro * steps * dp_size != train_batch_size or micro < 1:
        raise ConfigError(
            f"train_batch_size is {train_batch_size}, but train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {steps} x {dp_size} data-parallel ranks is {micro * steps * dp_size}. Change "
            "one so that the product is right, or leave one out and it is worked out."
        )
    return BatchSizes(train_batch_size, micro, steps)


def _known(value: int | Auto | None) -> int | None:
    return value if isinstance(value, int) else None
