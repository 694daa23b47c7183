"""residual + dropout(x + bias) as a layer, which draws a new mask for each call while it trains."""

import torch
from torch import Tensor, nn

from zcore.core.errors import ConfigError
from zcore.kernels.nn.serving import alike, serving
from zcore.kernels.ops.bias_dropout_residual import reference

__all__ = ["BiasDropoutResidual"]


class BiasDropoutResidual(nn.Module):
    """torch.nn.Dropout between a projection, whose bias is added here, and the residual stream.

    Raises ConfigError for a `p` that is no probability.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"BiasDropoutResidual: p is {p}; expected a probability, 0 to 1.")
        self.p = p

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """x, residual: [..., hidden]; bias: [hidden], or none. The mask's seed comes from torch's global generator.

        Of two dtypes the sum has the wider. Raises ConfigError for integers.
        """
        seed = torch.randint(2**62, (1,)) if self.training else torch.zeros(1, dtype=torch.int64)
        x, residual = alike(x, residual)
        serve = serving("bias_dropout_residual", reference, x)
        out: Tensor = serve(x, bias, residual, seed, self.p if self.training else 0.0)
        return out

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        return f"p={self.p}"
