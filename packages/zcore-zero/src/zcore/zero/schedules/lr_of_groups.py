"""What schedules are told of parameter groups: one value for all of them, or one for each."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from zcore.core.errors import ConfigError

__all__ = ["per_group", "remember_initial_lr"]


def remember_initial_lr(optimizer: Optimizer) -> None:
    """Leave each group's lr where schedules look for the one it began with."""
    for group in optimizer.param_groups:  # torch does it for last_epoch = -1 only, and fails without for others
        lr = group["lr"]
        group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)


def per_group(optimizer: Optimizer, name: str, value: float | Sequence[float]) -> list[float]:
    """`value` for each group of `optimizer`. Raises ConfigError, with `name`, for another number, and below 0."""
    num_groups = len(optimizer.param_groups)
    lrs: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * num_groups
    if len(lrs) != num_groups:
        raise ConfigError(
            f"{name} holds {len(lrs)} values and the optimizer {num_groups} parameter groups; give one number "
            "for all groups, or one per group."
        )
    if not all(isinstance(lr, int | float) and lr >= 0.0 for lr in lrs):
        raise ConfigError(f"{name} is {value!r}; expected a number of 0 or more, or one per parameter group.")
    return lrs
