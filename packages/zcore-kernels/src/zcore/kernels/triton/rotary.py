"""Rotary position embedding in Triton; operands as in ops/rotary.py, formulas in native/include/zcore/rotary.hpp.

A program turns some heads of one token, whose row of the tables it reads once; in fp32 it moves 8 bytes an element. A
position without a row in the tables gives NaN: to refuse it, the host would have to wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.core.errors import LayoutError
from zcore.kernels.ops.operands import check
from zcore.kernels.triton.tiles import plan_pieces

__all__ = ["rotary", "rotary_backward"]


@triton.jit
def rotary_kernel(
    x: tl.tensor,
    y: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    num_positions: tl.tensor,
    heads: tl.tensor,
    dim: tl.tensor,
    width: tl.tensor,
    IS_INTERLEAVED: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """HEADS heads of a token: `width` / 2 pairs, PAIRS at most, and what follows them, REST at most."""
    groups = tl.cdiv(heads, HEADS)
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = (tl.program_id(0) % groups) * HEADS + tl.arange(0, HEADS)[:, None]
    at = (token * heads + head) * dim

    # A block of one, since of a lone truth the interpreter makes an integer, which is no mask to triton above 3.7.
    position = tl.load(positions + token + tl.zeros([1, 1], tl.int64))
    has_row = (position >= 0) & (position < num_positions)
    pair = tl.arange(0, PAIRS)[None, :]
    if IS_INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + width // 2
    in_tables = (pair < width // 2) & has_row
    nan = float("nan")
    cos_first = tl.load(cos + position * width + first, mask=in_tables, other=nan).to(tl.float32)
    cos_second = tl.load(cos + position * width + second, mask=in_tables, other=nan).to(tl.float32)
    sin_first = tl.load(sin + position * width + first, mask=in_tables, other=nan).to(tl.float32)
    sin_second = tl.load(sin + position * width + second, mask=in_tables, other=nan).to(tl.float32)

    is_inside = (head < heads) & (pair < width // 2)
    a = tl.load(x + at + first, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + second, mask=is_inside, other=0.0).to(tl.float32)
    if IS_BACKWARD:
        turned_a = a * cos_first + b * sin_second
        turned_b = b * cos_second - a * sin_first
    else:
        turned_a = a * cos_first - b * sin_first
        turned_b = b * cos_second + a * sin_second
    tl.store(y + at + first, turned_a.to(y.dtype.element_ty), mask=is_inside)
    tl.store(y + at + second, turned_b.to(y.dtype.element_ty), mask=is_inside)

    if REST > 0:
        column = width + tl.arange(0, REST)[None, :]
        is_rest = (head < heads) & (column < dim)
        tl.store(y + at + column, tl.load(x + at + column, mask=is_rest), mask=is_rest)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned; raises LayoutError and ConfigError for operands that are not served."""
    return _rotate("rotary", {"q": q, "k": k}, (cos, sin, positions), is_interleaved, is_backward=False)


def rotary_backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, is_interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of what they became."""
    return _rotate("rotary_backward", {"dq": dq, "dk": dk}, (cos, sin, positions), is_interleaved, is_backward=True)


def _rotate(
    op: str,
    tensors: dict[str, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    is_interleaved: bool,
    *,
    is_backward: bool,
) -> tuple[Tensor, Tensor]:
    cos, sin, positions = tables
    device = next(iter(tensors.values())).device
    if cos.ndim != 2 or cos.shape[1] % 2:
        raise LayoutError(f"{op}: cos has shape {tuple(cos.shape)}; expected [num_positions, an even width].")
    check(op, "cos", cos, shape=cos.shape, device=device)
    check(op, "sin", sin, shape=cos.shape, device=device)
    check(op, "positions", positions, shape=positions.shape, dtypes=(torch.int64,), device=device)
    width = cos.shape[1]
    turned = []
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.shape[-1] < width or tensor.shape[:-2] != positions.shape:
            raise LayoutError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; expected {(*positions.shape, 'heads', 'dim')}, the "
                f"shape of positions before heads and dim, and dim {width} or more, the width of cos."
            )
        check(op, name, tensor, shape=tensor.shape, device=device)
        turned.append(_turn(tensor, tables, is_interleaved, is_backward))
    return turned[0], turned[1]


def _turn(x: Tensor, tables: tuple[Tensor, Tensor, Tensor], is_interleaved: bool, is_backward: bool) -> Tensor:
    y = torch.empty_like(x)
    cos, _, positions = tables
    (num_positions, width), (heads, dim) = cos.shape, x.shape[-2:]
    if x.numel():
        tile = plan_pieces(max(dim // 2, 1))
        rotary_kernel[(positions.numel() * triton.cdiv(heads, tile.rows),)](
            x,
            y,
            *tables,
            num_positions,
            heads,
            dim,
            width,
            IS_INTERLEAVED=is_interleaved,
            IS_BACKWARD=is_backward,
            HEADS=tile.rows,
            PAIRS=triton.next_power_of_2(max(width // 2, 1)),
            REST=triton.next_power_of_2(dim - width),
            num_warps=tile.num_warps,
        )
    return y
