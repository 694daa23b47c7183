"""AdamW with torch.optim.AdamW's signature (arXiv 1711.05101, algorithm 2): Adam whose weight decay is decoupled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.kernels.optim.adam import Adam
from zcore.kernels.optim.flat_optimizer import Params, StateDtype

__all__ = ["AdamW"]


class AdamW(Adam):
    """Stands in for torch.optim.AdamW: the same groups, schedulers, states and state_dict. No `amsgrad`.

    `foreach` and `fused` change nothing here; `amsgrad`, `capturable` and `differentiable` are not served.
    """

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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
        )

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """See `FlatOptimizer`."""
        super().check_settings(group)
        if not group["decoupled_weight_decay"] and group["weight_decay"]:
            raise ConfigError(
                "AdamW: the group has decoupled_weight_decay=False, of torch.optim.Adam; expected that of AdamW. "
                "Set weight_decay to 0, or take zcore.kernels.optim.Adam."
            )

    def is_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Always, whatever a loaded group says."""
        return True
