"""Rotary position embedding of queries and keys (arXiv 2104.09864); formulas in native/include/zcore/rotary.hpp.

    rotary(q, k, cos, sin, positions, is_interleaved) -> q, k, turned

    q          [..., heads, dim]          k   [..., key_heads, dim]
    cos, sin   [num_positions, width]     width <= dim; elements from `width` on pass unchanged
    positions  [...] int64                of each token its row of the tables

Pairs are (i, i + width/2), as Hugging Face has them, or (2i, 2i + 1) where interleaved.
"""

from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import LayoutError
from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import check, operand

__all__ = ["reference", "rotary"]


def reference(  # noqa: PLR0917 - as the schema has it
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn q and k as the header says; computed in fp32 at least, in their dtype at the end.

    Tables are constants: no gradient reaches them.
    """
    return tuple(_turn(each, cos, sin, positions, is_interleaved) for each in (q, k))  # type: ignore[return-value]  # two


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    width = cos.shape[-1]
    turned = x[..., :width].to(wide)
    if is_interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
    at = [table.detach().to(wide)[positions].unsqueeze(-2) for table in (cos, sin)]
    return torch.cat(((turned * at[0] + partner * at[1]).to(x.dtype), x[..., width:]), -1)


def rotary(  # noqa: PLR0917 - as the schema has it
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    return _rotate("rotary", {"q": q, "k": k}, cos, sin, positions, is_interleaved, is_backward=False)


def rotary_backward(  # noqa: PLR0917 - as the schema has it
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of what they became."""
    return _rotate("rotary_backward", {"dq": dq, "dk": dk}, cos, sin, positions, is_interleaved, is_backward=True)


def _rotate(  # noqa: PLR0917 - as the schema has it
    op: str,
    tensors: dict[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    is_interleaved: bool,
    *,
    is_backward: bool,
) -> tuple[Tensor, Tensor]:
    if cos.ndim != 2 or cos.shape[1] % 2:
        raise LayoutError(f"{op}: cos has shape {tuple(cos.shape)}; expected [num_positions, an even width].")
    check(op, "cos", cos, shape=cos.shape)
    check(op, "sin", sin, shape=cos.shape)
    check(op, "positions", positions, shape=positions.shape, dtypes=(torch.int64,))
    num_positions, width = cos.shape
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < num_positions:
        raise LayoutError(
            f"{op}: positions are from {int(positions.min())} to {int(positions.max())}; expected 0 to "
            f"{num_positions - 1}, the rows of cos and sin. Make longer tables."
        )
    turned = []
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.shape[-1] < width or tensor.shape[:-2] != positions.shape:
            raise LayoutError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; expected {(*positions.shape, 'heads', 'dim')}, the "
                f"shape of positions before heads and dim, and dim {width} or more, the width of cos."
            )
        check(op, name, tensor, shape=tensor.shape)
        out = torch.empty_like(tensor)
        if out.numel():
            _cpu.rotary(
                operand(tensor),
                operand(out),
                operand(cos),
                operand(sin),
                positions.data_ptr(),
                positions.numel(),
                tensor.shape[-2],
                tensor.shape[-1],
                width,
                is_interleaved,
                is_backward,
                torch.get_num_threads(),
            )
        turned.append(out)
    return turned[0], turned[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.is_interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    q, k = torch.ops.zcore.rotary_backward(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, ctx.is_interleaved)
    return q, k, None, None, None, None


register_backward(
    "rotary_backward",
    "(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor positions, bool is_interleaved) -> (Tensor, Tensor)",
    cpu=rotary_backward,
    fake=lambda dq, dk, cos, sin, positions, is_interleaved: (torch.empty_like(dq), torch.empty_like(dk)),
    triton="rotary",
)
register_differentiable(
    "rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool is_interleaved=False) -> (Tensor, Tensor)",
    reference=reference,
    cpu=rotary,
    fake=lambda q, k, cos, sin, positions, is_interleaved=False: (torch.empty_like(q), torch.empty_like(k)),
    setup_context=_setup,
    backward=_backward,
    triton="rotary",
)
