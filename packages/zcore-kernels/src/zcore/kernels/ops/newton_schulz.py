"""The orthogonal matrix nearest to a given one, about, by a Newton-Schulz iteration: products only, in bf16.

    x <- a x + (b (x x^T) + c (x x^T)^2) x        from x = matrix / |matrix|, tall ones transposed

Jordan et al., Muon (kellerjordan.github.io/posts/muon). On the CPU torch serves; on CUDA Triton, which computes half of
each symmetric product. It has no gradient: an optimizer calls it.
"""

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.triton.loading import deferred, offer

__all__ = ["newton_schulz", "reference"]

OP = "newton_schulz"
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # steepest at zero, so that 5 steps bring singular values into 0.7 to 1.2

_by_triton = deferred("newton_schulz", OP)


def reference(
    matrix: Tensor, *, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """`matrix` (rows, columns), any floating dtype, with its singular values moved to about 1; bf16.

    Raises LayoutError and ConfigError for what is no matrix of floats.
    """
    _check(matrix)
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(torch.bfloat16, copy=True)
    x = x.T if is_tall else x
    x = x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def newton_schulz(
    matrix: Tensor, *, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """See `reference`; by Triton, for a matrix of fp32, bf16 or fp16. Raises NotInstalledError where it is missing."""
    _check(matrix)
    found: Tensor = _by_triton(matrix, steps=steps, coefficients=coefficients, eps=eps)
    return found


def _check(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise LayoutError(f"{OP} got a {type(matrix).__name__}; expected one matrix, a tensor [rows, columns].")
    if matrix.ndim != 2:
        raise LayoutError(
            f"{OP} got a tensor of shape {tuple(matrix.shape)}; expected a matrix, [rows, columns]. Call it for each "
            "of several, and flatten what has more dimensions."
        )
    if not matrix.is_floating_point():
        raise ConfigError(f"{OP}: the matrix is {matrix.dtype}; expected a floating-point dtype. Convert it.")


# The reference is the op's where its user has not registered one; a user imported later replaces it.
if all(known.source != "reference" for known in ops.implementations().get(OP, ())):
    ops.reference(OP)(reference)
offer(OP, newton_schulz)
