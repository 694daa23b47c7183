"""Quantised blocks: the formats, and how codes, scales and zero points of a flat tensor lie in memory.

Blocks are of neighbours, and each has a scale; the last may be short:

    numel 600, block_size 256    | block 0: 256 | block 1: 256 | block 2: 88 |
    codes        [600] int8 or fp8; int4: [300] uint8, two to a byte, the even element in the low half
    scales       [3] fp32
    zero_points  [3] int8; [0] where blocks are symmetric

    x ~ scale (code - zero_point)      a block with a NaN or an infinity has the scale NaN, and all of it reads as NaN
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, nearest
from zcore.kernels import _cpu
from zcore.kernels.ops.operands import check

__all__ = ["FORMATS", "Format", "Quantized", "QuantizedLayout", "format_named"]

Quantized = tuple[Tensor, Tensor, Tensor]  # codes, scales, zero_points


class Format(NamedTuple):
    """What a code is. Asymmetric integers use -2^(bits - 1) too, so `lowest` is of these."""

    number: int  # as zcore::Format counts them
    dtype: torch.dtype  # of codes
    largest: float
    lowest: float
    per_byte: int = 1
    mantissa_bits: int = 0
    smallest_normal: float = 0.0

    @property
    def is_integer(self) -> bool:
        """Whether it can have zero points."""
        return not self.mantissa_bits


FORMATS = {
    "int8": Format(0, torch.int8, 127.0, -128.0),
    "int4": Format(1, torch.uint8, 7.0, -8.0, per_byte=2),
    "float8_e4m3fn": Format(2, torch.float8_e4m3fn, 448.0, -448.0, mantissa_bits=3, smallest_normal=2.0**-6),
    "float8_e5m2": Format(3, torch.float8_e5m2, 57344.0, -57344.0, mantissa_bits=2, smallest_normal=2.0**-14),
}


def format_named(op: str, name: str) -> Format:
    """The format called `name`; ConfigError for what is none."""
    if name not in FORMATS:
        near = nearest(name, FORMATS)
        advice = f" Did you mean {near}?" if near else ""
        raise ConfigError(f"{op}: format is {name}; expected {', '.join(FORMATS)}.{advice}")
    return FORMATS[name]


@dataclass(frozen=True, slots=True)
class QuantizedLayout:
    """How one quantised tensor lies in memory."""

    numel: int
    block_size: int
    format: Format
    is_symmetric: bool

    @property
    def num_blocks(self) -> int:
        """How many scales there are; the last block may be short."""
        return -(-self.numel // self.block_size)

    @property
    def num_codes(self) -> int:
        """How many elements the tensor of codes has."""
        return -(-self.numel // self.format.per_byte)

    def require(self, op: str) -> None:
        """Raise ConfigError for blocks that `op` cannot make."""
        if not 1 <= self.block_size <= _cpu.LARGEST_BLOCK_SIZE or self.block_size % self.format.per_byte:
            even = "an even number " if self.format.per_byte > 1 else ""
            raise ConfigError(
                f"{op}: block_size is {self.block_size}; expected {even}from {self.format.per_byte} to "
                f"{_cpu.LARGEST_BLOCK_SIZE}. Common are 32 to 4096."
            )
        if self.numel < 0:
            raise ConfigError(f"{op}: numel is {self.numel}; expected 0 or more.")
        if not self.is_symmetric and not self.format.is_integer:
            raise ConfigError(f"{op}: {self.format.dtype} has no zero points; expected symmetric blocks.")

    def require_operands(
        self, op: str, codes: Tensor, scales: Tensor, zero_points: Tensor, *, device: torch.device, index: str = ""
    ) -> None:
        """Raise unless the tensors are of this layout, on `device`; `index` follows their names in messages."""
        check(op, f"codes{index}", codes, dtypes=(self.format.dtype,), numel=self.num_codes, device=device)
        check(op, f"scales{index}", scales, dtypes=(torch.float32,), numel=self.num_blocks, device=device)
        num_points = 0 if self.is_symmetric else self.num_blocks
        check(op, f"zero_points{index}", zero_points, dtypes=(torch.int8,), numel=num_points, device=device)

    def empty(self, device: torch.device) -> Quantized:
        """Memory for it: codes, scales, zero points."""
        return (
            torch.empty(self.num_codes, dtype=self.format.dtype, device=device),
            torch.empty(self.num_blocks, dtype=torch.float32, device=device),
            torch.empty(0 if self.is_symmetric else self.num_blocks, dtype=torch.int8, device=device),
        )

    def addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        """What compiled functions take for codes, scales and zero points."""
        codes, scales, zero_points = tensors
        return [codes.data_ptr(), scales.data_ptr(), 0 if self.is_symmetric else zero_points.data_ptr()]

    def raw(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """What Triton's kernels take for them: bytes for codes, and None for zero points that there are not."""
        codes, scales, zero_points = tensors
        return codes.view(torch.uint8), scales, None if self.is_symmetric else zero_points

    def in_blocks(self, values: Tensor) -> Tensor:
        """`values`, flat, as [num_blocks, block_size] with zeros at the end: for references."""
        padding = self.num_blocks * self.block_size - self.numel
        return torch.nn.functional.pad(values.reshape(-1), (0, padding)).view(self.num_blocks, self.block_size)

    def flat(self, blocks: Tensor) -> Tensor:
        """The other way round."""
        return blocks.reshape(-1)[: self.numel]
