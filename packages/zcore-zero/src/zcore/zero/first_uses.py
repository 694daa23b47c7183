"""Which buckets nothing has read before a node of autograd was made: their gradients are final when that node runs.

    forward    a   b   c         numbers of autograd grow
    backward   c   b   a         and run from the largest: at b's node nothing can come for c any more

What was made later runs first. A backward may be of any forward since the last one that had a backward, so the uses of
several are remembered; of a forward that is older nothing is known, and nothing said.
"""

from collections.abc import Container

from zcore.core import compat

__all__ = ["FirstUses"]

REMEMBERED_FORWARDS = 8  # that may still get a backward
ACCUMULATES = 2**62  # autograd's number of a node that accumulates a gradient is above all others


class FirstUses:
    """Of the buckets that forwards read, by index: autograd's number when each was first read."""

    def __init__(self) -> None:
        self._forwards: list[dict[int, int]] = []  # that may still get a backward
        self._taken: set[int] = set()  # in the backward under way
        self._untaken: list[tuple[int, int]] | None = (
            None  # (first use, bucket), the last use at the end; None: to make
        )
        self._begun_at = -1  # the largest number of a node that a backward since the last forward has run
        self._known_from = 0  # of nodes with smaller numbers the forwards are forgotten

    def begin_forward(self) -> None:
        """Forget forwards before the last backward. Should one of them get a backward yet, nothing is known."""
        known = self._forwards
        while known and (max(known[0].values(), default=-1) <= self._begun_at or len(known) > REMEMBERED_FORWARDS):
            del known[0]
            self._known_from = compat.sequence_number()
        if known:
            self._known_from = min((number for number in known[0].values() if number >= 0), default=self._known_from)
        known.append({})
        self._begun_at = -1
        self._untaken = None

    def note(self, index: int, number: int) -> None:
        """A forward reads it where autograd stands at `number`; -1 without autograd, as the backward may read it."""
        if not self._forwards:
            self._forwards.append({})
        known = self._forwards[-1]
        known[index] = min(number, known.get(index, number))
        self._untaken = None

    def begin_backward(self, number: int) -> None:
        """A backward runs its first node that concerns us; one that accumulates says nothing, so it may be any."""
        latest = max((max(known.values(), default=-1) for known in self._forwards), default=-1)
        self._begun_at = max(self._begun_at, latest if number >= ACCUMULATES else number)

    def take_after(self, number: int, *, but: Container[int]) -> list[int]:
        """The buckets first read after node `number` was made, the last one first; each once in a backward.

        Not those of `but`.
        """
        if number < self._known_from:
            return []
        if self._untaken is None:
            self._untaken = self._sorted()
        found: list[tuple[int, int]] = []
        left: list[tuple[int, int]] = []
        while self._untaken and self._untaken[-1][0] > number:
            use = self._untaken.pop()
            (left if use[1] in but else found).append(use)
        self._untaken += reversed(left)
        indices = [index for _, index in found]
        self._taken.update(indices)
        return indices

    def _sorted(self) -> list[tuple[int, int]]:
        first: dict[int, int] = {}
        for known in self._forwards:
            for index, used_at in known.items():
                first[index] = min(used_at, first.get(index, used_at))
        return sorted((used_at, index) for index, used_at in first.items() if index not in self._taken)

    def end_backward(self) -> None:
        """The backward is over: in the next one all may be taken again."""
        self._taken.clear()
        self._untaken = None
