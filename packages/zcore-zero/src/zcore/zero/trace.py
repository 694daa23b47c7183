"""In which order a model uses its buckets, recorded in one step and relied upon in the next. Pure.

The recorded order says which gathers to start early and which buckets come back soon. When a step leaves it, nothing
breaks: gathers happen when a module asks, the new order is recorded, and the first departure is named.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, groupby

__all__ = ["Pass", "Trace", "Use", "plan_prefetch"]


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
    """The uses of this step so far, against those of the step before. `numel_of` a bucket counts distances."""

    def __init__(self, numel_of: Callable[[int], int] = lambda _: 0) -> None:
        self.recorded: tuple[Use, ...] = ()
        self._numel_of = numel_of
        # Of what is recorded, so that no question walks through it: asked at each use, that would be quadratic.
        self._places: dict[Use, list[int]] = {}
        self._numel_before: list[int] = [0]  # each position
        self._pass_ends: list[int] = []  # for each position, where the pass it is in ends
        self._current: list[Use] = []
        self.left_at: int | None = None  # position of the first use that was not the recorded one

    def begin(self) -> None:
        """A new step starts; what the last one did is now the expectation."""
        if self._current and (self.left_at is not None or len(self._current) != len(self.recorded)):
            self._record(tuple(self._current))
        self._current = []
        self.left_at = None

    def _record(self, uses: tuple[Use, ...]) -> None:
        self.recorded = uses
        self._numel_before = list(accumulate((self._numel_of(use.bucket) for use in uses), initial=0))
        self._places, self._pass_ends = {}, []
        for position, use in enumerate(uses):
            self._places.setdefault(use, []).append(position)
        for _, together in groupby(uses, key=lambda use: use.during):
            length = len(list(together))
            self._pass_ends += [len(self._pass_ends) + length] * length

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

    def returns_within(self, use: Use, *, distance_numel: int) -> bool:
        """Whether `use` is expected again in the same pass before `distance_numel` elements of other buckets are."""
        now = len(self._current)
        if self.left_at is not None or now >= len(self.recorded):
            return False
        places = self._places.get(use, [])
        following = bisect_left(places, now)
        if following == len(places) or places[following] >= self._pass_ends[now]:
            return False
        return self._numel_before[places[following]] - self._numel_before[now] <= distance_numel

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
