"""The orthogonal matrix nearest to a given one, about, by a Newton-Schulz iteration: products only, in bf16.

Jordan et al., Muon (kellerjordan.github.io/posts/muon), with its quintic; torch.optim.Muon has the same, to the bit.
"""

import torch
from torch import Tensor

from zcore.core import ops

__all__ = ["COEFFICIENTS", "newton_schulz"]

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # steepest at zero, so that 5 steps bring singular values into 0.7 to 1.2


@ops.reference("newton_schulz")
def newton_schulz(
    matrix: Tensor, *, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """`matrix` (rows, columns), any floating dtype, with its singular values moved to about 1; bf16."""
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(torch.bfloat16, copy=True)
    x = x.T if is_tall else x
    x = x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
