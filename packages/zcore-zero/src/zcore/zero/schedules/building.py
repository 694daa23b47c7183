"""The schedule that a configuration asks for by name: zcore's own, which follow DeepSpeed's, or torch's."""

from collections.abc import Iterable, Mapping
from inspect import isclass, signature
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zcore.core.errors import ConfigError, nearest
from zcore.zero.schedules.cycles import LRRangeTest, OneCycle
from zcore.zero.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = ["build_scheduler", "of_metric"]

OWN: tuple[type[LRScheduler], ...] = (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
METRIC = "ReduceLROnPlateau"
# They take functions or other schedules.
OF_CODE = frozenset({"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"})


def build_scheduler(name: str, params: Mapping[str, object], optimizer: Optimizer) -> LRScheduler:
    """Make the schedule that a config's `scheduler: {type, params}` asks for.

    `name` is one of `OWN` or any class of `torch.optim.lr_scheduler`; `last_batch_iteration` is read as
    `last_epoch`. Raises ConfigError naming the nearest schedule or parameter when there is none of that name.
    """
    known = _known_schedulers()
    if name in OF_CODE:
        raise ConfigError(
            f"scheduler.type is {name!r}, which takes functions or schedules, and a config has none. Leave the section "
            f"out, and pass `lr_scheduler=lambda optimizer: {name}(optimizer, ...)` to zero.initialize."
        )
    if name == METRIC:
        raise ConfigError(f"scheduler.type is {name!r}. {of_metric()}")
    if name not in known:
        raise ConfigError(
            f"scheduler.type is {name!r}, which is no known schedule.{_suggestion(name, known)} Expected "
            f"{', '.join(cls.__name__ for cls in OWN)} or the name of a class in torch.optim.lr_scheduler."
        )
    arguments: dict[str, Any] = {  # each class checks its own values
        "last_epoch" if key == "last_batch_iteration" else key: value for key, value in params.items()
    }
    parameters = {key: each for key, each in signature(known[name]).parameters.items() if key != "optimizer"}
    accepted = ", ".join(parameters)
    for key in arguments:
        if key not in parameters:
            raise ConfigError(
                f"scheduler.params.{key} is no parameter of {name}.{_suggestion(key, parameters)} It takes: {accepted}."
            )
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in arguments]
    if missing:
        raise ConfigError(f"scheduler.params lacks {', '.join(missing)}, which {name} needs. It takes: {accepted}.")
    try:
        return known[name](optimizer, **arguments)
    except ConfigError:  # one of ours has checked it
        raise
    except (TypeError, ValueError) as error:  # torch met a value that it cannot use
        raise ConfigError(f"scheduler.params do not fit {name}: {error}. It takes: {accepted}.") from error


def of_metric() -> str:
    """Why a schedule of a metric is refused, and what to do."""
    return (
        f"{METRIC} steps by a metric, which an engine does not have. Leave it out, build it yourself over "
        "`engine.optimizer`, call its step(metric) after each evaluation, with the same metric on every rank, and keep "
        "its state_dict() in the `client_state` of checkpoints."
    )


def _known_schedulers() -> dict[str, type[LRScheduler]]:
    torch_schedulers = {
        name: value
        for name, value in vars(torch.optim.lr_scheduler).items()
        if isclass(value) and issubclass(value, LRScheduler) and value is not LRScheduler and not name.startswith("_")
    }
    for name in (METRIC, *OF_CODE):
        torch_schedulers.pop(name, None)
    return torch_schedulers | {cls.__name__: cls for cls in OWN}


def _suggestion(word: str, choices: Iterable[str]) -> str:
    found = nearest(word, choices)
    return f" Did you mean {found}?" if found else ""
