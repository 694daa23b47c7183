"""RMSNorm as a layer (arXiv 1910.07467), which may add a residual first."""

from typing import overload

import torch
from torch import Tensor, nn

from zcore.kernels.nn.serving import alike, serving
from zcore.kernels.ops.rms_norm import reference, reference_residual

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """torch.nn.RMSNorm over the last dimension; `offset` is added to the weight, 1 in Gemma.

    >>> RMSNorm(4)(torch.full((1, 4), 2.0))
    tensor([[1., 1., 1., 1.]], grad_fn=...)
    """

    def __init__(
        self,
        hidden: int,
        *,
        eps: float | None = None,  # that of x's dtype, as torch has it
        offset: float = 0.0,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden, self.eps, self.offset = hidden, eps, offset
        weight = torch.full((hidden,), 1.0 - offset, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of `x`, [..., hidden]; with a residual that of x + residual, and this sum, the next residual.

        Of two dtypes the sum has the wider, and so has its norm. Raises ConfigError for integers.
        """
        found: Tensor | tuple[Tensor, Tensor]
        if residual is None:
            serve = serving("rms_norm", reference, x)
            found = serve(x.contiguous(), self.weight, self._eps(x), self.offset)
        else:
            x, residual = alike(x, residual)
            serve = serving("rms_norm_residual", reference_residual, x)
            found = serve(x, residual, self.weight, self._eps(x), self.offset)
        return found

    def _eps(self, x: Tensor) -> float:
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        return f"{self.hidden}, eps={self.eps}, offset={self.offset}"
