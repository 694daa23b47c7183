"""GeGLU in Triton; operands as in ops/geglu.py, formulas in native/include/zcore/geglu.hpp."""

from torch import Tensor

from zcore.kernels.ops.gelu import form_of
from zcore.kernels.triton import gated

__all__ = ["geglu", "geglu_backward", "geglu_packed", "geglu_packed_backward"]


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up; raises LayoutError and ConfigError for operands that are not served."""
    return gated.gate("geglu", gate, up, form_of("geglu", approximate))


def geglu_packed(packed: Tensor, approximate: str = "none") -> Tensor:
    """The same of [..., 2 hidden], whose first half is the gate."""
    return gated.gate_packed("geglu_packed", packed, form_of("geglu_packed", approximate))


def geglu_backward(dout: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return gated.gate_backward("geglu_backward", dout, gate, up, form_of("geglu_backward", approximate))


def geglu_packed_backward(dout: Tensor, packed: Tensor, approximate: str) -> Tensor:
    """The gradient of both in one tensor."""
    form = form_of("geglu_packed_backward", approximate)
    return gated.gate_packed_backward("geglu_packed_backward", dout, packed, form)
