"""ZeRO training: parameters, gradients and optimizer state sharded over data-parallel ranks."""

from zcore.zero.config import TrainingConfig
from zcore.zero.consolidated import consolidated_state_dict
from zcore.zero.cycles import LRRangeTest, OneCycle
from zcore.zero.engine import Engine
from zcore.zero.gathered import GatheredParameters
from zcore.zero.initialize import Init, init_distributed, initialize
from zcore.zero.memory import MemoryReport, RankMemory
from zcore.zero.placement import TABLE, Placement, Row
from zcore.zero.precision import Precision
from zcore.zero.sharding import ShardingOptions, clip_grad_norm_, no_sync, shard
from zcore.zero.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "TABLE",
    "Engine",
    "GatheredParameters",
    "Init",
    "LRRangeTest",
    "MemoryReport",
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
    "clip_grad_norm_",
    "consolidated_state_dict",
    "init_distributed",
    "initialize",
    "no_sync",
    "shard",
]
