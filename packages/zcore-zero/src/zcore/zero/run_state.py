"""What a run consists of, for a checkpoint: tensors, plain data, and the facts that another run must share to load it.

tensors   master/<parameter>, optimizer/<parameter>/<state>, buffer/<name>, random/<generator>
plain     parameter groups, optimizer states that are numbers, the schedule, Python's random state
facts     ranks, stage, parameters, layout: compared before anything is loaded
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zcore.core.device import restore_random_state, take_random_state
from zcore.core.errors import CheckpointError
from zcore.zero.agreement import differences
from zcore.zero.sharding import Sharding

__all__ = ["RunState"]

RANDOM = "random/"
WAYS = frozenset({"capturable", "differentiable", "foreach", "fused"})  # in which torch's optimizers may compute


@dataclass(frozen=True, slots=True)
class RunState:
    """This rank's part of a run. What is read or written here is a rank's own; nothing communicates."""

    model: nn.Module
    sharding: Sharding
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def facts(self) -> dict[str, Any]:
        """What a run must share with a checkpoint."""
        plans = [bucket.plan for bucket in self.sharding.buckets]
        return {
            "data-parallel ranks": self.sharding.dp.size,
            "ranks that share one copy": self.sharding.dp.shard_size,
            "ZeRO stage": self.sharding.zero_stage,
            "parameters": {spec.fqn: f"{list(spec.shape)}" for plan in plans for spec in plan.params},
            "layout of bucket": {plan.name: [plan.layout.slice_numel, len(plan.params)] for plan in plans},
        }

    def tensors(self) -> dict[str, Tensor]:
        """This rank's tensors; cloned, since safetensors refuses tensors that share memory."""
        tensors: dict[str, Tensor] = {}
        masters = self.sharding.masters
        for name, fragment in self.sharding.fragments.items():
            tensors[f"master/{name}"] = masters[name].clone()
            for key, value in self._state_of(fragment).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value.detach().clone().contiguous()
        for name, buffer in _buffers(self.model):
            tensors[f"buffer/{name}"] = buffer.detach().clone().contiguous()
        for name, state in take_random_state(self.sharding.device).items():
            tensors[RANDOM + name] = state
        return tensors

    def plain(self) -> dict[str, Any]:
        """Everything else, as JSON data."""
        version, internal, gauss = random.getstate()
        return {
            "kinds": self._kinds(),
            "groups": [] if self.optimizer is None else [_hyper(group) for group in self.optimizer.param_groups],
            "optimizer": {
                name: {key: value for key, value in self._state_of(fragment).items() if not isinstance(value, Tensor)}
                for name, fragment in self.sharding.fragments.items()
            },
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "python_random": [version, list(internal), gauss],
        }

    def check_facts(self, saved: Mapping[str, Any], source: str) -> None:
        """Raise CheckpointError unless `saved` are the facts of this run."""
        here = self.facts()
        first = next(differences({key: saved.get(key) for key in here}, here, path=""), None)
        if first is not None:
            fact, there, own = first
            raise CheckpointError(
                f"{source} was saved with {fact} {there}, and this run has {own}. A checkpoint loads into the same "
                "model, stage, bucket settings and number of ranks; start the run as it was."
            )

    def check_contents(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], source: str) -> None:
        """Raise CheckpointError unless all that this run needs is there, in the shapes and dtypes it has."""
        buffers = dict(_buffers(self.model))
        expected = [f"master/{name}" for name in self.sharding.fragments] + [f"buffer/{name}" for name in buffers]
        if missing := [name for name in expected if name not in tensors]:
            raise CheckpointError(
                f"{source} lacks {missing[0]} and {len(missing) - 1} more tensors that this model has. Load it into "
                "the model it was saved from."
            )
        here = {f"master/{name}": master for name, master in self.sharding.masters.items()}
        here |= {f"buffer/{name}": buffer for name, buffer in buffers.items()}
        for name, own in here.items():
            saved = tensors[name]
            if (saved.shape, saved.dtype) != (own.shape, own.dtype):
                raise CheckpointError(
                    f"{source} holds {name} as {list(saved.shape)} {saved.dtype} on this rank; the model has "
                    f"{list(own.shape)} {own.dtype}. Load it into the model and precision it was saved from."
                )
        if self.optimizer is None:
            return  # it evaluates, whatever trained the weights
        for kind, own_kind in self._kinds().items():
            if plain["kinds"][kind] != own_kind:
                raise CheckpointError(
                    f"{source} was saved with {kind} {plain['kinds'][kind]!r}, and this run has {own_kind!r}. Start "
                    "the run as it was."
                )

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Take over what `check_contents` has accepted."""
        with torch.no_grad():
            for name, master in self.sharding.masters.items():
                master.copy_(tensors[f"master/{name}"])
            for name, buffer in _buffers(self.model):
                buffer.copy_(tensors[f"buffer/{name}"])
        self.sharding.note_update()
        states = {name.removeprefix(RANDOM): value for name, value in tensors.items() if name.startswith(RANDOM)}
        restore_random_state(states, self.sharding.device)
        version, internal, gauss = plain["python_random"]
        random.setstate((version, tuple(internal), gauss))
        if self.optimizer is not None:
            self._restore_optimizer(self.optimizer, tensors, plain)
        if self.lr_scheduler is not None and plain["lr_scheduler"] is not None:
            now = self.lr_scheduler.state_dict()
            self.lr_scheduler.load_state_dict({k: _like(now.get(k), v) for k, v in plain["lr_scheduler"].items()})

    def _restore_optimizer(
        self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
    ) -> None:
        fragments = self.sharding.fragments
        optimizer.state.clear()
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                name, _, state = rest.rpartition("/")
                on_device = value if value.dim() == 0 else value.to(self.sharding.device)
                optimizer.state[fragments[name]][state] = on_device
        for name, numbers in plain["optimizer"].items():
            if numbers:
                optimizer.state[fragments[name]].update(numbers)
        for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
            for key, value in saved.items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value

    def _kinds(self) -> dict[str, Any]:
        return {
            "optimizer": type(self.optimizer).__name__,
            "number of parameter groups": 0 if self.optimizer is None else len(self.optimizer.param_groups),
            "learning-rate schedule": type(self.lr_scheduler).__name__,
        }

    def _state_of(self, fragment: Tensor) -> Mapping[str, Any]:
        return {} if self.optimizer is None else self.optimizer.state.get(fragment, {})


def _like(now: Any, saved: Any) -> Any:
    """What JSON made of a value, in the type that the run has: tuples, and counters with numbers as keys."""
    if isinstance(now, tuple):
        return tuple(saved)
    if isinstance(now, dict) and isinstance(saved, dict) and all(isinstance(key, int) for key in now):
        return type(now)({int(key): value for key, value in saved.items()})
    return saved


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    """Its settings, but for how they are computed, which a run that continues may have another way."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in {"params", *WAYS}
    }


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield (f"{name}.{key}" if name else key), buffer
