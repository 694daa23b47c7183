"""gelu(x + bias), the sum never written (arXiv 1606.08415); formulas in native/include/zcore/bias_gelu.hpp."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.gelu import form_of
from zcore.kernels.ops.operands import check, operand, rows_of

__all__ = ["bias_gelu", "reference"]


def reference(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """gelu(x + bias) of [..., hidden] and [hidden], or none; computed in fp32 at least, in x's dtype at the end.

    approximate: "none" for the form with erf, or "tanh".
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return functional.gelu(wide if bias is None else wide + bias, approximate=approximate).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    form = form_of("bias_gelu", approximate)
    rows, hidden = rows_of("bias_gelu", "x", x)
    if bias is not None:
        check("bias_gelu", "bias", bias, shape=(hidden,))
    out = torch.empty_like(x)
    _cpu.bias_gelu(operand(x), operand(bias), operand(out), rows, hidden, form, torch.get_num_threads())
    return out


def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where there is none)."""
    form = form_of("bias_gelu_backward", approximate)
    rows, hidden = rows_of("bias_gelu_backward", "x", x)
    check("bias_gelu_backward", "dout", dout, shape=x.shape, dtypes=(x.dtype,))
    if bias is not None:
        check("bias_gelu_backward", "bias", bias, shape=(hidden,))
    dx, dbias = fake_backward(dout, x, bias, approximate)
    operands = (operand(dout), operand(x), operand(bias), operand(dx), operand(None if bias is None else dbias))
    _cpu.bias_gelu_backward(*operands, rows, hidden, form, torch.get_num_threads())
    return dx, dbias


def fake_backward(dout: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """What `bias_gelu_backward` returns, unwritten."""
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.zcore.bias_gelu_backward(dout.contiguous(), x, bias, ctx.approximate)
    return dx, None if bias is None else dbias, None


register_backward(
    "bias_gelu_backward",
    "(Tensor dout, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    cpu=bias_gelu_backward,
    fake=fake_backward,
    triton="bias_gelu",
)
register_differentiable(
    "bias_gelu",
    '(Tensor x, Tensor? bias, str approximate="none") -> Tensor',
    reference=reference,
    cpu=bias_gelu,
    fake=lambda x, bias, approximate="none": torch.empty_like(x),
    setup_context=_setup,
    backward=_backward,
    triton="bias_gelu",
)
