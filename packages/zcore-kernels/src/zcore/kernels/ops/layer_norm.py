"""LayerNorm, alone or after adding a residual (arXiv 1607.06450); formulas in native/include/zcore/layer_norm.hpp.

layer_norm(x, weight, bias, eps) -> y
layer_norm_residual(x, residual, weight, bias, eps) -> y, sum      sum = x + residual, the next residual
"""

from typing import Any

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import check, check_floating, operand, rows_of

__all__ = ["layer_norm", "layer_norm_residual", "reference", "reference_residual"]


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Rows of `x`, [..., hidden], less their mean, over their deviation, times `weight`, plus `bias`; or without these.

    Computed in fp32 at least, in x's dtype at the end. Raises ConfigError for integers.
    """
    check_floating("layer_norm", "x", x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def reference_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Of x + residual, rounded to their dtype: the norm, and the sum itself."""
    added = x + residual
    return reference(added, weight, bias, eps), added


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    rows, hidden = rows_of("layer_norm", "x", x)
    _check_affine("layer_norm", weight, bias, hidden)
    y = torch.empty_like(x)
    _cpu.layer_norm(
        operand(x),
        (0, 0),
        operand(weight),
        operand(bias),
        (0, 0),
        operand(y),
        rows,
        hidden,
        eps,
        torch.get_num_threads(),
    )
    return y


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference_residual`; for what `layer_norm` takes."""
    rows, hidden = rows_of("layer_norm_residual", "x", x)
    check("layer_norm_residual", "residual", residual, shape=x.shape, dtypes=(x.dtype,))
    _check_affine("layer_norm_residual", weight, bias, hidden)
    y, added = torch.empty_like(x), torch.empty_like(x)
    operands = (operand(x), operand(residual), operand(weight), operand(bias), operand(added), operand(y))
    _cpu.layer_norm(*operands, rows, hidden, eps, torch.get_num_threads())
    return y, added


def layer_norm_backward(  # noqa: PLR0917 - as the schema has it
    dy: Tensor, s: Tensor, weight: Tensor | None, bias: Tensor | None, dsum: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what was normalised, of the weight and of the bias (these empty where there is none)."""
    rows, hidden = rows_of("layer_norm_backward", "s", s)
    check("layer_norm_backward", "dy", dy, shape=s.shape, dtypes=(s.dtype,))
    if dsum is not None:
        check("layer_norm_backward", "dsum", dsum, shape=s.shape, dtypes=(s.dtype,))
    _check_affine("layer_norm_backward", weight, bias, hidden)
    ds, dweight, dbias = fake_backward(dy, s, weight, bias, dsum, eps)
    operands = (operand(dy), operand(s), operand(weight), operand(dsum), operand(ds))
    written = (operand(None if weight is None else dweight), operand(None if bias is None else dbias))
    _cpu.layer_norm_backward(*operands, *written, rows, hidden, eps, torch.get_num_threads())
    return ds, dweight, dbias


def fake_backward(  # noqa: PLR0917 - as the schema has it
    dy: Tensor, s: Tensor, weight: Tensor | None, bias: Tensor | None, dsum: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `layer_norm_backward` returns, unwritten."""
    dweight = s.new_empty(0) if weight is None else torch.empty_like(weight)
    return torch.empty_like(s), dweight, s.new_empty(0) if bias is None else torch.empty_like(bias)


def _check_affine(op: str, weight: Tensor | None, bias: Tensor | None, hidden: int) -> None:
    if weight is not None:
        check(op, "weight", weight, shape=(hidden,))
    if bias is not None:
        check(op, "bias", bias, shape=(hidden,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    # A gradient may come expanded, as that of a sum does.
    dx, dweight, dbias = torch.ops.zcore.layer_norm_backward(dy.contiguous(), x, weight, bias, None, ctx.eps)
    return dx, None if weight is None else dweight, None if bias is None else dbias, None


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _backward_residual(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
    added, weight, bias = ctx.saved_tensors
    ds, dweight, dbias = torch.ops.zcore.layer_norm_backward(
        dy.contiguous(), added, weight, bias, dsum.contiguous(), ctx.eps
    )
    return ds, ds, None if weight is None else dweight, None if bias is None else dbias, None


register_backward(
    "layer_norm_backward",
    "(Tensor dy, Tensor s, Tensor? weight, Tensor? bias, Tensor? dsum, float eps) -> (Tensor, Tensor, Tensor)",
    cpu=layer_norm_backward,
    fake=fake_backward,
    triton="layer_norm",
)
register_differentiable(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=reference,
    cpu=layer_norm,
    fake=lambda x, weight, bias, eps: torch.empty_like(x),
    setup_context=_setup,
    backward=_backward,
    triton="layer_norm",
)
register_differentiable(
    "layer_norm_residual",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    reference=reference_residual,
    cpu=layer_norm_residual,
    fake=lambda x, residual, weight, bias, eps: (torch.empty_like(x), torch.empty_like(x)),
    setup_context=_setup_residual,
    backward=_backward_residual,
    triton="layer_norm",
)
