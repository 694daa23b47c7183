"""LayerNorm as a layer (arXiv 1607.06450), which may add a residual first."""

from typing import overload

import torch
from torch import Tensor, nn

from zcore.kernels.nn.serving import alike, serving
from zcore.kernels.ops.layer_norm import reference, reference_residual

__all__ = ["LayerNorm"]


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last dimension."""

    def __init__(
        self,
        hidden: int,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden, self.eps = hidden, eps
        weight = torch.ones(hidden, device=device, dtype=dtype) if elementwise_affine else None
        shift = torch.zeros(hidden, device=device, dtype=dtype) if elementwise_affine and bias else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if shift is None else nn.Parameter(shift))

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
            found = serving("layer_norm", reference, x)(x.contiguous(), self.weight, self.bias, self.eps)
        else:
            x, residual = alike(x, residual)
            serve = serving("layer_norm_residual", reference_residual, x)
            found = serve(x, residual, self.weight, self.bias, self.eps)
        return found

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        return f"{self.hidden}, eps={self.eps}"
