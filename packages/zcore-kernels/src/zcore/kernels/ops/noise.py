"""Noise for stochastic rounding from a counter: a function of seed and index alone, as native/cpu/noise.hpp has it.

Ranks, threads and devices round alike, whoever asks and in whatever order. Not for sampling, nor for cryptography.
"""

import torch
from torch import Tensor

__all__ = ["mixed_seed", "noise_at", "round_to_neighbour", "word_of"]

MASK_32 = (1 << 32) - 1
MASK_64 = (1 << 64) - 1


def noise_at(offset: int, numel: int, *, seed: int, device: torch.device) -> Tensor:
    """Noise of the elements `offset`, `offset` + 1 ...: [numel] int32, uniform in [0, 2^16)."""
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    pair, num_pairs = offset // 2, numel // 2 + 1  # one word is the noise of two, the even one below
    while num_pairs > 0:
        key = _mix(_mix(word_of(seed)) ^ (pair >> 32))
        first = pair & MASK_32
        run = min(num_pairs, (1 << 32) - first)  # up to where the upper half changes
        x = torch.arange(first, first + run, device=device) ^ (key & MASK_32)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK_32
        x = (((x ^ (x >> 15)) + (key >> 32)) & MASK_32) * 0x846CA68B & MASK_32  # int64 wraps; its lower half is right
        parts.append(x ^ (x >> 16))
        pair, num_pairs = pair + run, num_pairs - run
    words = torch.cat(parts)
    halves = torch.stack((words & 0xFFFF, words >> 16), 1).reshape(-1)
    return halves[offset % 2 : offset % 2 + numel].to(torch.int32)


def round_to_neighbour(values: Tensor, noise: Tensor | None) -> Tensor:
    """`values` (fp32) as integers: the nearest, ties to even; with noise the upper neighbour as often as it is near.

    noise: as of `noise_at`, added to as many bits after the point; values of less than 2^14.
    """
    if noise is None:
        return values.round()
    return (((values * 2.0**16).to(torch.int32) + noise) >> 16).float()


def word_of(seed: int) -> int:
    """`seed` in 64 bits without a sign."""
    return seed & MASK_64


def mixed_seed(seed: int) -> int:
    """`seed` mixed once, as keys of noise begin with it, as an int64: for kernels that cannot mix it once for all."""
    word = _mix(word_of(seed))
    return word - (word >> 63 << 64)


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)
