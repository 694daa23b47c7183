"""gelu(x + bias) as a layer, for a projection whose bias is added here instead."""

from torch import Tensor, nn

from zcore.kernels.nn.serving import serving
from zcore.kernels.ops.bias_gelu import reference

__all__ = ["BiasGELU"]


class BiasGELU(nn.Module):
    """torch.nn.GELU, of the sum with a bias that the caller owns."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., hidden]; bias: [hidden], or none."""
        found: Tensor = serving("bias_gelu", reference, x)(x.contiguous(), bias, self.approximate)
        return found

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        return f"approximate={self.approximate!r}"
