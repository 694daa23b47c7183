"""Calls between ranks of one host that are under way: told to the others, done step by step, and ended.

    starting    not announced: nobody else sees it
    open        announced; every rank reads what the others show, in one step or in two
    lent        read here, while another rank may still read what this one shows of the caller's memory
    over        nobody reads any more; or it has failed

A call is the others' as much as ours: they make it, whatever becomes of it here. So one that fails before it is
announced is announced as given up, one that fails later tells so, and both keep their place in the order of calls. An
interrupt in a start or a wait fails the call: who made it may have no handle of it, and goes on with its tensors. Two
things are left to chance: an interrupt between a start and its wait, which leaves the call under way; and one while a
start waits for a place in the ring, after which the others learn by the deadline that no more calls come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from zcore.comm.memory.board import RING_CALLS, Board, Entry
from zcore.comm.memory.neighbours import Neighbours
from zcore.comm.memory.pages import Region, own_pages
from zcore.comm.progress import LOCK, in_mode_of_caller, note_closed, note_open
from zcore.core.collectives import Call
from zcore.core.errors import CollectiveError, StateError, ZcoreError

__all__ = ["CallUnderWay", "CallsUnderWay"]

# Stages of a call: announced; own part of the result is there; no more is to be read; given up, with data as they were.
# Or given up because another rank had.
STARTED, HALF, READ, FAILED, FOLLOWED = range(5)


@dataclass(slots=True)
class CallUnderWay:
    """A call that this rank has started, and what is left to do for it."""

    call: Call
    entry: Entry
    index: int
    read: Callable[[], None] | None = None  # when every rank has started the call
    read_halves: Callable[[], None] | None = None  # when every rank's part of the result is there; if two steps
    place: int | None = None  # of what it shows, in this rank's file
    slot: int = 0  # of memory that ranks hold together
    staged: Region | None = None
    shows_own: bool = False  # memory of the caller's: others must have read it before `wait` returns
    let_go: Callable[[], None] | None = None  # if it fails: of memory that this rank never came to hold
    is_announced: bool = False
    is_same: bool = False  # on every rank, as far as is known
    is_reading: bool = False  # or was, when an interrupt came
    error: Exception | None = None  # that ended it


class CallsUnderWay:
    """Those of one group, in the order of their start. `name` is what reports call the group."""

    def __init__(self, neighbours: Neighbours, *, name: str) -> None:
        self._neighbours = neighbours
        self._name = name
        self._pages = own_pages()
        self._next = 0
        self._open: dict[int, CallUnderWay] = {}
        self._lent: dict[int, CallUnderWay] = {}  # closed, while others may still read the caller's memory
        self._untold: set[int] = set()  # calls that have failed, and whose error nobody has met yet
        self._ended: BaseException | None = None  # what kept a call from being told to the others

    def starting(self, note: Callable[[], Call], entry: Entry) -> "_Starting":
        """A call that is to be announced inside; what keeps it from that is raised, and ends it on every rank."""
        if self._ended is not None:
            raise StateError(f"{entry}: this group has ended with an error. Restart the ranks.") from self._ended
        try:
            self._make_place_in_ring()
        except BaseException as error:  # without a place the call cannot be told to the others, who make it
            self._ended = error
            raise
        return _Starting(self, CallUnderWay(note(), entry, self._next))

    def fail_start(self, this: CallUnderWay, error: BaseException) -> None:
        """`error` came in the start: announced or not, the others make the call."""
        with LOCK:
            if not this.is_announced:
                self._enter(this, stage=FAILED)
            self._fail(this, _told(this, error))
            self._untold.discard(this.index)  # whoever made it meets the error now

    def announce(
        self, this: CallUnderWay, read: Callable[[], None], read_halves: Callable[[], None] | None = None
    ) -> None:
        """Tell the others that the call has started, and remember what is to be done for it."""
        this.read = in_mode_of_caller(read)
        this.read_halves = read_halves and in_mode_of_caller(read_halves)
        with LOCK:
            self._enter(this, stage=STARTED)

    def _enter(self, this: CallUnderWay, *, stage: int) -> None:
        """Announce it. Half done it would be taken for another call, so it may be repeated after an interrupt."""
        self._neighbours.go_on()
        self._next = this.index + 1
        self._open[this.index] = this
        note_open(self)
        self._neighbours.board.start(this.index, this.entry, place=this.place, slot=this.slot, stage=stage)
        this.is_announced = True

    def wait_for(self, this: CallUnderWay) -> None:
        """Return when the call is done. Raises what ended it, each time."""
        self._bring_to_end(this)
        if this.error is not None:
            self._untold = {each for each in self._untold if each > this.index}
            raise this.error

    def _bring_to_end(self, this: CallUnderWay) -> None:
        """Wait until it is over. What ends it is kept with it, for whoever waits; interrupts are raised."""
        index, others = this.index, self._neighbours.others
        try:
            with LOCK:
                self._advance(this)
            if index in self._open:
                needed = STARTED if this.read_halves is None else HALF

                def needs(board: Board) -> bool:
                    return board.started <= index or board.stage_of(index) not in (needed, HALF, READ)

                def lacks(board: Board) -> bool:  # nobody gets on with a call to which not all have come
                    has_all = all(each.started > index for _, each in others)
                    return needs(board) if has_all else board.started <= index

                self._neighbours.wait_until(
                    lambda: index not in self._open,
                    needs,
                    lacks=lacks,
                    what=str(this.call),
                    index=index,
                    since=lambda: min([index, *self._untold]),
                    label=this.call.label,
                )
            if this.shows_own and this.error is None:
                self._neighbours.wait_until(
                    lambda: not self._is_lent(this),
                    lambda board: not _has_come(board, index, READ),
                    what=str(this.call),
                    index=index,
                    label=this.call.label,
                )
                this.shows_own = False
        except ZcoreError as error:
            with LOCK:
                self._fail(this, error)
        except BaseException as error:
            with LOCK:
                self._fail(this, _told(this, error))
            raise

    def is_done(self, this: CallUnderWay) -> bool:
        """Whether the call is done, after doing what can be done for it now. Raises what ended it."""
        if this.index in self._open:
            self.advance()
        if this.index in self._open:
            return False
        if this.error is not None:
            raise this.error
        return not (this.shows_own and self._is_lent(this))

    def has_room(self, count: int) -> bool:
        """Whether `count` calls, or as many as ever are open at a time, can start now without waiting."""
        count = min(count, RING_CALLS // 2 - 1)
        with LOCK:
            num_open, oldest_open = len(self._open), next(iter(self._open), self._next)
        if num_open + count > RING_CALLS // 2:
            return False
        oldest = self._next + count - RING_CALLS - 1  # whose entry the last of them is to take
        return oldest_open > oldest and all(board.finished > oldest for _, board in self._neighbours.others)

    def advance(self) -> None:
        """Do what open calls need, as far as the others have come."""
        with LOCK:  # no `acquire` and `try`: an interrupt between them would leave it locked
            for each in list(self._open.values()):
                if not self._advance(each):
                    break  # not started everywhere, so later ones are not either

    def try_now(self, this: CallUnderWay, *, needs: Board) -> None:
        """Do the call's first step if the rank of `needs` has made the same call by now."""
        with LOCK:
            try:
                if needs.started > this.index and needs.is_same(this.index, this.entry):
                    self._read(this)
            except BaseException as error:  # noqa: BLE001 - raised by `wait_for`
                self._end_by(this, error)

    def fail_all(self, error: Exception) -> None:
        """Nothing more is done for any call, and whoever may still read what one has lent is told not to trust it."""
        with LOCK:
            for this in (*self._open.values(), *self._lent.values()):
                self._fail(this, error)

    def _advance(self, this: CallUnderWay) -> bool:
        """Do what can be done for the call without waiting; whether every rank has started it.

        What goes wrong is this call's, for whoever waits for it: other calls are under way in the same wait.
        """
        others, index = self._neighbours.others, this.index
        if not this.is_same and index in self._open and not all(board.started > index for _, board in others):
            return False
        try:
            if not this.is_same and index in self._open:
                self._neighbours.check_same(index, this.entry)
                this.is_same = True
            self._read(this)
            # As long as the call is open here, the others' entries are those of this call.
            if this.read_halves is not None and all(board.stage_of(index) in (HALF, READ) for _, board in others):
                self._read_then(this, this.read_halves, READ)
                this.read_halves = None
            if index in self._open:  # what a rank shows that has given up may be anything
                for stage in (FAILED, FOLLOWED):
                    self._neighbours.check_nobody(partial(_is_at, index, stage), what=str(this.call))
        except BaseException as error:  # noqa: BLE001 - raised by `wait_for`
            self._end_by(this, error)
        if this.read_halves is None:
            self._close(this)
        return True

    def _read(self, this: CallUnderWay) -> None:
        if this.read is not None:
            self._read_then(this, this.read, READ if this.read_halves is None else HALF)
            this.read = None

    def _read_then(self, this: CallUnderWay, read: Callable[[], None], stage: int) -> None:
        """Read, and tell the others. Read in part, and again, it would be nobody's result."""
        if this.is_reading:
            raise _interrupted(this)
        this.is_reading = True
        read()
        if this.error is None:  # else a signal handler has made a call meanwhile, and this one counts as interrupted
            self._neighbours.board.set_stage(this.index, stage)
        this.is_reading = False

    def _end_by(self, this: CallUnderWay, error: BaseException) -> None:
        """The call has met `error`; an interrupt is raised here, too."""
        self._fail(this, _told(this, error))
        if not isinstance(error, Exception):
            raise error

    def _fail(self, this: CallUnderWay, error: Exception) -> None:
        """Nothing more is done for the call, now or when a late rank comes after all; the others are told."""
        if this.index not in self._open and not self._is_lent(this):
            return  # it has failed before, or its result is whole
        this.error = this.error or error  # first: another interrupt may come
        this.read = this.read_halves = None
        others = [board.stage_of(this.index) for _, board in self._neighbours.others if board.started > this.index]
        self._neighbours.board.set_stage(this.index, FOLLOWED if {FAILED, FOLLOWED} & {*others} else FAILED)
        let_go, this.let_go = this.let_go, None
        if let_go is not None:
            let_go()
        self._untold.add(this.index)
        self._lent.pop(this.index, None)
        self._close(this)

    def _is_lent(self, this: CallUnderWay) -> bool:
        """Whether another rank may still read what the call shows of the caller's memory."""
        return this.shows_own and not all(_has_come(board, this.index, READ) for _, board in self._neighbours.others)

    def _close(self, this: CallUnderWay) -> None:
        if self._open.pop(this.index, None) is None:
            return
        if self._lent:
            self._lent = {index: each for index, each in self._lent.items() if self._is_lent(each)}
        if this.error is None and self._is_lent(this):
            self._lent[this.index] = this
        if not self._open:
            note_closed(self)
        self._neighbours.board.finished = next(iter(self._open), self._next)
        if this.staged is not None:
            self._pages.give_back(this.staged)

    def _make_place_in_ring(self) -> None:
        """The entry to be written is read by nobody any more: neither by us, nor by the slowest of the others.

        Open calls that are in its way are brought to their end; their errors are for those who wait for them.
        """
        oldest = self._next - RING_CALLS
        while True:
            with LOCK:
                num_open, first = len(self._open), next(iter(self._open.values()), None)
            if first is None or (num_open < RING_CALLS // 2 and first.index > oldest):
                break
            self._bring_to_end(first)
        if oldest >= 0:
            self._neighbours.wait_until(
                lambda: all(board.finished > oldest for _, board in self._neighbours.others),
                lambda board: board.finished <= oldest,
                what=f"Call {self._next} of {self._name}, {RING_CALLS} ahead of the slowest rank,",
                index=self._next,
                since=lambda: oldest,
            )


class _Starting:
    """See `CallsUnderWay.starting`; a class, as a generator takes two microseconds more."""

    __slots__ = ("_calls", "_this")

    def __init__(self, calls: CallsUnderWay, this: CallUnderWay) -> None:
        self._calls, self._this = calls, this

    def __enter__(self) -> CallUnderWay:
        return self._this

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._calls.fail_start(self._this, error)


def _told(this: CallUnderWay, error: BaseException) -> Exception:
    """What whoever waits for the call is told of `error`."""
    return error if isinstance(error, Exception) else _interrupted(this)


def _interrupted(this: CallUnderWay) -> CollectiveError:
    return CollectiveError(f"{this.call} was interrupted, and its result is undefined. Restart.")


def _is_at(index: int, stage: int, board: Board) -> bool:
    return board.stage_of(index) == stage


def _has_come(board: Board, index: int, stage: int) -> bool:
    return board.finished > index or board.stage_of(index) >= stage
