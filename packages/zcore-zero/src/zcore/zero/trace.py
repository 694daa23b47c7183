"""In which order a model uses its buckets, recorded in one step and relied upon in the next. Pure.

The recorded order says which gathers to start early and which buckets come back soon. When a step leaves it, nothing
breaks: gathers happen when a module asks, the new order is recorded, and the first departure is named.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

__all__ = ["Pass", "Trace", "Use", "plan_prefetch", "returns_within"]


class Pass(Enum):
    """Which half of a step a bucket is used in."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a bucket, by index in the plan."""

    bucket: int
    during: Pass


class Trace:
    """The uses of this step so far, against those of the step before."""

    def __init__(self) -> None:
        self.recorded: tuple[Use, ...] = ()
        self._current: list[Use] = []
        self.left_at: int | None = None  # position of the first use that was not the recorded one

    def begin(self) -> None:
        """A new step starts; what the last one did is now the expectation."""
        if self._current:
            self.recorded = tuple(self._current)
        self._current = []
        self.left_at = None

    def add(self, use: Use) -> bool:
        """Note `use`; False exactly once a step, at the first use that departs from the recorded order."""
        if self._current and self._current[-1] == use:
            return True
        position = len(self._current)
        self._current.append(use)
        if self.left_at is None and position < len(self.recorded) and self.recorded[position] != use:
            self.left_at = position
            return False
        return True

    @property
    def has_just_begun(self) -> bool:
        """Whether the last use was the first of its step."""
        return len(self._current) == 1

    @property
    def upcoming(self) -> Iterator[Use]:
        """What is expected after the last use; nothing once the step has left the recorded order."""
        if self.left_at is None:
            for position in range(len(self._current), len(self.recorded)):
                yield self.recorded[position]


def plan_prefetch(
    upcoming: Iterable[Use], *, numel_of: Callable[[int], int], is_held: Callable[[int], bool], budget_numel: int
) -> list[int]:
    """The next buckets to gather early, in order of use, up to `budget_numel` elements together.

    >>> uses = [Use(1, Pass.FORWARD), Use(2, Pass.FORWARD), Use(1, Pass.FORWARD), Use(3, Pass.FORWARD)]
    >>> plan_prefetch(uses, numel_of=lambda bucket: 10, is_held=lambda bucket: bucket == 1, budget_numel=15)
    [2]
    """
    planned: list[int] = []
    for use in upcoming:
        if use.bucket in planned or is_held(use.bucket):
            continue
        budget_numel -= numel_of(use.bucket)
        if budget_numel < 0:
            break
        planned.append(use.bucket)
    return planned


def returns_within(upcoming: Iterable[Use], use: Use, *, numel_of: Callable[[int], int], distance_numel: int) -> bool:
    """Whether `use` comes again in the same pass before `distance_numel` elements of other buckets are used."""
    for other in upcoming:
        if other == use:
            return True
        if other.during is not use.during:
            return False
        distance_numel -= numel_of(other.bucket)
        if distance_numel < 0:
            return False
    return False
