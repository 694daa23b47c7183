"""Compression to one bit with error feedback; the formulas stand in native/include/zcore/pack_signs.hpp.

1-bit Adam: arXiv 2102.02888, algorithm 1.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.operands import check, device_of
from zcore.kernels.ops.pieces import FLOATS, TYPES
from zcore.kernels.ops.registering import register
from zcore.kernels.ops.signs import SignsLayout

__all__ = ["pack_signs", "reference"]

OP = "pack_signs"


def reference(values: Tensor, error: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Signs and scales of `values` + `error`; see signs.py for theirs. What they lose is left in `error`, in place.

    error: fp32, of as many elements. A block with a NaN or an infinity has the scale NaN, and its error stays as it is.
    Sums of scales are in double: in another order they may differ in the last bit of a scale.

    >>> error = torch.zeros(3)
    >>> reference(torch.tensor([1.0, -2.0, 3.0]), error, block_size=8), error
    ((tensor([2], dtype=torch.uint8), tensor([2.])), tensor([-1.,  0.,  1.]))
    """
    layout = SignsLayout(values.numel(), block_size)
    sums = values.reshape(-1).float() + error.reshape(-1)
    blocks = pad(sums, (0, layout.num_blocks * block_size - layout.numel)).view(layout.num_blocks, block_size)
    first = torch.arange(layout.num_blocks, device=values.device) * block_size
    counts = (layout.numel - first).clamp(max=block_size)
    is_finite = blocks.isfinite().all(1)
    scales = (blocks.abs().double().sum(1) / counts).float().masked_fill(~is_finite, torch.nan)
    lost = (blocks - scales[:, None].expand_as(blocks).copysign(blocks)).view(-1)[: layout.numel]
    is_kept = is_finite[:, None].expand_as(blocks).reshape(-1)[: layout.numel]
    error.copy_(torch.where(is_kept, lost, error.reshape(-1)).view_as(error))
    bits = pad(sums.signbit(), (0, layout.num_bytes * 8 - layout.numel)).view(-1, 8)
    places = 1 << torch.arange(8, device=values.device)
    return (bits * places).sum(1).to(torch.uint8), scales


def pack_signs(values: Tensor, error: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    layout = SignsLayout(values.numel(), block_size)
    layout.require(OP)
    device = device_of(values)
    check(OP, "values", values, dtypes=FLOATS, device=device)
    check(OP, "error", error, dtypes=(torch.float32,), numel=layout.numel, device=device)
    signs, scales = _fake(values, error, block_size=block_size)
    run(
        OP,
        device,
        values.data_ptr(),
        TYPES[values.dtype],
        error.data_ptr(),
        signs.data_ptr(),
        scales.data_ptr(),
        numel=layout.numel,
        block_size=block_size,
    )
    return signs, scales


def _fake(values: Tensor, error: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    layout = SignsLayout(values.numel(), block_size)
    signs = values.new_empty(layout.num_bytes, dtype=torch.uint8)
    return signs, values.new_empty(layout.num_blocks, dtype=torch.float32)


register(
    OP,
    "(Tensor values, Tensor(a!) error, *, SymInt block_size) -> (Tensor, Tensor)",
    reference=reference,
    cpu=pack_signs,
    cuda=pack_signs,
    triton="pack_signs",
    fake=_fake,
    dtypes=FLOATS,
)
