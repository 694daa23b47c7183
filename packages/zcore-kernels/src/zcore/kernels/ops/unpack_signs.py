"""Reads what `pack_signs` made: -scale or scale; see native/include/zcore/unpack_signs.hpp. arXiv 2102.02888."""

import torch
from torch import Tensor

from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.operands import check, device_of
from zcore.kernels.ops.pieces import FLOATS, TYPES
from zcore.kernels.ops.registering import register
from zcore.kernels.ops.signs import SignsLayout

__all__ = ["reference", "unpack_signs"]

OP = "unpack_signs"


def reference(
    signs: Tensor, scales: Tensor, *, block_size: int, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The [numel] values, in `dtype`, of signs and scales that `pack_signs` made.

    >>> reference(torch.tensor([2], dtype=torch.uint8), torch.tensor([2.0]), block_size=8, numel=3)
    tensor([ 2., -2.,  2.])
    """
    bits = (signs[:, None] >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    of_each = scales.repeat_interleave(block_size)[:numel]
    return torch.where(bits.view(-1)[:numel].bool(), -of_each, of_each).to(dtype)


def unpack_signs(
    signs: Tensor, scales: Tensor, *, block_size: int, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    layout = SignsLayout(numel, block_size)
    layout.require(OP)
    device = device_of(signs)
    check(OP, "signs", signs, dtypes=(torch.uint8,), numel=layout.num_bytes, device=device)
    check(OP, "scales", scales, dtypes=(torch.float32,), numel=layout.num_blocks, device=device)
    values = torch.empty(numel, dtype=dtype, device=device)
    check(OP, "the result", values, dtypes=FLOATS, device=device)
    run(
        OP,
        device,
        signs.data_ptr(),
        scales.data_ptr(),
        values.data_ptr(),
        TYPES[dtype],
        numel=numel,
        block_size=block_size,
    )
    return values


def _fake(signs: Tensor, scales: Tensor, *, block_size: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return signs.new_empty(numel, dtype=dtype)


register(
    OP,
    "(Tensor signs, Tensor scales, *, SymInt block_size, SymInt numel, ScalarType dtype=float) -> Tensor",
    reference=reference,
    cpu=unpack_signs,
    cuda=unpack_signs,
    triton="unpack_signs",
    fake=_fake,
    dtypes=(torch.uint8,),
)
