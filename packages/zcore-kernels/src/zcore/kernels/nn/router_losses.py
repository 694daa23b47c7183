"""What is added to a loss so that a router uses its experts evenly and keeps its logits small; plain torch.

Both are without their factors: 0.01 and 0.001 in the papers. Tokens that do not count, as those of padding, are left
out by whoever calls: `load_balancing_loss(logits[mask], experts[mask])`.
"""

import torch
from torch import Tensor

__all__ = ["load_balancing_loss", "router_z_loss"]


def load_balancing_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """num_experts * sum over experts of its share of choices times its mean probability (arXiv 2101.03961, eq. 4).

    logits: [tokens, num_experts], of a softmax; experts: [tokens, k] int64, as `topk_gate` returns them (with k = 2 the
    loss of GShard, arXiv 2006.16668). An fp32 scalar, 1 where both are even, `num_experts` where all choose one; the
    gradient passes through probabilities alone. Hugging Face counts choices by token, and has k times as much.

    >>> load_balancing_loss(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))
    tensor(1.)
    """
    num_experts = logits.shape[-1]
    choices = experts.new_zeros(num_experts).scatter_add_(0, experts.flatten(), torch.ones_like(experts.flatten()))
    share = choices / max(experts.numel(), 1)
    probability = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).sum(0)
    return num_experts * (share * probability).sum() / max(len(logits), 1)


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean over tokens of log(sum(exp(logits)))^2 (arXiv 2202.08906, eq. 5); logits: [tokens, num_experts].

    An fp32 scalar, 0 without tokens.

    >>> router_z_loss(torch.zeros(3, 1))
    tensor(0.)
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1).square().sum() / max(len(logits), 1)
