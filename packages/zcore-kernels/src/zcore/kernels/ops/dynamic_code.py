"""States of one byte an element: the block-wise dynamic code of arXiv 2110.02861, in torch.

What it is and where it leaves the paper stands in native/cpu/dynamic_code.hpp; the two agree to the bit. A state is a
pair: codes (uint8, in any shape) and scales (fp32, one for each 256 elements in the order of memory).
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCK_NUMEL", "bounds", "decode", "encode", "num_blocks", "read_state", "values", "write_state"]

BLOCK_NUMEL = 256
DECADES = 7


def num_blocks(numel: int) -> int:
    """How many scales codes of `numel` elements have.

    >>> num_blocks(257)
    2
    """
    return -(-numel // BLOCK_NUMEL)


@cache
def values(is_signed: bool) -> Tensor:  # [256] fp32
    """What each code stands for, ascending, as parts of the scale. Shared: not to be written."""
    positive = []
    for decade in range(DECADES):
        count = 1 << (decade if is_signed else decade + 1)
        shrink = 10 ** (DECADES - 1 - decade)
        positive += [(2 * count + 9 * (2 * each + 1)) / (20 * count * shrink) for each in range(count)]
    negative = [-1.0, *(-value for value in reversed(positive[1:]))] if is_signed else []
    return torch.tensor([*negative, 0.0, *positive, 1.0])


@cache
def bounds(is_signed: bool) -> Tensor:  # [255] fp32
    """Code n stands for what is above bounds[n - 1] and not above bounds[n]."""
    wide = values(is_signed).double()
    between = ((wide[:-1] + wide[1:]) / 2).float()
    if not is_signed:
        between[0] = 0.0  # what is above 0 stays so
    return between


def encode(tensor: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest code of each element, in its shape, and the scales. A block with NaN or infinity gets the scale NaN.

    >>> codes, scales = encode(torch.tensor([0.0, -2.0, 1.0]), is_signed=True)
    >>> codes.tolist(), scales.tolist()
    ([127, 0, 219], [2.0])
    """
    flat = tensor.reshape(-1).float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)
    scales = rows.abs().amax(dim=1)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    relative = torch.where(scales[:, None] > 0, rows / scales[:, None], 0.0)
    codes = torch.bucketize(relative, bounds(is_signed).to(flat.device)).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(tensor.shape), scales


def decode(codes: Tensor, scales: Tensor, *, is_signed: bool) -> Tensor:
    """The values in fp32, in the shape of `codes`."""
    of_each = scales.repeat_interleave(BLOCK_NUMEL)[: codes.numel()].view(codes.shape)
    return values(is_signed).to(codes.device)[codes.long()] * of_each


def read_state(
    states: Sequence[Tensor], scales: Sequence[Tensor], index: int, dtype: torch.dtype, *, is_signed: bool
) -> Tensor:
    """A state in `dtype`, whether it is kept as codes or as floats."""
    state = states[index]
    return (decode(state, scales[index], is_signed=is_signed) if state.dtype is torch.uint8 else state).to(dtype)


def write_state(
    states: Sequence[Tensor], scales: Sequence[Tensor], index: int, value: Tensor, *, is_signed: bool
) -> None:
    """Round `value` into the state, the other way round."""
    state = states[index]
    if state.dtype is not torch.uint8:
        state.copy_(value)
        return
    codes, of_blocks = encode(value, is_signed=is_signed)
    state.copy_(codes)
    scales[index].copy_(of_blocks)
