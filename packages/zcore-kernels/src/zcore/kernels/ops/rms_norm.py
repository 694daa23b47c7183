"""RMSNorm, alone or after adding a residual (arXiv 1910.07467); formulas in native/include/zcore/rms_norm.hpp.

rms_norm(x, weight, eps, offset) -> y
rms_norm_residual(x, residual, weight, eps, offset) -> y, sum      sum = x + residual, the next residual
"""

from typing import Any

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import check, check_floating, operand, rows_of

__all__ = ["reference", "reference_residual", "rms_norm", "rms_norm_residual"]


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Rows of `x`, [..., hidden], over their root mean square, times `weight + offset`; no weight counts as ones.

    Computed in fp32 at least, in x's dtype at the end. Raises ConfigError for integers.
    """
    check_floating("rms_norm", "x", x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * (weight.to(wide.dtype) + offset)).to(x.dtype)


def reference_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Of x + residual, rounded to their dtype: the norm, and the sum itself."""
    added = x + residual
    return reference(added, weight, eps, offset), added


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    rows, hidden = rows_of("rms_norm", "x", x)
    if weight is not None:
        check("rms_norm", "weight", weight, shape=(hidden,))
    y = torch.empty_like(x)
    _cpu.rms_norm(
        operand(x), (0, 0), operand(weight), (0, 0), operand(y), rows, hidden, eps, offset, torch.get_num_threads()
    )
    return y


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `reference_residual`; for what `rms_norm` takes."""
    rows, hidden = rows_of("rms_norm_residual", "x", x)
    check("rms_norm_residual", "residual", residual, shape=x.shape, dtypes=(x.dtype,))
    if weight is not None:
        check("rms_norm_residual", "weight", weight, shape=(hidden,))
    y, added = torch.empty_like(x), torch.empty_like(x)
    operands = (operand(x), operand(residual), operand(weight), operand(added), operand(y))
    _cpu.rms_norm(*operands, rows, hidden, eps, offset, torch.get_num_threads())
    return y, added


def rms_norm_backward(  # noqa: PLR0917 - as the schema has it
    dy: Tensor, s: Tensor, weight: Tensor | None, dsum: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised and of the weight (empty where there is none)."""
    rows, hidden = rows_of("rms_norm_backward", "s", s)
    check("rms_norm_backward", "dy", dy, shape=s.shape, dtypes=(s.dtype,))
    if dsum is not None:
        check("rms_norm_backward", "dsum", dsum, shape=s.shape, dtypes=(s.dtype,))
    if weight is not None:
        check("rms_norm_backward", "weight", weight, shape=(hidden,))
    ds, dweight = fake_backward(dy, s, weight, dsum, eps, offset)
    written = None if weight is None else dweight
    operands = (operand(dy), operand(s), operand(weight), operand(dsum), operand(ds), operand(written))
    _cpu.rms_norm_backward(*operands, rows, hidden, eps, offset, torch.get_num_threads())
    return ds, dweight


def fake_backward(  # noqa: PLR0917 - as the schema has it
    dy: Tensor, s: Tensor, weight: Tensor | None, dsum: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """What `rms_norm_backward` returns, unwritten."""
    return torch.empty_like(s), s.new_empty(0) if weight is None else torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    # A gradient may come expanded, as that of a sum does.
    dx, dweight = torch.ops.zcore.rms_norm_backward(dy.contiguous(), x, weight, None, ctx.eps, ctx.offset)
    return dx, None if weight is None else dweight, None, None


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight)


def _backward_residual(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
    added, weight = ctx.saved_tensors
    ds, dweight = torch.ops.zcore.rms_norm_backward(
        dy.contiguous(), added, weight, dsum.contiguous(), ctx.eps, ctx.offset
    )
    return ds, ds, None if weight is None else dweight, None, None


register_backward(
    "rms_norm_backward",
    "(Tensor dy, Tensor s, Tensor? weight, Tensor? dsum, float eps, float offset) -> (Tensor, Tensor)",
    cpu=rms_norm_backward,
    fake=fake_backward,
    triton="rms_norm",
)
register_differentiable(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, float offset=0.0) -> Tensor",
    reference=reference,
    cpu=rms_norm,
    fake=lambda x, weight, eps, offset=0.0: torch.empty_like(x),
    setup_context=_setup,
    backward=_backward,
    triton="rms_norm",
)
register_differentiable(
    "rms_norm_residual",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, float offset=0.0) -> (Tensor, Tensor)",
    reference=reference_residual,
    cpu=rms_norm_residual,
    fake=lambda x, residual, weight, eps, offset=0.0: (torch.empty_like(x), torch.empty_like(x)),
    setup_context=_setup_residual,
    backward=_backward_residual,
    triton="rms_norm",
)
