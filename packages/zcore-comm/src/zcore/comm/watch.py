"""What every rank is doing, told to the others through the rendezvous store, so that who is missing can be named.

    card       of a rank: a count that grows, and its journals; written twice a second by a thread of its own, so that
               the last one is there when the rank is killed or stopped
    journal    of a rank in a group: how many calls it has started and finished, a digest of all of them in their
               order, the last ones in words, and in which line of the program it is

Nobody reads cards until a call takes a second. Then whoever waits looks for a call that another rank made differently
(the digests differ), for a process that has ended, and, when the deadline has passed, for who never came.
"""

import atexit
import json
import logging
import os
import sys
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from zcore.comm.home import Home
from zcore.core import compat
from zcore.core.collectives import Call, contents_of, tag_of
from zcore.core.errors import CollectiveError, MismatchError, ZcoreError

__all__ = ["ALIKE", "TELL_S", "Journal", "Watch", "program_line", "watch_of_run"]

logger = logging.getLogger(__name__)

BEAT_S = 0.5
RANKS_PER_BEAT_S = 500  # a larger run writes its cards more rarely, to spare the store
REMEMBERED_CALLS = 16
MAX_TAG = (1 << 28) - 1  # gloo has 31 bits; the rest is for steps of a call
FIRST_LOOK_S, MAX_LOOK_S = 1.0, 8.0  # after which those who wait look what the others do
TELL_S = 30.0  # a wait of such length is told to the user
RELAYED: dict[str, type[ZcoreError]] = {each.__name__: each for each in (CollectiveError, MismatchError)}
FIRST_WORDS = "First seen by rank"
ALIKE = (
    "Every rank makes the same calls, of the same sizes, in the same order: look for a branch that ranks take "
    "differently, or data of different shapes."
)
SILENT_S = 5.0  # without a sign of life for so long, a rank is called stopped or unreachable


@dataclass(frozen=True, slots=True)
class Sight:
    """One rank of a group as its last card shows it."""

    started: int
    finished: int
    calls: dict[int, tuple[int, str]]  # index -> digest up to it, words
    line: str


class Journal:
    """What this rank has called in one group. `homes` tells where each rank lives, by rank in the group."""

    def __init__(self, watch: "Watch", key: str, homes: Sequence[Home], *, rank: int, deadline_s: float) -> None:
        self.key = key
        self.homes = homes
        self.rank = rank
        self.deadline_s = deadline_s
        self.started = self.finished = 0
        self._digest = 0
        self._calls: deque[tuple[int, int, str]] = deque(maxlen=REMEMBERED_CALLS)
        self._watch = watch
        self._followed: deque[tuple[Call, Callable[[], bool], float]] = deque()
        self._next_look_s = FIRST_LOOK_S

    def start(self, call: Call) -> int:
        """A call begins. What is returned tells its messages apart; equal on ranks that have made the same calls."""
        self._digest = zlib.crc32(tag_of(call).to_bytes(4, "little"), self._digest)
        self._calls.append((call.index, self._digest, str(call)))
        self.started = call.index + 1
        self._watch.go_on()
        return self._digest & MAX_TAG

    def finish(self, call: Call) -> None:
        """A call is done."""
        self.finished = call.index + 1

    def as_card(self) -> dict[str, Any]:
        """What the others read."""
        return {
            "started": self.started,
            "finished": self.finished,
            "calls": list(self._calls),
        }

    def wait_for(self, call: Call, is_done_within: Callable[[float], bool]) -> None:
        """Return once `is_done_within(seconds)`, looking after the others meanwhile, ever more rarely.

        Raises MismatchError for a call that another rank made differently, CollectiveError if a rank has ended or the
        deadline has passed.
        """
        if is_done_within(FIRST_LOOK_S):
            return
        began, look_s, has_told = time.monotonic() - FIRST_LOOK_S, FIRST_LOOK_S, False
        while True:
            trouble = self.find_trouble(call)
            if trouble is not None and not is_done_within(0):
                raise trouble
            waited_s = time.monotonic() - began
            if waited_s >= self.deadline_s:
                raise self.failure(call, f"the timeout of {self.deadline_s:.3g} s has passed")
            if waited_s >= TELL_S and not has_told:
                has_told = True
                logger.warning("Waiting for %s since %.0f s. %s", call, waited_s, self.whom_it_lacks(call))
            if is_done_within(min(look_s, self.deadline_s - waited_s)):
                return
            look_s = min(2 * look_s, MAX_LOOK_S)

    def follow(self, call: Call, is_done: Callable[[], bool]) -> None:
        """Have the watch's thread look after a call that no host waits for, and tell of trouble in the log."""
        self._followed.append((call, is_done, time.monotonic()))

    def look_after_followed(self) -> None:
        """Finish what is done, and tell, once, what keeps the oldest of the others."""
        while self._followed and self._followed[0][1]():
            self.finish(self._followed.popleft()[0])
            self._next_look_s = FIRST_LOOK_S
        if not self._followed:
            return
        call, _, began = self._followed[0]
        waited_s = time.monotonic() - began
        if waited_s < self._next_look_s:
            return
        self._next_look_s *= 2
        trouble = self.find_trouble(call)
        if trouble is None and waited_s >= self.deadline_s:
            trouble = self.failure(call, f"the timeout of {self.deadline_s:.3g} s has passed")
        if trouble is not None:
            self._next_look_s = float("inf")
            logger.error("%s: %s", type(trouble).__name__, trouble)

    def find_trouble(self, call: Call) -> ZcoreError | None:
        """Why `call`, for which this rank waits, cannot complete; None as long as it still may."""
        own = {index: (digest, words) for index, digest, words in tuple(self._calls)}
        ended = []
        for rank, sight in self._sights():
            home = self.homes[rank]
            reason = self._watch.reason_of(home.global_rank)
            if reason is not None:
                return self._watch.give_up(reason)
            if sight is not None:
                different = next((i for i in sorted(own) if i in sight.calls and sight.calls[i][0] != own[i][0]), None)
                if different is not None:
                    words = (
                        f"Call {different} of this group is {own[different][1]} on rank "
                        f"{self.homes[self.rank].global_rank}, and {sight.calls[different][1]} on rank "
                        f"{home.global_rank}, which is {sight.line}. {ALIKE}"
                    )
                    return self._watch.give_up(MismatchError(words))
            if home.has_ended():
                ended.append(home.global_rank)
        return self.failure(call, f"rank {ended[0]} has raised, was killed, or left") if ended else None

    def failure(self, call: Call, reason: str) -> ZcoreError:
        """The error that tells what every rank whom `call` lacks did last; the others are told of it."""
        return self._watch.give_up(
            CollectiveError(
                f"{call} did not complete: {reason}. {self.whom_it_lacks(call)}{contents_of(call.label)} Look for the "
                "first error in the output of the ranks named, mend it, and restart all ranks from the last checkpoint."
            )
        )

    def whom_it_lacks(self, call: Call) -> str:
        """In words: which ranks have not arrived, what they did last, and which have."""
        lines, arrived = [], []
        for rank, sight in self._sights():
            home = self.homes[rank]
            who = f"rank {home.global_rank}"
            state = home.state(silent=self._watch.silent_s(home.global_rank) >= SILENT_S)
            if sight is None:
                lines.append(f"{who} ({state}), it has told nothing of this group")
            elif sight.started > call.index and not home.has_ended() and not home.is_stopped():
                arrived.append(str(home.global_rank))
            else:
                last = (
                    f"its last call was {sight.calls[max(sight.calls)][1]}" if sight.calls else "it had told of no call"
                )
                lines.append(f"{who} ({state}), {last}, {sight.line}")
        return f"Missing: {'; '.join(lines) or 'none'}. Arrived: {', '.join([*arrived, 'this one'])}."

    def _sights(self) -> list[tuple[int, Sight | None]]:
        """The other ranks, and what they have told of this group."""
        return [
            (rank, self._watch.sight(home.global_rank, self.key))
            for rank, home in enumerate(self.homes)
            if rank != self.rank
        ]


class Watch:
    """This process's card, and a view of the others'."""

    def __init__(self, store: compat.Store, *, global_rank: int, world_size: int) -> None:
        self._store = store
        self._own_key = _key(global_rank)
        self._interval_s = max(BEAT_S, world_size / RANKS_PER_BEAT_S)
        self._journals: weakref.WeakValueDictionary[str, Journal] = weakref.WeakValueDictionary()
        self._count = 0
        self._seen: dict[int, tuple[int, float]] = {}  # global rank -> count of its last card, when that was new
        self._given_up: tuple[str, str] | None = None  # kind and words of the error that ended this rank's part
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zcore watch", daemon=True)
        self.beat()
        self._thread.start()
        atexit.register(self._end)  # a thread that talks to the store while Python goes would end the process

    def open(self, key: str, homes: Sequence[Home], *, rank: int, deadline_s: float) -> Journal:
        """A journal for a group; `key` is equal on all its ranks."""
        with self._lock:
            number = sum(1 for each in self._journals if each.split("#")[0] == key)
            journal = Journal(self, f"{key}#{number}", homes, rank=rank, deadline_s=deadline_s)
            self._journals[journal.key] = journal
        self.beat()
        return journal

    def beat(self) -> None:
        """Write this rank's card now."""
        with self._lock:
            self._count += 1
            groups = {key: journal.as_card() for key, journal in list(self._journals.items())}
            card = {"count": self._count, "line": program_line(), "groups": groups, "given_up": self._given_up}
            try:
                self._store.set(self._own_key, json.dumps(card))
            except RuntimeError as error:  # whoever holds the store is gone; what others hold of us stays as it is
                logger.debug("The store takes no more cards: %s", error)
                self._has_ended.set()

    def sight(self, global_rank: int, key: str) -> Sight | None:
        """What a rank has told of group `key`; None if nothing, or if the store is gone."""
        card = self._card(global_rank)
        if card is None or key not in card["groups"]:
            return None
        told = card["groups"][key]
        calls = {index: (digest, words) for index, digest, words in told["calls"]}
        return Sight(told["started"], told["finished"], calls, card["line"])

    def give_up(self, error: ZcoreError) -> ZcoreError:
        """Tell the others at once of an error that ends this rank's part in the run; the same error."""
        self._given_up = type(error).__name__, str(error)
        self.beat()
        return error

    def go_on(self) -> None:
        """This rank makes calls again."""
        self._given_up = None

    def reason_of(self, global_rank: int) -> ZcoreError | None:
        """The error of a rank that has given up, to be raised here, too."""
        card = self._card(global_rank)
        if card is None or card["given_up"] is None:
            return None
        kind, words = card["given_up"]
        return RELAYED[kind](words if words.startswith(FIRST_WORDS) else f"{FIRST_WORDS} {global_rank}: {words}")

    def line_of(self, global_rank: int) -> str:
        """In which line a rank was when it last told."""
        card = self._card(global_rank)
        return "in a line it has not told" if card is None else str(card["line"])

    def silent_s(self, global_rank: int) -> float:
        """For how long a rank has written no new card, as far as this rank has looked."""
        self._card(global_rank)
        return time.monotonic() - self._seen[global_rank][1] if global_rank in self._seen else 0.0

    def _card(self, global_rank: int) -> dict[str, Any] | None:
        try:
            if not self._store.check([_key(global_rank)]):
                return None
            card: dict[str, Any] = json.loads(self._store.get(_key(global_rank)))
        except RuntimeError:
            return None
        if self._seen.get(global_rank, (0, 0.0))[0] != card["count"]:
            self._seen[global_rank] = card["count"], time.monotonic()
        return card

    def _run(self) -> None:
        while not self._has_ended.wait(self._interval_s):
            self.beat()
            for journal in list(self._journals.values()):
                journal.look_after_followed()

    def _end(self) -> None:
        self._has_ended.set()
        self._thread.join()


def _key(global_rank: int) -> str:
    return f"zcore.watch/{global_rank}"


def watch_of_run() -> Watch:
    """The watch of this process over the run that it belongs to."""
    return _watch_over(compat.default_store(), os.getpid())


@cache
def _watch_over(store: compat.Store, process: int) -> Watch:
    return Watch(compat.another_client_of(store), global_rank=dist.get_rank(), world_size=dist.get_world_size())


@cache
def _others_folders() -> tuple[str, ...]:
    """Of torch, of all zcore wheels, and of Python."""
    packages = [folder for package in ("torch", "zcore") for folder in sys.modules[package].__path__]
    return tuple(f"{folder}{os.sep}" for folder in [*packages, os.path.dirname(os.__file__)])  # noqa: PTH120


def _is_users(file: str) -> bool:
    *packages, python = _others_folders()
    if file.startswith((*packages, "<")):
        return False
    return "site-packages" in file or not file.startswith(python)


def program_line() -> str:
    """In which line of the user's program the main thread is, such as "at train.py:40 in step"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "in no line of the program"
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
