"""Which part of a matrix [rows, hidden] one program of a kernel takes. Pure, but for the size of the device.

    whole rows        norms: a tile is as wide as a row, in registers from the one read to the one write
    pieces of rows    elementwise ops: a tile is at most PIECE wide

Sums over rows are taken by a fixed number of programs, each of every so many-th tile, and their partial sums added in
order: no atomics, so that a device gives the same bits in every run. No size here has been measured on a GPU yet.
"""

from dataclasses import dataclass

import torch

from zcore.core.errors import ConfigError

__all__ = ["LONGEST_ROW", "Tile", "num_programs", "plan_pieces", "plan_whole_rows"]

LONGEST_ROW = 1 << 16  # elements; at 32 warps already 64 a thread
PIECE = 1024
WARP = 32
PER_THREAD = 16  # elements: two loads of 16 bytes, where an element has two


@dataclass(frozen=True, slots=True)
class Tile:
    """Both sides are powers of two, as Triton wants them."""

    rows: int
    columns: int

    @property
    def num_warps(self) -> int:
        """So many that a thread has PER_THREAD elements, in the bounds of a program."""
        return min(max(self.rows * self.columns // (WARP * PER_THREAD), 2), 32)


def plan_whole_rows(op: str, hidden: int) -> Tile:
    """A tile of rows as they are, several where they are short.

    Raises ConfigError for rows longer than LONGEST_ROW.

    >>> plan_whole_rows("rms_norm", 4000)
    Tile(rows=1, columns=4096)
    >>> plan_whole_rows("rms_norm", 128)
    Tile(rows=8, columns=128)
    """
    if hidden > LONGEST_ROW:
        raise ConfigError(
            f"{op}: rows have {hidden} elements; Triton's kernel takes {LONGEST_ROW} at most. Use the reference: "
            "ZCORE_OPS=reference."
        )
    columns = _power_of_two(hidden)
    return Tile(max(1, PIECE // columns), columns)


def plan_pieces(hidden: int) -> Tile:
    """A tile of PIECE elements, of one row or of several that are shorter.

    >>> plan_pieces(5000), plan_pieces(200)
    (Tile(rows=1, columns=1024), Tile(rows=4, columns=256))
    """
    columns = min(_power_of_two(hidden), PIECE)
    return Tile(PIECE // columns, columns)


def num_programs(device: torch.device, *, on_each: int = 4) -> int:
    """How many programs fill `device`, so many on each multiprocessor; of the interpreter 4, for tests."""
    return on_each * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
