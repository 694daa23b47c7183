"""What SwiGLU and GeGLU have in common: a gate and what passes it, in two tensors or in two halves of one.

In one tensor, [..., 2 hidden], the gate is the first half, as a fused projection of Hugging Face has it.
"""

import torch
from torch import Tensor

from zcore.core.errors import LayoutError
from zcore.kernels import _cpu
from zcore.kernels.ops.operands import check, operand, rows_of

__all__ = ["SILU", "gate", "gate_backward", "gate_packed", "gate_packed_backward", "halves"]

SILU = -1  # beside the forms of GELU, for the compiled function
Part = tuple[int, int, int, int]  # address, type, stride of rows, first column


def halves(op: str, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The gate and what passes it, as views."""
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise LayoutError(f"{op}: packed has shape {tuple(packed.shape)}; expected [..., 2 * hidden].")
    gate_half, up_half = packed.chunk(2, -1)
    return gate_half, up_half


def gate(op: str, gate: Tensor, up: Tensor, form: int) -> Tensor:
    """The activation of `gate`, which `form` names, times `up`."""
    check(op, "gate", gate, shape=gate.shape)
    check(op, "up", up, shape=gate.shape, dtypes=(gate.dtype,))
    out = torch.empty_like(gate)
    _cpu.glu(_whole(gate), _whole(up), _whole(out), 1, gate.numel(), form, torch.get_num_threads())
    return out


def gate_backward(op: str, dout: Tensor, gate: Tensor, up: Tensor, form: int) -> tuple[Tensor, Tensor]:
    """The gradients of both."""
    check(op, "gate", gate, shape=gate.shape)
    check(op, "up", up, shape=gate.shape, dtypes=(gate.dtype,))
    check(op, "dout", dout, shape=gate.shape, dtypes=(gate.dtype,))
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    parts = (_whole(dout), _whole(gate), _whole(up), _whole(dgate), _whole(dup))
    _cpu.glu_backward(*parts, 1, gate.numel(), form, torch.get_num_threads())
    return dgate, dup


def gate_packed(op: str, packed: Tensor, form: int) -> Tensor:
    """As `gate`, of both in one tensor."""
    rows, _ = rows_of(op, "packed", packed)
    out = torch.empty_like(halves(op, packed)[0], memory_format=torch.contiguous_format)
    _cpu.glu(*_halved(packed), _whole(out), rows, packed.shape[-1] // 2, form, torch.get_num_threads())
    return out


def gate_packed_backward(op: str, dout: Tensor, packed: Tensor, form: int) -> Tensor:
    """The gradient of both in one tensor."""
    rows, _ = rows_of(op, "packed", packed)
    check(op, "dout", dout, shape=halves(op, packed)[0].shape, dtypes=(packed.dtype,))
    dpacked = torch.empty_like(packed)
    hidden = packed.shape[-1] // 2
    _cpu.glu_backward(_whole(dout), *_halved(packed), *_halved(dpacked), rows, hidden, form, torch.get_num_threads())
    return dpacked


def _whole(tensor: Tensor) -> Part:
    """All columns of a tensor; as one row where both are, so that no stride counts."""
    return (*operand(tensor), tensor.shape[-1] if tensor.ndim else 1, 0)


def _halved(packed: Tensor) -> tuple[Part, Part]:
    width = packed.shape[-1]
    return (*operand(packed), width, 0), (*operand(packed), width, width // 2)
