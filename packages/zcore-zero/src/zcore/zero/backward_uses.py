"""Where in a backward each bucket was used last, and what the backward has asked for just now.

A backward of autograd may run inside a node of another one, as that of a reentrant checkpoint does. What a node that
runs has used stays until it is done, since it may hold what it has read:

    backward 7    node 31 uses c     node 30 uses b
    backward 8                         node 12 uses a: c may go, b may not

Buckets go by index. Nothing here moves one.
"""

from collections.abc import Iterable

from zcore.core import compat

__all__ = ["BackwardUses"]

Place = tuple[int, object | None]  # a backward of autograd, and its node that runs
NOTHING: tuple[frozenset[int], frozenset[int]] = frozenset(), frozenset()


class BackwardUses:
    """Of all buckets, since the last `clear`."""

    def __init__(self) -> None:
        self._places: list[Place] = []  # each backward runs in the node of the one before
        self._used_at: dict[int, Place] = {}
        self._at_hand = NOTHING  # what was asked for last, and what was released all but

    def note(self, index: int) -> None:
        """The node that runs uses a bucket."""
        self._used_at[index] = self._here()

    def note_all(self, indices: frozenset[int], needed: frozenset[int]) -> None:
        """The backward has asked for `indices`, and all that is not `needed` was released."""
        self._at_hand = indices, needed

    def interrupt(self) -> None:
        """A bucket has moved, or another one is asked for."""
        self._at_hand = NOTHING

    def goes_on(self, indices: frozenset[int], needed: frozenset[int]) -> bool:
        """Whether the backward asks for what it has just got, as module after module of a block does."""
        return self._at_hand == (indices, needed) and self._uses_again(indices)

    def goes_on_reading(self, index: int) -> bool:
        """The same of one bucket."""
        return index in self._at_hand[0] and self._uses_again((index,))

    def is_held(self, index: int) -> bool:
        """Whether a node that runs has used it, of whichever backward."""
        self._here()
        return self._used_at.get(index) in self._places

    def clear(self) -> None:
        """No backward runs."""
        self._places.clear()
        self._used_at.clear()
        self.interrupt()

    def _uses_again(self, indices: Iterable[int]) -> bool:
        backward = compat.current_backward()
        if backward == -1 or self._places[-1][0] != backward:
            return False
        here = self._here()
        for index in indices:
            self._used_at[index] = here
        return True

    def _here(self) -> Place:
        """Where we are; backwards that have ended since are forgotten."""
        here = backward, _ = compat.current_backward(), compat.current_node()
        if len(self._places) == 1 and self._places[0][0] == backward:
            self._places[0] = here
            return here
        known = [each for each, _ in self._places]
        if backward in known:
            del self._places[known.index(backward) :]
        self._places.append(here)
        return here
