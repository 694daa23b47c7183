"""What has to go on while a rank waits: calls of several steps, of any group, whose next step nobody else would take.

Ranks may wait for their calls in different orders. If one waits in group A and another in group B, each for a step that
the other has to take in its own turn, both would wait for ever, unless whoever waits takes the steps of all groups.

Waiting for the memory of a neighbour is a matter of nanoseconds or of seconds: first look again and again, then let
others have the processor, then sleep a little between looks. Waiting for another host never is one of nanoseconds, and
whoever looks again and again holds the lock of Python against the worker that its messages need: sleep at once.
"""

import os
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

import torch

from zcore.core.collectives import Pending

__all__ = [
    "LOCK",
    "STEP_S",
    "Polled",
    "Stepping",
    "advance_all",
    "has_steps",
    "in_mode_of_caller",
    "is_reached_napping",
    "is_reached_within",
    "note_closed",
    "note_open",
]

P = ParamSpec("P")
T = TypeVar("T")

LOOKS = 20
# Free where nobody else wants the processor; beside a busy process a sum of 4 MiB takes 0.3 ms, not 2.5. But there each
# may take as long as a turn of that process, 2000 of them seconds: the time that is given ends them, too.
YIELDS = 2000
# A yield that takes so long was somebody's turn. Whoever sleeps is woken soon, whoever yields again comes last again:
# at a load of 20 on 2 cores 4 KiB took 6.0 ms, and 2.2 by naps, as long as gloo.
TURN_S = 1e-3
NAP_S = 50e-6
STEP_S = 0.5e-3  # between looks at what other groups need, in a wait that is not for them


class Polled(Pending, Protocol):
    """A call that can be asked how it stands."""

    def poll(self) -> bool:
        """Whether `wait` would return at once; raises what it would raise."""
        ...


class Steps(Protocol):
    """A group whose calls have several steps."""

    def advance(self) -> None:
        """Do what can be done without waiting."""
        ...


# Held by whoever takes steps: a program may use groups from several threads, each group from one.
LOCK = threading.RLock()
_with_open_calls: dict[Steps, None] = {}  # of this process, in the order in which they came; asked at every look


def in_mode_of_caller(act: Callable[P, T]) -> Callable[P, T]:
    """`act`, for whichever thread comes to it: what was made under `torch.inference_mode` is written only under it."""
    if not torch.is_inference_mode_enabled():
        return act

    @wraps(act)
    def act_in_mode(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode():
            return act(*args, **kwargs)

    return act_in_mode


def note_open(group: Steps) -> None:
    """Have `group` advance whenever this process waits."""
    _with_open_calls[group] = None


def note_closed(group: Steps) -> None:
    """No call of `group` is open any more."""
    _with_open_calls.pop(group, None)


def has_steps() -> bool:
    """Whether a group has open calls."""
    return bool(_with_open_calls)


def advance_all() -> None:
    """Take what steps can be taken, in every group."""
    for group in tuple(_with_open_calls):
        group.advance()


def is_reached_within(is_reached: Callable[[], bool], time_s: float) -> bool:
    """Whether `is_reached()` becomes true in that time; meanwhile all groups advance."""
    for _ in range(LOOKS):
        if is_reached():
            return True
        advance_all()
    end = time.monotonic() + time_s
    for _ in range(YIELDS):
        before = time.monotonic()
        os.sched_yield()
        now = time.monotonic()
        if is_reached():
            return True
        if now > end:
            return False
        advance_all()
        if now - before > TURN_S:
            break
    return is_reached_napping(is_reached, end - time.monotonic())


def is_reached_napping(is_reached: Callable[[], bool], time_s: float) -> bool:
    """The same for what takes a message of another host: other threads of this process run meanwhile.

    4 KiB between 4 ranks of 2 hosts took 24 ms when `is_reached_within` waited for it, of which 21 were its looks.
    """
    end = time.monotonic() + time_s
    while not is_reached():
        if time.monotonic() > end:
            return False
        time.sleep(NAP_S)
        advance_all()
    return True


class Stepping:
    """A pending message of torch, whose wait cannot be interrupted: while it lasts, all groups advance."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Pending) -> None:
        self._inner = inner

    def wait(self) -> None:
        """See `Pending.wait`."""
        if not has_steps():
            self._inner.wait()
            return
        errors: list[Exception] = []

        def wait_apart() -> None:
            try:
                self._inner.wait()
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)

        thread = threading.Thread(target=wait_apart, name="zcore message", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(STEP_S)
            advance_all()
        if errors:
            raise errors[0]
