"""GeGLU, gelu(gate) * up; the formulas stand in native/include/zcore/geglu.hpp (arXiv 2002.05202).

geglu(gate, up, approximate) -> out
geglu_packed(packed, approximate) -> out       gate and up are the halves of [..., 2 hidden]
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zcore.kernels.ops import gated
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.gelu import form_of

__all__ = ["geglu", "geglu_packed", "reference", "reference_packed"]


def reference(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, of one shape; computed in fp32 at least, in gate's dtype at the end.

    approximate: "none" for the form with erf, or "tanh".
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (functional.gelu(gate.to(wide), approximate=approximate) * up.to(wide)).to(gate.dtype)


def reference_packed(packed: Tensor, approximate: str = "none") -> Tensor:
    """The same of [..., 2 hidden], whose first half is the gate."""
    return reference(*gated.halves("geglu_packed", packed), approximate)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    return gated.gate("geglu", gate, up, form_of("geglu", approximate))


def geglu_packed(packed: Tensor, approximate: str = "none") -> Tensor:
    """See `reference_packed`; for what `geglu` takes."""
    return gated.gate_packed("geglu_packed", packed, form_of("geglu_packed", approximate))


def geglu_backward(dout: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return gated.gate_backward("geglu_backward", dout, gate, up, form_of("geglu_backward", approximate))


def geglu_packed_backward(dout: Tensor, packed: Tensor, approximate: str) -> Tensor:
    """The gradient of both in one tensor."""
    form = form_of("geglu_packed_backward", approximate)
    return gated.gate_packed_backward("geglu_packed_backward", dout, packed, form)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.approximate = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
    dgate, dup = torch.ops.zcore.geglu_backward(dout.contiguous(), *ctx.saved_tensors, ctx.approximate)
    return dgate, dup, None


def _backward_packed(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return torch.ops.zcore.geglu_packed_backward(dout.contiguous(), *ctx.saved_tensors, ctx.approximate), None


register_backward(
    "geglu_backward",
    "(Tensor dout, Tensor gate, Tensor up, str approximate) -> (Tensor, Tensor)",
    cpu=geglu_backward,
    fake=lambda dout, gate, up, approximate: (torch.empty_like(gate), torch.empty_like(up)),
    triton="geglu",
)
register_backward(
    "geglu_packed_backward",
    "(Tensor dout, Tensor packed, str approximate) -> Tensor",
    cpu=geglu_packed_backward,
    fake=lambda dout, packed, approximate: torch.empty_like(packed),
    triton="geglu",
)
register_differentiable(
    "geglu",
    '(Tensor gate, Tensor up, str approximate="none") -> Tensor',
    reference=reference,
    cpu=geglu,
    fake=lambda gate, up, approximate="none": torch.empty_like(gate),
    setup_context=_setup,
    backward=_backward,
    triton="geglu",
)
register_differentiable(
    "geglu_packed",
    '(Tensor packed, str approximate="none") -> Tensor',
    reference=reference_packed,
    cpu=geglu_packed,
    fake=lambda packed, approximate="none": packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2)),
    setup_context=_setup,
    backward=_backward_packed,
    triton="geglu",
)
