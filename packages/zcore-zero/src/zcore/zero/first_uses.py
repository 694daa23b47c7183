"""Which buckets nothing has read before a node of autograd was made: their gradients are final when that node runs.

    forward    a   b   c         numbers of autograd grow
    backward   c   b   a         and run from the largest: at b's node nothing can come for c any more

What was made later runs first. A backward may be of several forwards, so the uses of all are remembered that may still
get one: until a backward has run their nodes, or their graph is gone. Of a forward that is forgotten nothing is known,
and at its nodes nothing said:

    forwards   1 [3 .. 9]    2 forgotten    3 [31 .. 40]      numbers of their first uses
    nodes      -- known --   --- a gap ---  -- known --
"""

import weakref
from collections.abc import Container, Sequence

__all__ = ["FirstUses", "Graph"]

REMEMBERED_FORWARDS = 8  # one by one; older ones are remembered as one
ACCUMULATES = 2**62  # autograd's number of a node that accumulates a gradient is above all others


class Graph:
    """Stands for the graph of one forward: held by what its nodes hold, so that it lives as long as they do."""

    __slots__ = ("__weakref__",)


class _Forward:
    """The buckets that one forward, or several, have read, and autograd's number when each was first read."""

    def __init__(self) -> None:
        self.uses: dict[int, int] = {}
        self.first = self.last = -1  # of these numbers
        self.graphs = weakref.WeakSet[Graph]()  # those that live
        self.is_held = False  # whether nodes of all of it hold one
        self.is_one = True
        self.is_reached = False  # by a backward, one of whose nodes is its

    def note(self, index: int, number: int) -> None:
        """Read bucket `index`; -1: without autograd."""
        self.uses[index] = min(number, self.uses.get(index, number))
        if number >= 0:
            self.first = number if self.first == -1 else min(self.first, number)
            self.last = max(self.last, number)

    @property
    def is_gone(self) -> bool:
        """Whether its graph is known to be."""
        return self.is_held and not self.graphs

    def add(self, other: "_Forward") -> None:
        """Be both."""
        self.graphs.update(other.graphs)
        self.is_held = self.is_held and other.is_held
        self.is_one, self.is_reached = False, False  # whose a node is cannot be told
        for index, number in other.uses.items():
            self.note(index, number)


def _joined(gaps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in as few gaps as can be, ascending.

    >>> _joined([(7, 9), (0, 3), (2, 5), (5, 6)])
    [(0, 6), (7, 9)]
    """
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(gaps):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


class FirstUses:
    """Of the buckets that forwards read, by index: autograd's number when each was first read."""

    def __init__(self) -> None:
        self._forwards: list[_Forward] = []  # that may still get a backward
        self._graph: Graph | None = None  # of the last one
        self._taken: set[int] = set()  # in the backward under way
        # (first use, bucket), the last use at the end; None: to make
        self._untaken: list[tuple[int, int]] | None = None
        self._begun_at = -1  # the largest number of a node that a backward since the last forward has run
        self._gaps: list[tuple[int, int]] = []  # numbers from one, and below the other, are of forgotten forwards

    def begin_forward(self, now: int) -> None:
        """Forget forwards that have had their backward, or get none any more. now: the number of the next node."""
        self._graph = None
        kept, gaps, end = list[_Forward](), list[tuple[int, int]](), 0
        for forward in self._forwards:
            if self._is_over(forward):
                if not gaps or gaps[-1][1] != now:  # else one before it ends where this one does
                    gaps.append((end, now))
                continue
            if gaps and gaps[-1][1] == now and forward.first >= 0:
                gaps[-1] = gaps[-1][0], forward.first  # what lies in between belongs to the forgotten one
            kept.append(forward)
            end = forward.last + 1
        if not kept:
            gaps = [(0, now)] if self._forwards or self._gaps else []
        elif self._gaps:
            gaps = _joined([*(gap for gap in self._gaps if gap[0] < end), *gaps])
        if len(kept) > REMEMBERED_FORWARDS:
            kept[0].add(kept.pop(1))
            inside = [gap for gap in gaps if gap[1] <= kept[0].last]  # one at most, or there were more with each step
            gaps = _joined([*gaps, (inside[0][0], inside[-1][1])] if inside else gaps)
        self._forwards, self._gaps = [*kept, _Forward()], gaps
        self._begun_at = -1
        self._untaken = None

    def _is_over(self, forward: _Forward) -> bool:
        if forward.is_gone or forward.last == -1:
            return True
        return forward.is_reached if forward.is_held else forward.last <= self._begun_at

    def graph(self) -> Graph:
        """That of the last forward, to be held by its nodes."""
        if self._graph is None:
            self._graph = Graph()
            if not self._forwards:
                self._forwards.append(_Forward())
            self._forwards[-1].graphs.add(self._graph)
            self._forwards[-1].is_held = True
        return self._graph

    def note(self, index: int, number: int) -> None:
        """A forward reads it where autograd stands at `number`; -1 without autograd, as the backward may read it."""
        if not self._forwards:
            self._forwards.append(_Forward())
        self._forwards[-1].note(index, number)
        self._untaken = None

    def begin_backward(self, number: int) -> None:
        """A backward runs its first node that concerns us; one that accumulates says nothing, so it may be any."""
        latest = max((forward.last for forward in self._forwards), default=-1)
        self._begun_at = max(self._begun_at, latest if number >= ACCUMULATES else number)
        self.reach(number)

    def reach(self, number: int) -> None:
        """A backward has come to that node, which is of the last forward that had begun when it was made."""
        if number < ACCUMULATES:
            for forward in reversed(self._forwards):
                if 0 <= forward.first <= number:
                    forward.is_reached = forward.is_one
                    return

    def take_after(self, number: int, *, but: Container[int]) -> list[int]:
        """The buckets first read after node `number` was made, the last one first; each once in a backward.

        Not those of `but`.
        """
        if any(begin <= number < end for begin, end in self._gaps):
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
        for forward in self._forwards:
            for index, used_at in forward.uses.items():
                first[index] = min(used_at, first.get(index, used_at))
        return sorted((used_at, index) for index, used_at in first.items() if index not in self._taken)

    def end_backward(self) -> None:
        """The backward is over: in the next one all may be taken again."""
        self._taken.clear()
        self._untaken = None
