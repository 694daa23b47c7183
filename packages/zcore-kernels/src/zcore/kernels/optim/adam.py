"""Adam with torch.optim.Adam's signature (arXiv 1412.6980, algorithm 1), in one pass over each parameter."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zcore.kernels.optim.flat_optimizer import FlatOptimizer, Params, Pieces, StateDtype, check_averages

__all__ = ["Adam"]


class Adam(FlatOptimizer):
    """Stands in for torch.optim.Adam: the same groups, schedulers, states and state_dict. No `amsgrad`.

    `weight_decay` is L2, added to the gradient, unless `decoupled_weight_decay` makes it AdamW's. `foreach` and `fused`
    change nothing here; `amsgrad`, `capturable` and `differentiable` are not served.
    """

    signs: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(  # noqa: PLR0917 - torch's signature
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: StateDtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """See `FlatOptimizer`."""
        names = ("betas", "lr", "eps", "weight_decay")
        check_averages(type(self).__name__, **{name: group[name] for name in names})

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """See `FlatOptimizer`."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        pieces.call(
            "adamw_step",
            pieces.grads,
            pieces.states["exp_avg"],
            pieces.states["exp_avg_sq"],
            exp_avg_scales=pieces.states["exp_avg_scale"],
            exp_avg_sq_scales=pieces.states["exp_avg_sq_scale"],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction1=1.0 - beta1**pieces.step,
            bias_correction2=1.0 - beta2**pieces.step,
            grad_factor=-1.0 if group["maximize"] else 1.0,
            is_decoupled=self.is_decoupled(group),
        )

    def is_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether weight decay leaves the averages alone."""
        return bool(group["decoupled_weight_decay"])
