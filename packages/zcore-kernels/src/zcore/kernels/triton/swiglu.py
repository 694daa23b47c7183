"""SwiGLU in Triton; operands as in ops/swiglu.py, formulas in native/include/zcore/swiglu.hpp."""

from torch import Tensor

from zcore.kernels.ops.gated import SILU
from zcore.kernels.triton import gated

__all__ = ["swiglu", "swiglu_backward", "swiglu_packed", "swiglu_packed_backward"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; raises LayoutError and ConfigError for operands that are not served."""
    return gated.gate("swiglu", gate, up, SILU)


def swiglu_packed(packed: Tensor) -> Tensor:
    """The same of [..., 2 hidden], whose first half is the gate."""
    return gated.gate_packed("swiglu_packed", packed, SILU)


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return gated.gate_backward("swiglu_backward", dout, gate, up, SILU)


def swiglu_packed_backward(dout: Tensor, packed: Tensor) -> Tensor:
    """The gradient of both in one tensor."""
    return gated.gate_packed_backward("swiglu_packed_backward", dout, packed, SILU)
