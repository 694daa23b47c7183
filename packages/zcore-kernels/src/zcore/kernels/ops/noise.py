"""Noise for stochastic rounding from a counter: a function of seed and index alone, as native/cpu/noise.hpp has it.

32 bits of (seed, index), whoever asks, in whatever order: ranks, threads and devices round alike
"""

import torch
from torch import Tensor

__all__ = ["noise_at", "round_to_neighbour", "word_of"]

MASK_32 = (1 << 32) - 1
MASK_64 = (1 << 64) - 1


def noise_at(offset: int, numel: int, *, seed: int, device: torch.device) -> Tensor:
    """Noise of the elements `offset`, `offset` + 1 ...: [numel] int64, uniform in [0, 2^32)."""
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    while numel > 0:
        key = _mix(_mix(word_of(seed)) ^ (offset >> 32))
        first = offset & MASK_32
        run = min(numel, (1 << 32) - first)  # up to where the upper half of the index changes
        x = torch.arange(first, first + run, device=device) ^ (key & MASK_32)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK_32
        x = (((x ^ (x >> 15)) + (key >> 32)) & MASK_32) * 0x846CA68B & MASK_32  # int64 wraps; its lower half is right
        parts.append(x ^ (x >> 16))
        offset, numel = offset + run, numel - run
    return torch.cat(parts)


def round_to_neighbour(values: Tensor, noise: Tensor | None) -> Tensor:
    """`values` (fp32) as integers: the nearest, ties to even; with noise the upper neighbour as often as it is near."""
    if noise is None:
        return values.round()
    below = values.floor()
    return below + ((noise >> 8).float() * 2.0**-24 < values - below)


def word_of(seed: int) -> int:
    """`seed` in 64 bits without a sign."""
    return seed & MASK_64


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)
