"""SGD with torch.optim.SGD's signature, in one pass over each parameter."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.kernels.optim.flat_optimizer import FlatOptimizer, Params, Pieces, StateDtype, check_averages

__all__ = ["SGD"]


class SGD(FlatOptimizer):
    """Stands in for torch.optim.SGD. Without momentum it has no state of each element.

    `foreach` and `fused` change nothing here; `differentiable` is not served.
    """

    signs: ClassVar[Mapping[str, bool]] = {"momentum_buffer": True}

    def __init__(  # noqa: PLR0917 - torch's signature
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """See `FlatOptimizer`."""
        momentum, dampening = group["momentum"], group["dampening"]
        check_averages("SGD", lr=group["lr"], momentum=momentum, weight_decay=group["weight_decay"])
        if group["nesterov"] and (momentum <= 0.0 or dampening != 0.0):
            raise ConfigError(
                f"SGD: nesterov with {momentum=} and {dampening=}; expected a momentum above 0 and no dampening."
            )

    def states_of(self, group: Mapping[str, Any]) -> Iterable[str]:
        """See `FlatOptimizer`."""
        return self.signs if group["momentum"] else ()

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """See `FlatOptimizer`."""
        pieces.call(
            "sgd_step",
            pieces.grads,
            pieces.states["momentum_buffer"],
            momentum_buffer_scales=pieces.states["momentum_buffer_scale"],
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            is_nesterov=group["nesterov"],
            is_first=pieces.is_first,
            grad_factor=-1.0 if group["maximize"] else 1.0,
        )
