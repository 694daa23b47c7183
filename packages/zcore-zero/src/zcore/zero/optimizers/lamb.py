"""LAMB: Adam's step for each parameter, scaled to the parameter's own norm, for very large batches.

You et al., Large Batch Optimization for Deep Learning, arXiv 1904.00962, algorithm 2. The two norms are of whole
parameters: every rank squares its parts, and one small sum for all parameters goes over the ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.zero.buffer import DataParallelGroups
from zcore.zero.optimizers.settings import check_settings
from zcore.zero.optimizers.stepped import evaluate, gradient_of, parts_of, values_of, zeros_for

__all__ = ["Lamb"]


class Lamb(torch.optim.Optimizer):
    """Parameters may be whole or fragments; every rank steps together.

    The scale, norm of the parameter over norm of its step, is held between `min_coeff` and `max_coeff`, and is 1 where
    either norm is 0.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        check_settings("Lamb", defaults)
        if min_coeff > max_coeff:
            raise ConfigError(f"Lamb: min_coeff is {min_coeff:g}, above max_coeff, {max_coeff:g}.")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = evaluate(closure)
        stepped = list(self._stepped())
        for group, param, grad in stepped:
            self._average(group, param, grad)
        for (group, param, _), coeff in zip(stepped, self._coefficients(stepped), strict=True):
            # Computed a second time: kept from above, the steps of all parameters would be one more state.
            values_of(param).add_(self._direction(group, param), alpha=-float(group["lr"]) * coeff)
        return loss

    def _stepped(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        for group in self.param_groups:
            for param in group["params"]:
                grad = gradient_of(param)
                if grad is not None:
                    yield group, param, grad

    def _average(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state.update(step=0, exp_avg=zeros_for(param), exp_avg_sq=zeros_for(param))
        state["step"] += 1
        state["exp_avg"].view(-1).lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].view(-1).mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)

    def _direction(self, group: dict[str, Any], param: Tensor) -> Tensor:
        """What the parameter goes against, before its scale."""
        state, (beta1, beta2) = self.state[param], group["betas"]
        corrects = group["bias_correction"]
        first, second = (1.0 - beta ** state["step"] if corrects else 1.0 for beta in (beta1, beta2))
        root = (state["exp_avg_sq"].view(-1) / second).sqrt_().add_(group["eps"])
        direction: Tensor = (
            (state["exp_avg"].view(-1) / first).div_(root).add_(values_of(param), alpha=group["weight_decay"])
        )
        return direction

    def _coefficients(self, stepped: list[tuple[dict[str, Any], Tensor, Tensor]]) -> list[float]:
        """The scale of each parameter's step; equal on every rank."""
        squares: dict[int, tuple[DataParallelGroups | None, list[int], list[Tensor]]] = {}
        for index, (group, param, _) in enumerate(stepped):
            parts = parts_of(param)
            _, indices, sums = squares.setdefault(id(parts.groups), (parts.groups, [], []))
            indices.append(index)
            for each in (values_of(param), self._direction(group, param)):
                sums.append(each[parts.counted].double().square().sum())
        coefficients = [1.0] * len(stepped)
        for groups, indices, sums in squares.values():
            flat = torch.stack(sums)
            if groups is not None:
                groups.all_reduce(flat, label="norms of LAMB")
            for index, (of_param, of_step) in zip(indices, flat.sqrt().view(-1, 2).tolist(), strict=True):
                if of_param and of_step:
                    group = stepped[index][0]
                    coefficients[index] = min(max(of_param / of_step, group["min_coeff"]), group["max_coeff"])
        return coefficients
