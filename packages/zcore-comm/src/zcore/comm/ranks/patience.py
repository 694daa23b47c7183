"""How long a rank waits for others: when it looks what they do, when the user is told, and when it is over."""

import time
from collections.abc import Callable

__all__ = ["TELL_S", "Patience"]

FIRST_LOOK_S, MAX_LOOK_S = 1.0, 8.0
TELL_S = 30.0  # a wait of such length is told to the user


class Patience:
    """One wait, from now on. Looks are due after 1 s, and ever more rarely: 2, 4, 8, 16, 24, ... and at its end."""

    def __init__(self, deadline_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline_s = deadline_s
        self._clock = clock
        self._began = clock()
        self._next_look_s = FIRST_LOOK_S
        self._has_told = False

    @property
    def waited_s(self) -> float:
        """Since when, in seconds."""
        return self._clock() - self._began

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.waited_s >= self._deadline_s

    @property
    def pause_s(self) -> float:
        """Seconds until the next look."""
        return max(0.0, min(self._next_look_s, self._deadline_s) - self.waited_s)

    def looks_now(self) -> bool:
        """Whether a look is due. It counts as done."""
        if self.pause_s:
            return False
        self._next_look_s += min(self._next_look_s, MAX_LOOK_S)
        return True

    def tells_now(self) -> bool:
        """Whether the user is to be told: once."""
        if self._has_told or self.waited_s < TELL_S:
            return False
        self._has_told = True
        return True
