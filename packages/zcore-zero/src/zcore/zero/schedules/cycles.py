"""Learning-rate schedules of the field's configuration files that go up and down: OneCycle and LRRangeTest.

They are ordinary `torch.optim.lr_scheduler.LRScheduler`s that follow DeepSpeed's curves step by step. Optimizer step k
uses the value at t = k - 1; with f and s the lengths of the cycle's two halves (Smith, arXiv 1803.09820):

    t                 0 ... f         f ... f + s        beyond
    height            t / f           (f + s - t) / s    0
    lr                min + height (max - min)           min / (1 + decay_lr_rate (t - f - s) / decay_step_size)
    momentum          max - height (max - min)           max (1 + decay_mom_rate (t - f - s) / decay_step_size)
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zcore.core.errors import ConfigError
from zcore.zero.schedules.lr_of_groups import per_group, remember_initial_lr

__all__ = ["LRRangeTest", "OneCycle"]


class OneCycle(LRScheduler):
    """Every group's lr up from `cycle_min_lr` to `cycle_max_lr`, down again, and then slowly to nothing.

    A stair count above 0 makes so many flat stairs of a half; `cycle_second_step_size` and `cycle_second_stair_count`
    are as in the first half unless given. `decay_step_size` 0 is no decay. With `cycle_momentum` the first of a
    group's `betas` goes the other way, from `cycle_max_mom` to `cycle_min_mom` and back; groups without betas keep
    their momentum. Unlike DeepSpeed's this one leaves the second beta alone (there it becomes 0.99), and the first step
    has the momentum of its place in the cycle. `last_epoch` is what DeepSpeed calls `last_batch_iteration`. Raises
    ConfigError for an argument out of range.

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.5)
    >>> scheduler = OneCycle(optimizer, cycle_min_lr=1.0, cycle_max_lr=3.0, cycle_first_step_size=2)
    >>> used = []
    >>> for _ in range(6):
    ...     used.append((optimizer.param_groups[0]["lr"], round(optimizer.param_groups[0]["betas"][0], 2)))
    ...     optimizer.step()
    ...     scheduler.step()
    >>> used
    [(1.0, 0.9), (2.0, 0.85), (3.0, 0.8), (2.0, 0.85), (1.0, 0.9), (1.0, 0.9)]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        *,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: float = 0,
        cycle_second_stair_count: float | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        remember_initial_lr(optimizer)
        self.first_size = _positive("cycle_first_step_size", cycle_first_step_size)
        second_size = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.second_size = _positive("cycle_second_step_size", second_size)
        self.first_stairs = _not_negative("cycle_first_stair_count", cycle_first_stair_count)
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.second_stairs = _not_negative("cycle_second_stair_count", second_stairs)
        self.decay_size = _not_negative("decay_step_size", decay_step_size)
        self.decay_lr_rate = _not_negative("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = float(decay_mom_rate)
        self.min_lrs = per_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = per_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self.min_moms = per_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self.max_moms = per_group(optimizer, "cycle_max_mom", cycle_max_mom)
        self.cycle_momentum = cycle_momentum
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """The next optimizer step's lr and momentum."""
        super().step(epoch)
        if not self.cycle_momentum:
            return
        for group, momentum in zip(self.optimizer.param_groups, self._momenta(), strict=True):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])

    def get_lr(self) -> list[float | Tensor]:
        """Each group's lr for the next optimizer step."""
        height, decayed = self._height(), 1.0 + self.decay_lr_rate * self._decays()
        return [(low + height * (high - low)) / decayed for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _momenta(self) -> list[float]:
        height, decayed = self._height(), 1.0 + self.decay_mom_rate * self._decays()
        return [
            (high - height * (high - low)) * decayed for low, high in zip(self.min_moms, self.max_moms, strict=True)
        ]

    def _height(self) -> float:
        """From 0 at the foot of the cycle to 1 at its top."""
        up, down = self.last_epoch, self.first_size + self.second_size - self.last_epoch
        if down <= 0:
            return 0.0
        position, size, stairs = (
            (up, self.first_size, self.first_stairs)
            if up <= self.first_size
            else (down, self.second_size, self.second_stairs)
        )
        return math.floor(position * stairs / size) / stairs if stairs else position / size

    def _decays(self) -> float:
        """How many periods of decay have passed since the cycle's end."""
        beyond = self.last_epoch - self.first_size - self.second_size
        return beyond / self.decay_size if beyond > 0 and self.decay_size else 0.0


class LRRangeTest(LRScheduler):
    """Raise every group's lr from `lr_range_test_min_lr` on, to see from the losses how far it may go.

    At t it is min (1 + rate t / step_size), or with `lr_range_test_staircase` in whole steps (Smith, arXiv 1506.01186).
    `last_epoch` is what DeepSpeed calls `last_batch_iteration`. Raises ConfigError for an argument out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: float = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        remember_initial_lr(optimizer)
        self.min_lrs = per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _positive("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = _not_negative("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Each group's lr for the next optimizer step."""
        steps = self.last_epoch / self.step_size
        return [low * (1.0 + self.step_rate * (math.floor(steps) if self.staircase else steps)) for low in self.min_lrs]


def _positive(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} is {value!r}; expected a number of steps above 0.")
    return value


def _not_negative(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not value >= 0:
        raise ConfigError(f"{name} is {value!r}; expected a number of 0 or more.")
    return value
