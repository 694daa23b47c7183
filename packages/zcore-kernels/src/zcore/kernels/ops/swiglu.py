"""SwiGLU, silu(gate) * up; the formulas stand in native/include/zcore/swiglu.hpp (arXiv 2002.05202).

swiglu(gate, up) -> out
swiglu_packed(packed) -> out       gate and up are the halves of [..., 2 hidden]
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zcore.kernels.ops import gated
from zcore.kernels.ops.differentiable import register_backward, register_differentiable

__all__ = ["reference", "reference_packed", "swiglu", "swiglu_packed"]


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape; computed in fp32 at least, in gate's dtype at the end."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def reference_packed(packed: Tensor) -> Tensor:
    """The same of [..., 2 hidden], whose first half is the gate."""
    return reference(*gated.halves("swiglu_packed", packed))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    return gated.gate("swiglu", gate, up, gated.SILU)


def swiglu_packed(packed: Tensor) -> Tensor:
    """See `reference_packed`; for what `swiglu` takes."""
    return gated.gate_packed("swiglu_packed", packed, gated.SILU)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.ops.zcore.swiglu_backward(dout.contiguous(), *ctx.saved_tensors)
    return dgate, dup


def _backward_packed(ctx: Any, dout: Tensor) -> Tensor:
    dpacked: Tensor = torch.ops.zcore.swiglu_packed_backward(dout.contiguous(), *ctx.saved_tensors)
    return dpacked


register_backward(
    "swiglu_backward",
    "(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    cpu=lambda dout, gate, up: gated.gate_backward("swiglu_backward", dout, gate, up, gated.SILU),
    fake=lambda dout, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    triton="swiglu",
)
register_backward(
    "swiglu_packed_backward",
    "(Tensor dout, Tensor packed) -> Tensor",
    cpu=lambda dout, packed: gated.gate_packed_backward("swiglu_packed_backward", dout, packed, gated.SILU),
    fake=lambda dout, packed: torch.empty_like(packed),
    triton="swiglu",
)
register_differentiable(
    "swiglu",
    "(Tensor gate, Tensor up) -> Tensor",
    reference=reference,
    cpu=swiglu,
    fake=lambda gate, up: torch.empty_like(gate),
    setup_context=_setup,
    backward=_backward,
    triton="swiglu",
)
register_differentiable(
    "swiglu_packed",
    "(Tensor packed) -> Tensor",
    reference=reference_packed,
    cpu=swiglu_packed,
    fake=lambda packed: packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2)),
    setup_context=_setup,
    backward=_backward_packed,
    triton="swiglu",
)
