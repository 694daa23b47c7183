"""AdamW with torch.optim.AdamW's signature (arXiv 1711.05101), in one pass over each parameter."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zcore.kernels.optim.flat_optimizer import FlatOptimizer, Params, Pieces, StateDtype, check_averages, refuse

__all__ = ["AdamW"]


class AdamW(FlatOptimizer):
    """Stands in for torch.optim.AdamW: the same groups, schedulers, states and state_dict. No `amsgrad`."""

    signs: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(  # noqa: PLR0917 - torch's signature
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = torch.float32,
    ) -> None:
        refuse(
            "AdamW", amsgrad=amsgrad, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused
        )
        check_averages("AdamW", betas=betas, lr=lr, eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": False,
            "maximize": maximize,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

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
        )
