"""How norms are launched, whose kernels take their operands in one order; RMSNorm has a weight, LayerNorm a bias, too.

Forward takes tiles of whole rows. Backward is run by so many programs as fill the device, each with a row of partial
sums for the gradient of what has one number a column; torch adds these up in order.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from zcore.kernels.ops.operands import check, rows_of
from zcore.kernels.triton.tiles import num_programs, plan_whole_rows

__all__ = ["launch_backward", "launch_forward"]

Affine = dict[str, Tensor | None]  # by name, weight first


def launch_forward(
    kernel: Any, op: str, x: Tensor, residual: Tensor | None, affine: Affine, *settings: float
) -> tuple[Tensor, Tensor]:
    """The norm of rows of x, or of x + residual, and that sum.

    kernel: takes x, residual, *affine, y, added, rows, hidden, *settings, ROWS, COLUMNS.
    """
    if residual is not None:
        check(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    rows, hidden = rows_of(op, "x", x, device=x.device)
    _check_affine(op, affine, hidden, x.device)
    y, tile = torch.empty_like(x), plan_whole_rows(op, hidden)
    added = y if residual is None else torch.empty_like(x)
    if x.numel():
        kernel[(triton.cdiv(rows, tile.rows),)](
            x,
            residual,
            *affine.values(),
            y,
            added,
            rows,
            hidden,
            *settings,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return y, added


def launch_backward(
    kernel: Any, op: str, dy: Tensor, s: Tensor, affine: Affine, dsum: Tensor | None, *settings: float
) -> tuple[Tensor, ...]:
    """The gradient of what was normalised, then of each in `affine`, empty where it is none.

    kernel: takes dy, s, weight, dsum, ds, *partial sums, rows, hidden, *settings, ROWS, COLUMNS.
    """
    rows, hidden = rows_of(op, "s", s, device=s.device)
    check(op, "dy", dy, shape=s.shape, dtypes=(s.dtype,), device=s.device)
    if dsum is not None:
        check(op, "dsum", dsum, shape=s.shape, dtypes=(s.dtype,), device=s.device)
    _check_affine(op, affine, hidden, s.device)
    ds, tile = torch.empty_like(s), plan_whole_rows(op, hidden)
    programs = min(triton.cdiv(rows, tile.rows), num_programs(s.device))
    partials = [
        None if each is None else s.new_empty(programs, hidden, dtype=torch.float32) for each in affine.values()
    ]
    if s.numel():
        kernel[(programs,)](
            dy,
            s,
            affine["weight"],
            dsum,
            ds,
            *partials,
            rows,
            hidden,
            *settings,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    gradients = (
        s.new_empty(0) if each is None or partial is None else partial.sum(0).to(each.dtype)
        for each, partial in zip(affine.values(), partials, strict=True)
    )
    return ds, *gradients


def _check_affine(op: str, affine: Affine, hidden: int, device: torch.device) -> None:
    for name, each in affine.items():
        if each is not None:
            check(op, name, each, shape=(hidden,), device=device)
