"""Cross-entropy of rows of logits, which its gradient overwrites: what is done to one chunk of a linear cross-entropy.

    capped = cap * tanh(logits / cap)          where there is a cap       [Gemma 2, arXiv 2408.00118]
    lse    = logsumexp(capped)
    loss   = lse - (1 - smoothing) * capped[target] - smoothing * mean(capped) + z_loss * lse^2       [arXiv 2204.02311]
    logits <- (softmax(capped) * (1 + 2 z_loss lse) - (1 - smoothing) * onehot(target) - smoothing / vocabulary)
              * (1 - (capped / cap)^2) * factor

A row whose target is the ignored index has the loss 0 and the gradient 0. Here in plain torch; the same for a GPU is in
zcore.kernels.triton.cross_entropy_rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowSettings", "cross_entropy_rows"]

# Elements computed at once, in fp32: 1 MiB, which the L2 cache of a core holds, so that only the first pass over a
# block and the last one reach memory. In 8 rows of 49152 at a time all passes took 0.2 s of 4.4 s with the products.
BLOCK_NUMEL = 1 << 18


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What the loss of a row is made of."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_softcap: float | None


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, factors: Tensor | None, settings: RowSettings, *, writes_gradient: bool
) -> Tensor:
    """The losses, [rows], in fp32 at least; with `writes_gradient` the gradient overwrites `logits`.

    logits: [rows, vocabulary]; targets: [rows] int64; factors: [rows], of the gradient alone, or none for ones.
    """
    rows, vocabulary = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(rows, dtype=wide, device=logits.device)
    step = max(1, BLOCK_NUMEL // max(1, vocabulary))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        is_kept = targets[block] != settings.ignore_index
        weights = is_kept.to(wide)
        if factors is not None:
            weights = torch.where(is_kept, factors[block].to(wide), weights)
        found, gradient = _losses_and_gradient(
            logits[block].to(wide), targets[block].where(is_kept, 0), weights, settings, writes_gradient
        )
        losses[block] = found.where(is_kept, 0.0)
        if gradient is not None:
            logits[block] = gradient
    return losses


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor, settings: RowSettings, writes_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Of wide logits, which stay; the gradient of a row is scaled by its weight."""
    smoothing, cap, z_loss = settings.label_smoothing, settings.logit_softcap, settings.z_loss
    at = targets.unsqueeze(1)
    ratio = None if cap is None else torch.tanh(logits / cap)
    capped = logits if ratio is None or cap is None else ratio * cap
    log_p = torch.log_softmax(capped, -1)
    losses = log_p.gather(1, at).squeeze(1).mul_(smoothing - 1.0)
    if smoothing:
        losses -= log_p.mean(-1) * smoothing
    of_p = weights
    if z_loss:
        lse = torch.logsumexp(capped, -1)
        losses += lse.square() * z_loss
        of_p = weights * (1.0 + 2.0 * z_loss * lse)
    if not writes_gradient:
        return losses, None
    gradient = log_p.exp_().mul_(of_p.unsqueeze(1))
    if smoothing:
        gradient -= weights.unsqueeze(1) * (smoothing / logits.shape[1])
    gradient.scatter_add_(1, at, weights.unsqueeze(1) * (smoothing - 1.0))
    if ratio is not None:
        gradient.mul_(ratio.square_().neg_().add_(1.0))
    return losses, gradient
