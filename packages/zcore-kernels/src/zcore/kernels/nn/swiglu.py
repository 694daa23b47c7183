"""SwiGLU as a layer (arXiv 2002.05202): silu(gate) * up."""

from torch import Tensor, nn

from zcore.kernels.nn.serving import alike, serving
from zcore.kernels.ops.swiglu import reference, reference_packed

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """What lies between the projections of a gated MLP: of gate and up, or of both in one tensor, gate first."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """gate, up: [..., hidden]; without `up`, gate is [..., 2 hidden] and holds both.

        Of two dtypes the product has the wider. Raises ConfigError for integers.
        """
        found: Tensor
        if up is None:
            found = serving("swiglu_packed", reference_packed, gate)(gate.contiguous())
        else:
            gate, up = alike(gate, up)
            found = serving("swiglu", reference, gate)(gate, up)
        return found
