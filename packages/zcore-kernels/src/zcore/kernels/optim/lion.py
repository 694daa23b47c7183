"""Lion (arXiv 2302.06675, algorithm 2), in one pass over each parameter; its settings are named as torch's are."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zcore.kernels.optim.flat_optimizer import FlatOptimizer, Params, Pieces, StateDtype, check_averages

__all__ = ["Lion"]


class Lion(FlatOptimizer):
    """Steps of the sign of an average: one state. Rates are 3 to 10 times smaller than AdamW's."""

    signs: ClassVar[Mapping[str, bool]] = {"exp_avg": True}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: StateDtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """See `FlatOptimizer`."""
        check_averages("Lion", **{name: group[name] for name in ("betas", "lr", "weight_decay")})

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """See `FlatOptimizer`."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        pieces.call(
            "lion_step",
            pieces.grads,
            pieces.states["exp_avg"],
            exp_avg_scales=pieces.states["exp_avg_scale"],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            grad_factor=-1.0 if group["maximize"] else 1.0,
        )
