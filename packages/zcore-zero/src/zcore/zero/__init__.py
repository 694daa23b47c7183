"""ZeRO training: parameters, gradients and optimizer state sharded over data-parallel ranks."""

from zcore.zero.config import TrainingConfig
from zcore.zero.consolidated import consolidated_state_dict
from zcore.zero.engine import Engine
from zcore.zero.external import register_external_parameter
from zcore.zero.gathered import GatheredParameters
from zcore.zero.initialize import Init, init_distributed, initialize
from zcore.zero.memory import MemoryReport, RankMemory
from zcore.zero.optimizers.lamb import Lamb
from zcore.zero.optimizers.lion import Lion
from zcore.zero.optimizers.muon import Muon
from zcore.zero.optimizers.rounding import rounded_step
from zcore.zero.own_loop import clip_grad_norm_, no_sync, shard, shard_added
from zcore.zero.placement import TABLE, Placement, Row
from zcore.zero.precision import Precision
from zcore.zero.pretrained import LoadedKeys, load_pretrained
from zcore.zero.recompute import checkpoint
from zcore.zero.schedules.cycles import LRRangeTest, OneCycle
from zcore.zero.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR
from zcore.zero.sharding import ShardingOptions
from zcore.zero.units import set_leaf_modules

__all__ = [
    "TABLE",
    "Engine",
    "GatheredParameters",
    "Init",
    "LRRangeTest",
    "Lamb",
    "Lion",
    "LoadedKeys",
    "MemoryReport",
    "Muon",
    "OneCycle",
    "Placement",
    "Precision",
    "RankMemory",
    "Row",
    "ShardingOptions",
    "TrainingConfig",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "checkpoint",
    "clip_grad_norm_",
    "consolidated_state_dict",
    "init_distributed",
    "initialize",
    "load_pretrained",
    "no_sync",
    "register_external_parameter",
    "rounded_step",
    "set_leaf_modules",
    "shard",
    "shard_added",
]
