"""Adagrad with torch.optim.Adagrad's signature (Duchi et al., 2011), in one pass over each parameter."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zcore.kernels.optim.flat_optimizer import FlatOptimizer, Params, Pieces, StateDtype, check_averages

__all__ = ["Adagrad"]


class Adagrad(FlatOptimizer):
    """Stands in for torch.optim.Adagrad, for dense gradients; as there, its states are made when it is, but for "8bit".

    `foreach` and `fused` change nothing here; `differentiable` is not served.
    The sum of squares only grows, so "8bit" loses late gradients that are small beside it; see the op.
    """

    signs: ClassVar[Mapping[str, bool]] = {"sum": False}

    def __init__(  # noqa: PLR0917 - torch's signature
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["state_dtype"] == "8bit":
                continue  # at the first step: scales cannot be cut with parameters that are sharded before it
            for param in group["params"]:
                self._begin(param, group)

    def share_memory(self) -> None:
        """Move the states to memory that processes share, as torch.optim.Adagrad does."""
        for group in self.param_groups:
            for param in group["params"]:
                for value in self._begin(param, group).values():
                    value.share_memory_()

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """See `FlatOptimizer`."""
        names = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
        check_averages("Adagrad", **{name: group[name] for name in names})

    def initial(self, group: Mapping[str, Any]) -> float:
        """See `FlatOptimizer`."""
        return float(group["initial_accumulator_value"])

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """See `FlatOptimizer`."""
        pieces.call(
            "adagrad_step",
            pieces.grads,
            pieces.states["sum"],
            sum_scales=pieces.states["sum_scale"],
            lr=float(group["lr"]) / (1.0 + (pieces.step - 1) * group["lr_decay"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_factor=-1.0 if group["maximize"] else 1.0,
        )
