"""How products of groups of rows are cut into tiles: by how many rows an expert has on average, and by element size.

How many each has is known on the device alone, so that one tiling has to do for all experts. Pure. No size here has
been measured on a GPU yet; registers and shared memory are those that Triton 3.7 reports of what it compiles.
"""

from dataclasses import dataclass

__all__ = ["Tiling", "plan_gradient", "plan_product"]

LINE_BYTES = 128  # of a row, read at a time: a line of the cache
BAND = 8  # tiles of rows that take their turn beside one tile of columns, so that both are read again from the L2 cache


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile of the result, `rows` x `columns`, and how much of what is summed is multiplied at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def keywords(self) -> dict[str, int]:
        """As kernels take it."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "BAND": BAND,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def plan_product(operand_bytes: int, rows: float, columns: int, *, by_tensor_cores: bool = True) -> Tiling:
    """For operands of 2 or 4 bytes an element, and experts of so many rows, on average.

    128 x 128, with 128 bytes of a row at a time, multiplies each byte often enough that tensor cores seldom wait. It
    takes 64 KB of shared memory on sm_80 and 96 KB on sm_90; a program on sm_86 and sm_89 may have 99 KB. Experts of
    few rows, as in decoding, are bound by reading weights: a tile as low as tensor cores take, 16, wastes the fewest
    products, and a fourth stage keeps more reads on the way. Without tensor cores 64 x 64 takes 168 registers a thread,
    of the 255 that there are.

    >>> plan_product(2, 500.0, 4096)
    Tiling(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)
    >>> plan_product(2, 3.0, 4096)
    Tiling(rows=16, columns=128, depth=64, num_warps=4, num_stages=4)
    """
    most = 128 if by_tensor_cores else 64
    high, wide = _power_of_two(rows, most), _power_of_two(columns, most)
    num_stages = (3 if high > 64 else 4) if by_tensor_cores else 2
    return Tiling(high, wide, LINE_BYTES // operand_bytes, 8 if high * wide > 64 * 128 else 4, num_stages)


def plan_gradient(operand_bytes: int, rows: float, sides: tuple[int, int], *, by_tensor_cores: bool = True) -> Tiling:
    """For weights of `sides`; what is summed are rows, of which an expert has so many, on average.

    As `plan_product`, but that it is the depth that is small where rows are few.

    >>> plan_gradient(2, 20.0, (4096, 64))
    Tiling(rows=128, columns=64, depth=32, num_warps=4, num_stages=3)
    """
    most = 128 if by_tensor_cores else 64
    high, wide = (_power_of_two(side, most) for side in sides)
    depth = _power_of_two(rows, LINE_BYTES // operand_bytes)
    return Tiling(high, wide, depth, 8 if high * wide > 64 * 128 else 4, 3 if by_tensor_cores else 2)


def _power_of_two(number: float, most: int) -> int:
    """The one at or above `number`, from 16, the least that tensor cores multiply, to `most`."""
    return next(side for side in (16, 32, 64, 128) if side >= number or side == most)
