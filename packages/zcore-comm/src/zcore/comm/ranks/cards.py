"""What every rank tells the others through the rendezvous store: one card for each process, under a key of its life.

    own      written twice a second, and at once when a rank gives up; the last one stays when its rank is killed
    others'  read only when somebody asks

A thread of its own does both. The store may be held by a rank that is stopped, and then never answers: who asks waits
for the thread a second at most, and goes on with what was known. A process that joins another run has another life, so
that no card of the former is taken for one of the new.
"""

import atexit
import json
import logging
import os
import queue
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from zcore.core import compat

__all__ = ["CallWord", "Cards", "GaveUp", "GroupWord", "Told", "cards_of_run", "program_line"]

logger = logging.getLogger(__name__)

BEAT_S = 0.5
RANKS_PER_BEAT_S = 500  # a larger run writes its cards more rarely, to spare the store
ANSWER_S = 1.0  # how long anybody waits for the store
SILENT_BEATS = 10  # a card that has not changed for so long belongs to a process that gives no sign of life


@dataclass(frozen=True, slots=True)
class CallWord:
    """One call of a rank in a group."""

    index: int
    fingerprint: int  # of the call alone
    digest: int  # of all calls up to it
    words: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The error that ended a rank's part in a group."""

    kind: str
    words: str
    index: int  # of the call that it ended; a rank may have gone on with later ones


@dataclass(frozen=True, slots=True)
class GroupWord:
    """What a rank leaves word of in one group."""

    started: int  # how many calls
    calls: tuple[CallWord, ...]  # the last ones
    given_up: GaveUp | None

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> "GroupWord":
        """Of what `dataclasses.astuple` gave, in types of JSON."""
        started, calls, given_up = plain
        return cls(started, tuple(CallWord(*each) for each in calls), given_up and GaveUp(*given_up))


@dataclass(frozen=True, slots=True)
class Told:
    """A card of another rank."""

    groups: Mapping[str, GroupWord]  # by key
    line: str  # of its program
    has_moved: bool | None  # whether it has been seen to change of late; None if it is too early to say
    count: int  # of the card, one more for each


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest card of a process, as this rank has looked."""

    count: int  # of the card
    since: float  # when it was new
    is_first: bool  # none was seen before it
    groups: Mapping[str, GroupWord]
    line: str


class Source(Protocol):
    """Something of which word is left."""

    @property
    def key(self) -> str:
        """Under which the others find it."""
        ...

    def word(self) -> GroupWord:
        """What is said."""
        ...

    def look_after(self) -> None:
        """Called by the cards' thread with every beat."""
        ...


class Cards:
    """This process's card, and the others'."""

    def __init__(self, store: compat.Store, *, world_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.life = secrets.randbits(63)
        self.process = os.getpid()
        self.answers = True  # whether the store answered the last question
        self._store = store
        self._clock = clock
        self.interval_s = max(BEAT_S, world_size / RANKS_PER_BEAT_S)
        self._silent_s = SILENT_BEATS * self.interval_s
        self._sources: list[weakref.ref[Source]] = []
        self._count = 0
        self._line = "in no line of the program"  # at its end, the last one it was seen in
        self._seen: dict[int, _Seen] = {}  # by life
        self._failed: set[str] = set()  # what of the thread's work
        self._requests: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="zcore cards", daemon=True)
        self._thread.start()
        atexit.register(self.end)  # a thread that talks to the store while Python goes would end the process

    def add(self, source: Source) -> None:
        """Have word of `source` on the card as long as it lives."""
        self._sources.append(weakref.ref(source))
        self._ask(self._write, wait_s=0)

    def write(self) -> None:
        """Write the card now."""
        self._ask(self._write, wait_s=ANSWER_S)

    def read(self, lives: Sequence[int]) -> dict[int, Told]:
        """The cards of processes, by life, as far as they are known."""
        self._ask(lambda: self._fetch(lives), wait_s=ANSWER_S)
        return self._known(lives)

    def read_here(self, lives: Sequence[int]) -> dict[int, Told]:
        """The same in the cards' own thread, for a source that looks after its calls."""
        self._fetch(lives)
        return self._known(lives)

    def _known(self, lives: Sequence[int]) -> dict[int, Told]:
        return {
            life: Told(seen.groups, seen.line, self._has_moved(seen), seen.count)
            for life, seen in list(self._seen.items())
            if life in lives
        }

    def _has_moved(self, seen: _Seen) -> bool | None:
        """See Told."""
        if self._clock() - seen.since >= self._silent_s:
            return False
        return None if seen.is_first else True

    def tell(self, key: str) -> None:
        """Leave word under a key of the caller's."""
        self._ask(lambda: self._store.set(f"zcore.told/{key}", "1"), wait_s=0)

    def told(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` under which somebody has left word."""
        found: set[str] = set()
        self._ask(
            lambda: found.update(key for key in keys if self._store.check([f"zcore.told/{key}"])), wait_s=ANSWER_S
        )
        return set(found)

    def end(self) -> None:
        """Write a last card, and no more."""
        self._requests.put(None)
        if self.process == os.getpid():
            self._thread.join(ANSWER_S)

    def _ask(self, act: Callable[[], None], *, wait_s: float) -> bool:
        """Have the thread do it; whether it was done within that time."""
        if not self._thread.is_alive():
            self.answers = False
            return False
        done = threading.Event()
        self._requests.put((act, done))
        if not wait_s:
            return True
        self.answers = done.wait(wait_s if self.answers else wait_s / 10)  # nobody waits in full for the same silence
        return self.answers

    def _run(self) -> None:
        last_s = time.monotonic()
        try:
            while True:
                try:
                    request = self._requests.get(timeout=max(0.0, last_s + self.interval_s - time.monotonic()))
                except queue.Empty:
                    last_s = time.monotonic()
                    self._try("Writing the card", self._write)
                    for source in self._living():
                        self._try(f"Looking after the calls of {source.key}", source.look_after)
                    continue
                if request is None:
                    self._try("Writing the card", self._write)
                    return
                act, done = request
                self._try("An answer", act)
                done.set()
        except dist.DistError as error:  # whoever holds the store is gone; what others know of us stays as it is
            logger.debug("The store takes no more cards: %s", error)

    def _try(self, what: str, act: Callable[[], None]) -> None:
        """One fault, which is told once, must not end the watch of all groups."""
        try:
            act()
        except dist.DistError:
            raise  # of the store
        except Exception:
            if what not in self._failed:
                logger.exception("%s failed in the watch over calls, and may do so again. Report this.", what)
            self._failed.add(what)

    def _living(self) -> list[Source]:
        found = [(each, each()) for each in tuple(self._sources)]
        for each, source in found:
            if source is None:
                self._sources.remove(each)
        return [source for _, source in found if source is not None]

    def _write(self) -> None:
        self._count += 1
        groups = {source.key: astuple(source.word()) for source in self._living()}
        self._line = program_line() or self._line
        card = {"count": self._count, "line": self._line, "groups": groups}
        self._store.set(_key(self.life), json.dumps(card))

    def _fetch(self, lives: Sequence[int]) -> None:
        for life in lives:
            if not self._store.check([_key(life)]):
                continue
            card = json.loads(self._store.get(_key(life)))
            before = self._seen.get(life)
            if before is None or before.count != card["count"]:
                groups = {key: GroupWord.from_plain(plain) for key, plain in card["groups"].items()}
                is_first = before is None
                self._seen[life] = _Seen(card["count"], self._clock(), is_first, groups, card["line"])


def _key(life: int) -> str:
    return f"zcore.card/{life}"


_current: list[tuple[compat.Store, Cards]] = []  # of this process: one at most
_changing = threading.Lock()  # threads may come to the first uses of their groups at a time


def cards_of_run() -> Cards:
    """The cards of the run that this process is part of; another run gets other ones."""
    store = compat.default_store()
    with _changing:
        if _current and (_current[0][0] is not store or _current[0][1].process != os.getpid()):
            _current.pop()[1].end()
        if not _current:
            _current.append((store, Cards(compat.another_client_of(store), world_size=dist.get_world_size())))
        return _current[0][1]


@cache
def _others_folders() -> tuple[str, ...]:
    """Of torch, of all zcore wheels, and of Python."""
    packages = [folder for package in ("torch", "zcore") for folder in sys.modules[package].__path__]
    return tuple(f"{folder}{os.sep}" for folder in [*packages, str(Path(os.__file__).parent)])


def _is_users(file: str) -> bool:
    *packages, python = _others_folders()
    if file.startswith((*packages, "<")):
        return False
    return "site-packages" in file or not file.startswith(python)


def program_line() -> str | None:
    """In which line of the user's program the main thread is, such as "at train.py:40 in step"; None in none."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
