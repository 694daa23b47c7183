"""Rotary position embedding as a layer (arXiv 2104.09864), which owns its tables."""

import torch
from torch import Tensor, nn

from zcore.kernels.nn.serving import serving
from zcore.kernels.ops.rotary import reference

__all__ = ["Rotary"]


class Rotary(nn.Module):
    """Turns pair i of queries and keys by position / theta^(2i / width); it makes tables for `num_positions`."""

    cos: Tensor  # [num_positions, width] fp32
    sin: Tensor

    def __init__(self, width: int, *, num_positions: int, theta: float = 10000.0, is_interleaved: bool = False) -> None:
        super().__init__()
        self.is_interleaved = is_interleaved
        speeds = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), speeds)
        both = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat((angles, angles), -1)
        self.register_buffer("cos", both.cos().float(), persistent=False)
        self.register_buffer("sin", both.sin().float(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q: [..., heads, dim], k: [..., key_heads, dim], dim at least `width`; positions: [...] int64."""
        serve = serving("rotary", reference, q)
        turned: tuple[Tensor, Tensor] = serve(
            q.contiguous(), k.contiguous(), self.cos, self.sin, positions.contiguous(), self.is_interleaved
        )
        return turned
