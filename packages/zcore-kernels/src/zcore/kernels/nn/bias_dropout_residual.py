"""residual + dropout(x + bias) as a layer, which draws a new mask for each call while it trains."""

import torch
from torch import Tensor, nn

from zcore.kernels.nn.serving import serving
from zcore.kernels.ops.bias_dropout_residual import reference

__all__ = ["BiasDropoutResidual"]


class BiasDropoutResidual(nn.Module):
    """torch.nn.Dropout between a projection, whose bias is added here, and the residual stream."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """x, residual: [..., hidden]; bias: [hidden], or none. The mask's seed comes from torch's global generator."""
        seed = torch.randint(2**62, (1,)) if self.training else torch.zeros(1, dtype=torch.int64)
        serve = serving("bias_dropout_residual", reference, x)
        out: Tensor = serve(x.contiguous(), bias, residual.contiguous(), seed, self.p if self.training else 0.0)
        return out

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        return f"p={self.p}"
