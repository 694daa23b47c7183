"""The router of a mixture of experts as a layer (arXiv 1701.06538): a projection, and the gate over it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.kernels.nn.serving import serving
from zcore.kernels.ops.topk_gate import reference

__all__ = ["Routing", "TopKRouter"]


class Routing(NamedTuple):
    """Where tokens go; the first two are what `ExpertMLPs` takes, the last what the losses of routers do."""

    weights: Tensor  # [tokens, k] fp32
    experts: Tensor  # [tokens, k] int64, best first
    logits: Tensor  # [tokens, num_experts]


class TopKRouter(nn.Module):
    """Chooses `k` of `num_experts` for each token; the weight, [num_experts, hidden], starts as nn.Linear's does."""

    def __init__(
        self,
        hidden: int,
        *,
        num_experts: int,
        k: int,
        scoring: str = "softmax",  # or "sigmoid"
        normalise: bool = True,  # weights of a token to a sum of 1
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.k, self.scoring, self.normalise = k, scoring, normalise
        bound = hidden**-0.5 if hidden else 0.0
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype).uniform_(-bound, bound))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Routing:
        """x: [..., hidden]; bias: [num_experts], which moves the choice alone (arXiv 2412.19437, sec. 2.1.2)."""
        logits = functional.linear(x.flatten(0, -2), self.weight)
        serve = serving("topk_gate", reference, logits)
        weights, experts = serve(logits, self.k, self.scoring, self.normalise, bias)
        return Routing(weights, experts, logits)

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        num_experts, hidden = self.weight.shape
        return f"{hidden}, {num_experts=}, k={self.k}, scoring={self.scoring!r}, normalise={self.normalise}"
