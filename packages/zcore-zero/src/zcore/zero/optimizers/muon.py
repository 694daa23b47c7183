"""Muon: momentum, made orthogonal, for the matrices of hidden layers; AdamW for all else.

Jordan et al. (kellerjordan.github.io/posts/muon); as an optimizer of language models Liu et al., arXiv 2502.16982.
Momentum is kept in parts, like any state. Its orthogonal form needs the whole matrix: `spread.py` has every rank make
that for its share of the matrices.
"""

from collections.abc import Callable, Iterable, Mapping
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError
from zcore.zero.optimizers.newton_schulz import COEFFICIENTS
from zcore.zero.optimizers.settings import check_settings
from zcore.zero.optimizers.spread import on_whole_matrices
from zcore.zero.optimizers.stepped import evaluate, gradient_of, parts_of, values_of, zeros_for
from zcore.zero.parts import Parts

__all__ = ["Muon"]

ADJUST = {
    "original": lambda rows, columns: sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
}


class Muon(torch.optim.Optimizer):
    """Parameters may be whole or fragments; every rank steps together.

    A group steps by Muon or by AdamW as its `use_muon` says. One that does not say is split: by Muon go parameters of
    two dimensions and more; of a sharded model not embeddings, nor what has an embedding's shape outside of the blocks.
    The attribute `use_muon` of a parameter, before sharding, decides otherwise. More than two dimensions, as of a
    convolution, are taken as a matrix of the first by all others.

    lr: of both kinds, unless `muon_lr` or `adam_lr` is given. weight_decay is decoupled in both. momentum, nesterov,
    ns_steps, ns_coefficients and adjust_lr ("original" or "match_rms_adamw") are as of torch.optim.Muon, whose steps
    are these to the bit; betas and eps are AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        adjust_lr: str = "original",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        if adjust_lr not in ADJUST:
            raise ConfigError(f"Muon: adjust_lr is {adjust_lr!r}; expected one of {', '.join(ADJUST)}.")
        muon = {
            "lr": lr if muon_lr is None else muon_lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": tuple(ns_coefficients),
            "adjust_lr": adjust_lr,
        }
        adam: dict[str, Any] = {
            "lr": lr if adam_lr is None else adam_lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "fused": fused,
        }
        for kind in (muon, adam):
            check_settings("Muon", {key: value for key, value in kind.items() if key != "ns_coefficients"})
        self._settings = {True: muon, False: {"lr": adam["lr"], "weight_decay": weight_decay}}  # of groups, by kind
        super().__init__(list(_split(params)), {"use_muon": True})
        self._adamw = torch.optim.AdamW(_others(self.param_groups) or [{"params": []}], **adam)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs, beyond what torch's optimizers say of themselves."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_settings": self._settings, "_adamw": self._adamw}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Step more parameters, by what the optimizer was built with where the group does not say otherwise."""
        for group in _split([param_group]):
            super().add_param_group({**self._settings[group["use_muon"]], **group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = evaluate(closure)
        self._adamw.param_groups, self._adamw.state = _others(self.param_groups), self.state
        for group in self._adamw.param_groups:  # one that was added since
            group.update({key: value for key, value in self._adamw.defaults.items() if key not in group})
        self._adamw.step()
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_place: dict[tuple[int, torch.device], tuple[list[Tensor], list[Parts]]] = {}
        for param in group["params"]:
            if gradient_of(param) is not None:
                parts = _as_matrix(parts_of(param))
                params, places = by_place.setdefault((id(parts.groups), param.device), ([], []))
                params.append(param)
                places.append(parts)
        for (_, device), (params, places) in by_place.items():
            self._step_together(group, params, places, device)

    def _step_together(
        self, group: dict[str, Any], params: list[Tensor], places: list[Parts], device: torch.device
    ) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        orthogonal = ops.get("newton_schulz", device=device, dtype=torch.bfloat16)

        def direction(index: int) -> Tensor:
            grad, state = gradient_of(params[index]), self.state[params[index]]
            assert grad is not None
            average = state["momentum_buffer"].view(-1)
            return (grad.lerp(average, momentum) if group["nesterov"] else average).to(torch.bfloat16)

        def nearest_orthogonal(matrix: Tensor) -> Tensor:
            result: Tensor = orthogonal(matrix, steps=group["ns_steps"], coefficients=tuple(group["ns_coefficients"]))
            return result

        for param in params:
            grad, state = gradient_of(param), self.state[param]
            assert grad is not None
            if not state:
                state["momentum_buffer"] = zeros_for(param)
            state["momentum_buffer"].view(-1).lerp_(grad, 1.0 - momentum)
        updates = on_whole_matrices(direction, places, nearest_orthogonal, dtype=torch.bfloat16, device=device)
        for index, update in updates:
            rate = lr * ADJUST[group["adjust_lr"]](*places[index].shape)
            values_of(params[index]).mul_(1.0 - lr * group["weight_decay"]).add_(update, alpha=-rate)


def _split(params: Any) -> Iterable[dict[str, Any]]:
    """The groups, each of them for Muon or for AdamW."""
    listed = [each[1] if isinstance(each, tuple) else each for each in params]
    groups = listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "use_muon" in group:
            if group["use_muon"] and (wrong := [tuple(each.shape) for each in members if each.ndim < 2]):
                raise ConfigError(
                    f"Muon: a group with use_muon has a parameter of shape {wrong[0]}, which is no matrix. Put it into "
                    "a group with use_muon: false, which AdamW steps."
                )
            yield {**group, "params": members}
            continue
        for use_muon in (True, False):
            chosen = [each for each in members if getattr(each, "use_muon", each.ndim >= 2) == use_muon]
            if chosen or (not members and not use_muon):
                yield {**group, "params": chosen, "use_muon": use_muon}


def _others(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if not group["use_muon"]]


def _as_matrix(parts: Parts) -> Parts:
    shape = parts.shape if len(parts.shape) == 2 else (parts.shape[0], prod(parts.shape[1:]))
    return Parts(shape, parts.ranges, parts.counted, parts.groups)
