"""What this rank has called in one group, what the others say of theirs, and why a call does not complete.

A journal counts the calls that a rank has started and finished, and holds a running digest of them and the last ones in
words. It is part of the process's card (cards.py). Whoever waits for a call longer than a second looks for one that
another rank made differently (the digests differ), for a process that has ended before it came, for a rank that has
given up, and, when the deadline has passed, for who never came.
"""

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

from zcore.comm.ranks.cards import CallWord, Cards, GaveUp, GroupWord, Told, program_line
from zcore.comm.ranks.home import Home
from zcore.comm.ranks.patience import Patience
from zcore.comm.ranks.words import (
    AFTER_FAILURE,
    Missing,
    about_missing,
    differed_before,
    differs,
    failed,
    has_left,
    has_passed,
)
from zcore.core.collectives import Call, tag_of
from zcore.core.errors import CollectiveError, MismatchError, ZcoreError
from zcore.core.exchange import STEP_TAGS

__all__ = ["Journal"]

logger = logging.getLogger(__name__)

SILENT_BEATS = 4  # without a new card, once a connection is lost
REMEMBERED_CALLS, MAX_REMEMBERED_CALLS = 16, 512  # those that are done; with those that are not
HEAD_START_S = 2.0  # words on a call over NCCL come so long before torch's watchdog ends the process
LOOK_S = 0.03  # between two looks for another card
RELAYED: dict[str, type[ZcoreError]] = {each.__name__: each for each in (CollectiveError, MismatchError)}
FIRST_WORDS = "First seen by rank"


@dataclass(slots=True)
class Wait:
    """A wait that only `abort` can end early; `trouble` is why it was."""

    call: Call
    abort: Callable[[], None]
    patience: Patience
    trouble: ZcoreError | None = None


@dataclass(slots=True)
class _Followed:
    """A call that no host waits for."""

    call: Call
    is_done: Callable[[], bool]
    patience: Patience
    is_explained: bool = False


@dataclass(frozen=True, slots=True)
class _Made:
    """A call of this rank."""

    call: Call
    fingerprint: int  # of the call alone
    digest: int  # of all calls up to it


class Journal:
    """See the header. `key` is equal on all ranks and of no other group; `homes` is by rank in the group.

    family: what the keys begin with of all parts of what serves here; connected: those of all parts, of whatever serves
    the process group, that lose their connections together.
    """

    def __init__(
        self,
        cards: Cards,
        key: str,
        homes: Sequence[Home],
        *,
        rank: int,
        deadline_s: float,
        family: tuple[str, ...],
        connected: str,
    ) -> None:
        self.homes = homes
        self.rank = rank
        self.deadline_s = deadline_s
        self._cards = cards
        self.key = key
        self._family = family
        self._connected = connected
        self._started = self._finished = 0
        self._digest = zlib.crc32(key.encode())
        self._calls: deque[_Made] = deque(maxlen=MAX_REMEMBERED_CALLS)
        self._given_up: GaveUp | None = None
        self._followed: deque[_Followed] = deque()
        self._has_told_of_unknown = False
        self._wait: Wait | None = None
        cards.add(self)

    def start(self, call: Call) -> int:
        """A call begins. What is returned tells its messages apart; equal on ranks that have made the same calls."""
        fingerprint = tag_of(call)
        self._digest = zlib.crc32(fingerprint.to_bytes(4, "little"), self._digest)
        self._calls.append(_Made(call, fingerprint, self._digest))
        while len(self._calls) > REMEMBERED_CALLS and self._calls[0].call.index < self._finished:
            self._calls.popleft()
        self._started = call.index + 1
        return self._digest % STEP_TAGS

    def finish(self, call: Call) -> None:
        """A call is done."""
        self._finished = max(self._finished, call.index + 1)

    def word(self) -> GroupWord:
        """What the others read."""
        calls = [
            CallWord(each.call.index, each.fingerprint, each.digest, str(each.call)) for each in tuple(self._calls)
        ]
        return GroupWord(self._started, tuple(calls), self._given_up)

    def give_up(self, error: ZcoreError, *, index: int | None = None) -> ZcoreError:
        """Tell the others at once of an error that ends this rank's part in the group; the same error.

        index: of the call that it ended, where the rank may go on with later ones.
        """
        self._given_up = GaveUp(type(error).__name__, str(error), self._started - 1 if index is None else index)
        self._cards.write()
        return error

    def go_on(self) -> None:
        """This rank takes part again."""
        self._given_up = None

    def wait_for(self, call: Call, is_done_within: Callable[[float], bool]) -> None:
        """Return once `is_done_within(seconds)`, looking after the others meanwhile, ever more rarely.

        Raises MismatchError for a call that another rank made differently, CollectiveError if a rank has ended or the
        deadline has passed.
        """
        patience = Patience(self.deadline_s)
        while not is_done_within(patience.pause_s):
            if not patience.looks_now():
                continue
            told = self._read()
            trouble = self._trouble_after(patience, call, told)
            if is_done_within(0):
                return
            if trouble is not None:
                raise self.give_up(trouble)
            self._tell_after(patience, call, told)

    @contextmanager
    def looking_after(self, call: Call, abort: Callable[[], None]) -> Iterator[Wait]:
        """Have the cards' thread look after the others while this one waits, whom only `abort` can interrupt."""
        wait = self._wait = Wait(call, abort, Patience(self.deadline_s))
        try:
            yield wait
        finally:
            self._wait = None

    def follow(self, call: Call, is_done: Callable[[], bool]) -> None:
        """Have the cards' thread look after a call that no host waits for, and tell of trouble in the log."""
        head_start_s = max(HEAD_START_S, 2 * self._cards.interval_s)
        deadline_s = self.deadline_s - min(head_start_s, self.deadline_s / 4)
        self._followed.append(_Followed(call, is_done, Patience(deadline_s)))

    def look_after(self) -> None:
        """In the cards' thread, with every beat: what keeps a wait, and calls that no host waits for."""
        wait = self._wait
        if wait is not None and wait.patience.looks_now():
            told = self._read_here()
            trouble = self._trouble_after(wait.patience, wait.call, told)  # gloo's own deadline is one for each message
            if trouble is not None and self._wait is wait:
                wait.trouble = trouble
                wait.abort()
            elif trouble is None:
                self._tell_after(wait.patience, wait.call, told)
        self._look_after_followed()

    def _look_after_followed(self) -> None:
        """Finish what is done, and tell, once, what keeps the oldest of the others."""
        while self._followed and self._is_over(self._followed[0]):
            self.finish(self._followed.popleft().call)
        if not self._followed:
            return
        oldest = self._followed[0]
        if oldest.is_explained or not oldest.patience.looks_now():
            return
        told = self._read_here()
        is_near = f"the timeout of {self.deadline_s:.3g} s is about to pass"
        trouble = self._trouble_after(oldest.patience, oldest.call, told, at_end=is_near)
        if trouble is not None:
            oldest.is_explained = True
            logger.error("%s: %s", type(trouble).__name__, trouble)
        else:
            self._tell_after(oldest.patience, oldest.call, told)

    def _is_over(self, followed: _Followed) -> bool:
        """Whether it needs no look any more, be it that nobody can say how it stands: that is told of the first one."""
        try:
            return followed.is_done()
        except Exception as error:  # noqa: BLE001 - of the device, after which all calls may have it
            if not self._has_told_of_unknown:
                logger.error(
                    "Nobody looks after %s any more: asked how it stands, it raised %s: %s. Look for the first error "
                    "in this rank's output, %s",
                    followed.call,
                    type(error).__name__,
                    error,
                    AFTER_FAILURE,
                )
            self._has_told_of_unknown = True
            return True

    def _trouble_after(
        self, patience: Patience, call: Call, told: Mapping[int, Told], *, at_end: str = ""
    ) -> ZcoreError | None:
        """What ends a wait of that length for `call`, if anything does; `at_end` is the reason when it is over."""
        trouble = self._trouble_in(call, told, is_lost=False)
        if trouble is None and patience.is_over:
            trouble = self._failure(call, at_end or has_passed(self.deadline_s), told)
        return trouble

    def _tell_after(self, patience: Patience, call: Call, told: Mapping[int, Told]) -> None:
        if patience.tells_now():
            missing = self._whom_it_lacks(call, told)
            logger.warning("Waiting for %s since %.0f s. %s", call, patience.waited_s, missing)

    def find_trouble(self, call: Call, *, is_lost: bool = False) -> ZcoreError | None:
        """Why `call`, for which this rank waits, cannot complete; None as long as it still may.

        is_lost: a connection broke, so that any rank that ended, or gave up in another part of what serves this process
        group, may be the cause, however far it came.
        """
        return self._trouble_in(call, self._read(), is_lost=is_lost)

    def failure(self, call: Call, reason: str, *, silent: Set[int] = frozenset()) -> ZcoreError:
        """The error that tells what every rank whom `call` lacks did last; `silent` are held to be gone."""
        return self._failure(call, reason, self._read(), silent=silent)

    @property
    def silence_s(self) -> float:
        """How long a process on another host that lives may be without a new card."""
        return SILENT_BEATS * self._cards.interval_s

    def counts_elsewhere(self) -> dict[int, int]:
        """The number of the newest card of each rank whose process cannot be seen from here; none if it is unknown."""
        told = self._read()
        if not self._cards.answers:  # what was known before may be long past
            return {}
        return {rank: _count_in(told, home) for rank, home in enumerate(self.homes) if not home.is_here}

    def silent_since(self, counts: Mapping[int, int]) -> Set[int]:
        """Ranks that have no newer card than in `counts`; none where nobody can know."""
        told = self._read()
        if not self._cards.answers:
            return frozenset()
        return {rank for rank, count in counts.items() if _count_in(told, self.homes[rank]) == count}

    def line_of(self, rank: int) -> str:
        """In which line of its program a rank was when it last left word."""
        told = self._read().get(self.homes[rank].life)
        return told.line if told is not None else "in a line it has not told"

    def told_by(self, rank: int, *, since: int) -> ZcoreError | None:
        """The error for which a rank that has ended gave up, as this one tells it; None if it left without a word.

        since: the first call whose error may be the cause. After one of an earlier call the group went on.
        """
        told = self._read()
        said, _ = self._said_by(told.get(self.homes[rank].life), since=since)
        return self._relayed(said, self.homes[rank].global_rank, told) if said is not None else None

    def reason_left(self, rank: int, *, since: int) -> str:
        """The reason where a rank has ended that has said nothing of calls from `since` on."""
        _, elsewhere = self._said_by(self._read().get(self.homes[rank].life), since=since)
        return has_left(self.homes[rank].global_rank, said=elsewhere)

    def _said_by(
        self, card: Told | None, *, is_lost: bool = False, since: int = 0
    ) -> tuple[GaveUp | None, GaveUp | None]:
        """Why a rank has given up: first in what serves this process group, then in another, as may be long ago.

        is_lost: a connection broke; who gives up between pairs closes those of all that serves the process group.
        since: of this group itself, the first call that counts.
        """
        groups = card.groups if card is not None else {}
        near = (*self._family, self._connected) if is_lost else self._family
        here: list[GaveUp] = []
        elsewhere: list[GaveUp] = []
        for key, group in groups.items():
            if group.given_up is not None:
                is_past = key == self.key and group.given_up.index < since
                (here if key.startswith(near) and not is_past else elsewhere).append(group.given_up)
        return next(iter(here), None), next(iter(elsewhere), None)

    def _read(self) -> dict[int, Told]:
        return self._cards.read([home.life for home in self.homes])

    def _read_here(self) -> dict[int, Told]:
        return self._cards.read_here([home.life for home in self.homes])

    def _trouble_in(self, call: Call, told: Mapping[int, Told], *, is_lost: bool) -> ZcoreError | None:
        own = {each.call.index: each for each in tuple(self._calls)}
        ended: list[str] = []  # the reason of each rank that has left without a word
        for rank, home in enumerate(self.homes):
            card = told.get(home.life)
            if rank == self.rank:
                continue
            there = card.groups.get(self.key) if card is not None else None
            has_ended = home.has_ended()
            here, elsewhere = self._said_by(card, is_lost=is_lost)
            said = there.given_up if there is not None else None
            if is_lost or has_ended:
                said = here  # not `elsewhere`: of one that goes on it may be long past, and no reason for anything
            if said is not None:
                return self._relayed(said, home.global_rank, told)
            if there is not None and card is not None:
                mismatch = self._mismatch(own, there.calls, home, card.line)
                if mismatch is not None:
                    return mismatch
            if has_ended and (is_lost or there is None or there.started <= call.index):
                ended.append(has_left(home.global_rank, said=elsewhere))
        return self._failure(call, ended[0], told) if ended else None

    def mismatch(self, index: int, *, mine: str, theirs: str, rank: int) -> MismatchError:
        """The error of a call that `rank` made differently."""
        self._await_word(rank)
        there = f"rank {self.homes[rank].global_rank}, last seen {self.line_of(rank)}"
        return differs(index, mine=mine, here=self._here(), theirs=theirs, there=there)

    def _await_word(self, rank: int) -> None:
        """Wait for the next card of a rank, as it soon comes: the line on it is not older than its call."""
        home, before = self.homes[rank], self._count_of(rank)
        self._cards.write()  # for the other one, which may be waiting for this
        end_s = time.monotonic() + 2 * self._cards.interval_s
        while self._count_of(rank) == before and time.monotonic() < end_s and not home.has_ended():
            time.sleep(LOOK_S)

    def _count_of(self, rank: int) -> int:
        return _count_in(self._read(), self.homes[rank])

    def _here(self) -> str:
        return f"rank {self.homes[self.rank].global_rank}, {program_line() or 'in no line of the program'}"

    def _mismatch(
        self, own: Mapping[int, _Made], theirs: Sequence[CallWord], home: Home, line: str
    ) -> MismatchError | None:
        """The first call that the rank at `home` made differently; None as far as nothing differs."""
        there = f"rank {home.global_rank}, last seen {line}"
        common = [(own[each.index], each) for each in theirs if each.index in own]
        for mine, other in common:
            if mine.fingerprint != other.fingerprint:
                words, index = str(mine.call), mine.call.index
                return differs(index, mine=words, here=self._here(), theirs=other.words, there=there)
        if common and common[0][0].digest != common[0][1].digest:
            return differed_before(str(common[0][0].call), here=self._here(), there=there)
        return None

    def _failure(
        self, call: Call, reason: str, told: Mapping[int, Told], *, silent: Set[int] = frozenset()
    ) -> ZcoreError:
        return failed(str(call), reason, self._whom_it_lacks(call, told, silent=silent), label=call.label)

    def _whom_it_lacks(self, call: Call, told: Mapping[int, Told], *, silent: Set[int] = frozenset()) -> str:
        """In words: which ranks have not arrived, what they did last, and which have."""
        missing: list[Missing] = []
        arrived: list[int] = []
        for rank, home in enumerate(self.homes):
            if rank == self.rank:
                continue
            card = told.get(home.life)
            there = card.groups.get(self.key) if card is not None else None
            has_moved = False if rank in silent else card.has_moved if card is not None else None
            state = home.state(has_moved=has_moved)
            if card is None or there is None:
                missing.append(Missing(home.global_rank, state, "it has told nothing of this group"))
            elif there.started > call.index and not (has_moved is False or home.has_ended() or home.is_stopped()):
                arrived.append(home.global_rank)
            else:
                last = f"its last call was {there.calls[-1].words}" if there.calls else "it had told of no call"
                missing.append(Missing(home.global_rank, state, f"{last}; last seen {card.line}"))
        words = about_missing(missing, arrived)
        if not self._cards.answers:
            words += " The store in which ranks leave word does not answer; rank 0, or the launcher, holds it."
        return words

    def _relayed(self, reason: GaveUp, global_rank: int, told: Mapping[int, Told]) -> ZcoreError:
        """The error of another rank, and what it could not see from its host but is seen from this one.

        Ranks that gave up here, and ended for that, are no cause of it.
        """
        kind, words = reason.kind, reason.words
        if not words.startswith(FIRST_WORDS):
            words = f"{FIRST_WORDS} {global_rank}: {words}"
        seen = [
            f"Rank {home.global_rank} ({home.state()})."
            for home in self.homes
            if (home.has_ended() or home.is_stopped())
            and home.state() not in words
            and self._said_by(told.get(home.life))[0] is None
        ]
        return RELAYED.get(kind, CollectiveError)(
            " ".join([words, *([f"Seen from rank {self.homes[self.rank].global_rank}:", *seen] if seen else [])])
        )


def _count_in(told: Mapping[int, Told], home: Home) -> int:
    """The number of the newest card of the process at `home`; -1 before the first."""
    card = told.get(home.life)
    return -1 if card is None else card.count
