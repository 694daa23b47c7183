"""Lion: one state for each element, and steps of the sign of its mix with the gradient.

Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, algorithm 2.
"""

from collections.abc import Callable
from typing import Any

import torch

from zcore.zero.optimizers.settings import check_settings
from zcore.zero.optimizers.stepped import evaluate, gradient_of, values_of, zeros_for

__all__ = ["Lion"]


class Lion(torch.optim.Optimizer):
    """Element-wise, so that parameters may be whole or fragments. Rates are 3 to 10 times smaller than AdamW's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        check_settings("Lion", defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = evaluate(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            for param in group["params"]:
                grad = gradient_of(param)
                if grad is None:
                    continue
                values, state = values_of(param), self.state[param]
                if not state:
                    state["exp_avg"] = zeros_for(param)
                average = state["exp_avg"].view(-1)
                update = average.lerp(grad, 1.0 - beta1).sign_()
                values.mul_(1.0 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                average.lerp_(grad, 1.0 - beta2)
        return loss
