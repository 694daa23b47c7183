"""A promise about a figure, and whether it is kept."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import ge, le

__all__ = ["Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """`found` is a median where `low` and `high` are its quartiles."""

    name: str
    unit: str
    wanted: float
    is_limit: bool  # `wanted` is the most, else the least
    found: float
    low: float | None = None
    high: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the promise is kept."""
        keeps: Callable[[float, float], bool] = le if self.is_limit else ge
        return keeps(self.found, self.wanted)

    def to_dict(self) -> dict[str, object]:
        """For the report."""
        return {**asdict(self), "is_met": self.is_met}

    def __str__(self) -> str:
        spread = "" if self.low is None else f" ({self.low:.3f} - {self.high:.3f})"
        bound = "at most" if self.is_limit else "at least"
        verdict = "met   " if self.is_met else "MISSED"
        return f"{verdict} {self.name}: wanted {bound} {self.wanted:.2f}, found {self.found:.3f}{spread} {self.unit}"
