"""How signs of a flat tensor and a scale for each block lie in memory; refusals of what is no such layout.

Blocks are of neighbours, and each has a scale; the last may be short:

    numel 20, block_size 16    | block 0: 16 | block 1: 4 |
    signs   [3] uint8: element i in bit i % 8 of byte i / 8; 1 is negative; bits past the end are 0
    scales  [2] fp32: the mean magnitude of the block, NaN where it holds a NaN or an infinity
"""

from dataclasses import dataclass

from zcore.core.errors import ConfigError
from zcore.kernels import _cpu

__all__ = ["SignsLayout"]


@dataclass(frozen=True, slots=True)
class SignsLayout:
    """How the signs of one tensor lie in memory."""

    numel: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """How many scales there are; the last block may be short."""
        return -(-self.numel // self.block_size)

    @property
    def num_bytes(self) -> int:
        """How many bytes of signs there are."""
        return -(-self.numel // 8)

    def require(self, op: str) -> None:
        """Raise ConfigError for blocks that `op` cannot make."""
        if not 8 <= self.block_size <= _cpu.LARGEST_BLOCK_SIZE or self.block_size % 8:
            raise ConfigError(
                f"{op}: block_size is {self.block_size}; expected a multiple of 8 from 8 to {_cpu.LARGEST_BLOCK_SIZE}."
            )
        if self.numel < 0:
            raise ConfigError(f"{op}: numel is {self.numel}; expected 0 or more.")
