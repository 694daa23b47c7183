"""GeGLU as a layer (arXiv 2002.05202): gelu(gate) * up."""

from torch import Tensor, nn

from zcore.kernels.nn.serving import alike, serving
from zcore.kernels.ops.geglu import reference, reference_packed

__all__ = ["GeGLU"]


class GeGLU(nn.Module):
    """What lies between the projections of a gated MLP: of gate and up, or of both in one tensor, gate first.

    approximate: "none" for GELU by erf, or "tanh", as torch.nn.GELU has it.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """gate, up: [..., hidden]; without `up`, gate is [..., 2 hidden] and holds both.

        Of two dtypes the product has the wider. Raises ConfigError for integers.
        """
        found: Tensor
        if up is None:
            found = serving("geglu_packed", reference_packed, gate)(gate.contiguous(), self.approximate)
        else:
            gate, up = alike(gate, up)
            found = serving("geglu", reference, gate)(gate, up, self.approximate)
        return found

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        return f"approximate={self.approximate!r}"
