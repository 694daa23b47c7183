"""What SwiGLU and GeGLU have in common in Triton, as ops/gated.py in C++: a gate times what passes it.

Two tensors are one long row; the halves of one tensor are columns of its rows. In fp32 forward moves 12 bytes an
element, backward 20.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.gated import halves
from zcore.kernels.ops.operands import check, rows_of
from zcore.kernels.triton.activations import activation, activation_and_slope
from zcore.kernels.triton.tiles import plan_pieces

__all__ = ["gate", "gate_backward", "gate_packed", "gate_packed_backward"]


@triton.jit
def forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    stride: tl.tensor,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One tile; rows of gate and up lie `stride` elements apart."""
    tiles = tl.cdiv(hidden, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_inside = (row < rows) & (column < hidden)
    gate_tile = tl.load(gate + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
    up_tile = tl.load(up + row * stride + column, mask=is_inside, other=0.0).to(tl.float32)
    found = activation(gate_tile, FORM) * up_tile
    tl.store(out + row * hidden + column, found.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(
    dout: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    stride: tl.tensor,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One tile; rows of all but dout lie `stride` elements apart."""
    tiles = tl.cdiv(hidden, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_inside = (row < rows) & (column < hidden)
    at = row * stride + column
    dout_tile = tl.load(dout + row * hidden + column, mask=is_inside, other=0.0).to(tl.float32)
    up_tile = tl.load(up + at, mask=is_inside, other=0.0).to(tl.float32)
    active, slope = activation_and_slope(tl.load(gate + at, mask=is_inside, other=0.0).to(tl.float32), FORM)
    tl.store(dgate + at, (dout_tile * up_tile * slope).to(dgate.dtype.element_ty), mask=is_inside)
    tl.store(dup + at, (dout_tile * active).to(dup.dtype.element_ty), mask=is_inside)


def gate(op: str, gate: Tensor, up: Tensor, form: int) -> Tensor:
    """The activation of `gate`, which `form` names, times `up`."""
    check(op, "gate", gate, shape=gate.shape, device=gate.device)
    check(op, "up", up, shape=gate.shape, dtypes=(gate.dtype,), device=gate.device)
    out = torch.empty_like(gate)
    _forward(gate, up, out, 1, gate.numel(), gate.numel(), form)
    return out


def gate_backward(op: str, dout: Tensor, gate: Tensor, up: Tensor, form: int) -> tuple[Tensor, Tensor]:
    """The gradients of both."""
    check(op, "gate", gate, shape=gate.shape, device=gate.device)
    check(op, "up", up, shape=gate.shape, dtypes=(gate.dtype,), device=gate.device)
    check(op, "dout", dout, shape=gate.shape, dtypes=(gate.dtype,), device=gate.device)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _backward((dout, gate, up, dgate, dup), 1, gate.numel(), gate.numel(), form)
    return dgate, dup


def gate_packed(op: str, packed: Tensor, form: int) -> Tensor:
    """As `gate`, of both in one tensor."""
    rows, width = rows_of(op, "packed", packed, device=packed.device)
    gate_half, up_half = halves(op, packed)
    out = torch.empty_like(gate_half, memory_format=torch.contiguous_format)
    _forward(gate_half, up_half, out, rows, width // 2, width, form)
    return out


def gate_packed_backward(op: str, dout: Tensor, packed: Tensor, form: int) -> Tensor:
    """The gradient of both in one tensor."""
    rows, width = rows_of(op, "packed", packed, device=packed.device)
    gate_half, up_half = halves(op, packed)
    check(op, "dout", dout, shape=gate_half.shape, dtypes=(packed.dtype,), device=packed.device)
    dpacked = torch.empty_like(packed)
    _backward((dout, gate_half, up_half, *halves(op, dpacked)), rows, width // 2, width, form)
    return dpacked


def _forward(gate: Tensor, up: Tensor, out: Tensor, rows: int, hidden: int, stride: int, form: int) -> None:
    tile = plan_pieces(hidden)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(hidden, tile.columns)
    if programs:
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
        forward_kernel[(programs,)](gate, up, out, rows, hidden, stride, FORM=form, **sizes)


def _backward(tensors: tuple[Tensor, ...], rows: int, hidden: int, stride: int, form: int) -> None:
    tile = plan_pieces(hidden)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(hidden, tile.columns)
    if programs:
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps}
        backward_kernel[(programs,)](*tensors, rows, hidden, stride, FORM=form, **sizes)
