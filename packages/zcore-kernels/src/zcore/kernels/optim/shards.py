"""The shard of a DTensor, which is what a rank steps: parameters under `fully_shard` (FSDP2) and tensor parallelism.

States are made like their parameter, so they are DTensors as well, and state_dict holds them as torch.optim's does.
What needs more than a rank's own shard is refused: codes of one byte, whose scales belong to blocks of memory that
another cut would break, and LAMB, which wants norms of whole parameters.
"""

from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.kernels.ops.memory import is_plain

__all__ = ["check_shard", "grad_shard_of", "note_shard_step", "shard_of"]


def shard_of(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor, without a copy; any other tensor itself. To be called without gradients."""
    if is_plain(tensor) or not hasattr(tensor, "to_local"):
        return tensor  # type: ignore[no-any-return] # a DTensor is known by what it has: importing its module is slow
    shard: Tensor = tensor.to_local()
    return shard


def grad_shard_of(param: Any, grad: Any) -> Tensor:
    """The shard of `grad` that belongs to that of `param`: gathered or reduced first where it is cut otherwise."""
    if shard_of(grad) is not grad and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)  # as torch.optim's arithmetic does
    return shard_of(grad)


def note_shard_step(param: Tensor) -> None:
    """The shard of `param` has been stepped, and counts its versions by itself."""
    if shard_of(param) is not param:
        torch.autograd.graph.increment_version(param)


def check_shard(name: str, param: Tensor, *, state_dtype: str, is_elementwise: bool) -> None:
    """Raise ConfigError where the optimizer called `name` cannot step a shard of `param`."""
    if shard_of(param) is param:
        return
    if not is_elementwise:
        raise ConfigError(
            f"{name}: a parameter is a DTensor; expected whole ones, whose norms it needs. Take AdamW, or leave the "
            "model unsharded."
        )
    if state_dtype == "8bit":
        raise ConfigError(
            f'{name}: a parameter is a DTensor, and state_dtype is "8bit", whose scales belong to blocks of a whole '
            "tensor; expected torch.float32 or torch.bfloat16."
        )
