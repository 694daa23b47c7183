"""Learning-rate schedules of the field's configuration files: WarmupLR, WarmupDecayLR and WarmupCosineLR.

They are ordinary `torch.optim.lr_scheduler.LRScheduler`s that follow DeepSpeed's curves step by step, so a run that
moves keeps its learning rate at every optimizer step. With n = warmup_num_steps and T = total_num_steps:

    optimizer step   1        2    3    ...  k           ...  n+2
    iteration        (start)  0    1    ...  i = k - 2   ...  n    <- i >= n: the warmup is over
    log warmup       min      ln(i + 1) / ln(n)
    linear warmup    min      i / n

The first optimizer step uses the start value and the second one the warmup's own zero, so the minimum serves twice.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zcore.core.errors import ConfigError
from zcore.zero.schedules.lr_of_groups import per_group, remember_initial_lr

__all__ = ["WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

WarmupType = Literal["log", "linear"]


class WarmupLR(LRScheduler):
    """Raise every group's lr from `warmup_min_lr` to `warmup_max_lr` in `warmup_num_steps` steps, then keep it.

    Call `optimizer.step()`, then `step()`. The first two optimizer steps use `warmup_min_lr`. A list holds one lr per
    parameter group; without `warmup_max_lr` each group keeps its own. `last_epoch` is what DeepSpeed calls
    `last_batch_iteration`. Raises ConfigError for an argument out of range.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> scheduler = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    >>> lrs = []
    >>> for _ in range(7):
    ...     lrs.append(optimizer.param_groups[0]["lr"])
    ...     optimizer.step()
    ...     scheduler.step()
    >>> lrs
    [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: WarmupType = "log",
        last_epoch: int = -1,
    ) -> None:
        _check_warmup(warmup_num_steps, warmup_type)
        remember_initial_lr(optimizer)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self.min_lrs = per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = per_group(optimizer, "warmup_max_lr", warmup_max_lr)
        self.warmup_num_steps = warmup_num_steps
        self.warmup_type: WarmupType = warmup_type
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Each group's lr for the next optimizer step."""
        ratio = 0.0 if self.last_epoch == 0 else self._ratio(self.last_epoch - 1)
        return [low + ratio * (high - low) for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _ratio(self, iteration: int) -> float:
        return _warmup_ratio(iteration, self.warmup_num_steps, self.warmup_type)


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then a straight line down that reaches `warmup_min_lr` at iteration `total_num_steps`.

    The line is (T - i) / (T - n), never below 0. Unlike `WarmupLR`, the default `warmup_max_lr` is 0.001.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        *,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: WarmupType = "log",
        last_epoch: int = -1,
    ) -> None:
        _check_total(total_num_steps, warmup_num_steps)
        self.total_num_steps = total_num_steps
        super().__init__(
            optimizer,
            warmup_min_lr=warmup_min_lr,
            warmup_max_lr=warmup_max_lr,
            warmup_num_steps=warmup_num_steps,
            warmup_type=warmup_type,
            last_epoch=last_epoch,
        )

    def _ratio(self, iteration: int) -> float:
        num_steps = _effective_num_steps(self.warmup_num_steps)
        if iteration < num_steps:
            return super()._ratio(iteration)
        return max(0.0, (self.total_num_steps - iteration) / max(1, self.total_num_steps - num_steps))


class WarmupCosineLR(LRScheduler):
    """Scale every group's initial lr by a ratio that warms up to 1 and falls along a cosine to `cos_min_ratio`.

    The warmup starts at `warmup_min_ratio`; the first optimizer step uses an lr of 0 whatever that ratio is, as
    DeepSpeed does. After it the ratio is c + (1 - c) (1 + cos(pi p)) / 2 with p = (i - n + 1) / (T - n), at most 1.
    `last_epoch` is what DeepSpeed calls `last_batch_iteration`. Raises ConfigError for an argument out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        *,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: WarmupType = "log",
        last_epoch: int = -1,
    ) -> None:
        _check_warmup(warmup_num_steps, warmup_type)
        _check_total(total_num_steps, warmup_num_steps)
        for name, ratio in (("warmup_min_ratio", warmup_min_ratio), ("cos_min_ratio", cos_min_ratio)):
            if not 0.0 <= ratio <= 1.0:
                raise ConfigError(f"{name} is {ratio}; expected a share of the group's lr between 0 and 1.")
        remember_initial_lr(optimizer)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.warmup_num_steps = warmup_num_steps
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type: WarmupType = warmup_type
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Each group's lr for the next optimizer step."""
        ratio = 0.0 if self.last_epoch == 0 else self._ratio(self.last_epoch - 1)
        return [lr * ratio for lr in self.base_lrs]

    def _ratio(self, iteration: int) -> float:
        num_steps = _effective_num_steps(self.warmup_num_steps)
        if iteration < num_steps:
            warmup = _warmup_ratio(iteration, num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * warmup
        progress = min(1.0, (iteration - num_steps + 1) / max(1, self.total_num_steps - num_steps))
        return self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _effective_num_steps(warmup_num_steps: int) -> int:
    return max(2, warmup_num_steps)  # ln(1) is 0: a warmup of one step would divide by it


def _warmup_ratio(iteration: int, warmup_num_steps: int, warmup_type: WarmupType) -> float:
    num_steps = _effective_num_steps(warmup_num_steps)
    if iteration >= num_steps:
        return 1.0
    return math.log(iteration + 1) / math.log(num_steps) if warmup_type == "log" else iteration / num_steps


def _check_warmup(warmup_num_steps: object, warmup_type: object) -> None:
    if not isinstance(warmup_num_steps, int) or warmup_num_steps < 1:
        raise ConfigError(f"warmup_num_steps is {warmup_num_steps!r}; expected a whole number of steps, 1 or more.")
    if warmup_type not in ("log", "linear"):
        raise ConfigError(f"warmup_type is {warmup_type!r}; expected 'log' or 'linear'.")


def _check_total(total_num_steps: object, warmup_num_steps: object) -> None:
    if not isinstance(total_num_steps, int) or total_num_steps < 1:
        raise ConfigError(f"total_num_steps is {total_num_steps!r}; expected a whole number of steps, 1 or more.")
    if isinstance(warmup_num_steps, int) and total_num_steps < warmup_num_steps:
        warnings.warn(
            f"total_num_steps ({total_num_steps}) is less than warmup_num_steps ({warmup_num_steps}): the run ends "
            "before the warmup does.",
            stacklevel=3,
        )
