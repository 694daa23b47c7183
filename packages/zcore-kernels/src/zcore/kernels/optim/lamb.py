"""LAMB (arXiv 1904.00962, algorithm 2), in two passes over each parameter; its settings are torch.optim.AdamW's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.kernels.optim.flat_optimizer import FlatOptimizer, Params, Pieces, StateDtype, check_averages

__all__ = ["LAMB"]


class LAMB(FlatOptimizer):
    """Adam's step for each parameter, scaled to the norm of the parameter; for very large batches.

    The scale, norm of the parameter over norm of its step, is held between `min_coeff` and `max_coeff`, and is 1 where
    either norm is 0. Parameters have to be whole.
    """

    is_elementwise: ClassVar[bool] = False
    signs: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        maximize: bool = False,
        state_dtype: StateDtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """See `FlatOptimizer`."""
        min_coeff, max_coeff = group["min_coeff"], group["max_coeff"]
        check_averages(
            "LAMB", **{name: group[name] for name in ("betas", "lr", "eps", "weight_decay", "min_coeff", "max_coeff")}
        )
        if min_coeff > max_coeff:
            raise ConfigError(f"LAMB: min_coeff is {min_coeff:g}, above max_coeff, {max_coeff:g}.")

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """See `FlatOptimizer`."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        corrects = group["bias_correction"]
        shared = {
            "exp_avg_scales": pieces.states["exp_avg_scale"],
            "exp_avg_sq_scales": pieces.states["exp_avg_sq_scale"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "bias_correction1": 1.0 - beta1**pieces.step if corrects else 1.0,
            "bias_correction2": 1.0 - beta2**pieces.step if corrects else 1.0,
        }
        averages = pieces.states["exp_avg"], pieces.states["exp_avg_sq"]
        squares = pieces.call(
            "lamb_average",
            pieces.grads,
            *averages,
            beta1=beta1,
            beta2=beta2,
            grad_factor=-1.0 if group["maximize"] else 1.0,
            **shared,
        )
        of_param, of_update = squares.sqrt().unbind(1)
        ratios = (of_param / of_update).clamp(group["min_coeff"], group["max_coeff"])
        ratios = torch.where((of_param > 0) & (of_update > 0), ratios, 1.0)
        pieces.call("lamb_apply", *averages, ratios=ratios, lr=float(group["lr"]), **shared)
