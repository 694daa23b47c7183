"""The ranks of one group on this host, as one of them sees the others: their boards, their pages, whether they live."""

import logging
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zcore.comm.memory.board import Board, Entry
from zcore.comm.memory.pages import map_file, own_pages, storage_at
from zcore.comm.progress import advance_all, is_reached_within
from zcore.comm.ranks.journal import Journal
from zcore.comm.ranks.meeting import Introduction
from zcore.comm.ranks.patience import Patience
from zcore.comm.ranks.words import AFTER_FAILURE, Missing, about_missing, failed, has_passed
from zcore.core.errors import CollectiveError, ZcoreError

__all__ = ["Neighbours", "open_neighbours"]

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 0.05


class Neighbours:
    """See the header. Every list is by rank in the group; errors name global ranks, as output does."""

    def __init__(
        self,
        boards: Sequence[Board],
        mappings: Sequence[mmap.mmap],
        *,
        rank: int,
        journal: Journal,
    ) -> None:
        self.rank = rank
        self.size = len(boards)
        self.board = boards[rank]
        self.others = [(each, boards[each]) for each in range(self.size) if each != rank]
        self.boards = boards
        self._homes = journal.homes
        self._mappings = mappings
        self._deadline_s = journal.deadline_s
        self._journal = journal

    def data_of(self, rank: int, index: int, *, skip: int, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements of what `rank` shows in call `index`, from its element `skip` on; no copy."""
        if not numel:
            return torch.empty(0, dtype=dtype, device="cpu")
        place = self._place_of(rank, index) + skip * dtype.itemsize
        return torch.frombuffer(self._mappings[rank], dtype=dtype, count=numel, offset=place)

    def storage_of(
        self, rank: int, index: int, num_bytes: int, *, when_gone: Callable[[], None]
    ) -> torch.UntypedStorage:
        """What `rank` shows in call `index`, as `storage_at` makes it."""
        return storage_at(self._mappings[rank], self._place_of(rank, index), num_bytes, when_gone=when_gone)

    def _place_of(self, rank: int, index: int) -> int:
        place = self.boards[rank].place_of(index)
        if place is None:  # it failed before it had any
            raise self._given_up_by(rank, f"{self.board.entry(index)} (call {index})")
        return place

    def wait_until(
        self,
        is_reached: Callable[[], bool],
        needs: Callable[[Board], bool],
        *,
        what: str,
        index: int,
        since: Callable[[], int] | None = None,
        label: str = "",
        lacks: Callable[[Board], bool] | None = None,
    ) -> None:
        """Return once `is_reached()`. `needs(board)` tells whose part that takes, `lacks(board)` whom to call missing.

        index: of the call that it is for. since: an earlier one whose error nobody has met; None if there is none.

        Raises CollectiveError, with what is known of them, if a rank that is needed ends, or the deadline passes.
        """
        if is_reached():
            return
        patience, is_missing = Patience(self._deadline_s), lacks or needs
        while not is_reached_within(is_reached, CHECK_EVERY_S):
            missing = [each for each in self.others if is_missing(each[1])]
            ended = [each for each in self.others if needs(each[1]) and self._homes[each[0]].has_ended()]
            if ended:  # one may have done its part, and left, between the two looks at it
                advance_all()
                ended = [each for each in ended if needs(each[1])]
            if ended and not is_reached():
                first = index if since is None else since()
                raise self._error_of_left(ended, missing, what=what, index=index, since=first, label=label)
            if patience.is_over:
                raise self._failure(what, label, missing, has_passed(self._deadline_s), index=index)
            if patience.tells_now():
                logger.warning("Waiting for %s since %.0f s. %s", what, patience.waited_s, self._describe(missing))

    def go_on(self) -> None:
        """This rank takes part again, after an error that it told the others of."""
        self._journal.go_on()

    def check_same(self, index: int, entry: Entry) -> None:
        """Raise MismatchError if another rank, all of which have started it, made call `index` another one."""
        for rank, board in self.others:
            if not board.is_same(index, entry):
                mismatch = self._journal.mismatch(index, mine=str(entry), theirs=str(board.entry(index)), rank=rank)
                raise self._journal.give_up(mismatch, index=index)

    def check_nobody(self, has_given_up: Callable[[Board], bool], *, what: str) -> None:
        """Raise CollectiveError if another rank has given the call up."""
        for rank, board in self.others:
            if has_given_up(board):
                raise self._given_up_by(rank, what)

    def _given_up_by(self, rank: int, what: str) -> CollectiveError:
        return CollectiveError(
            f"{what} did not complete: rank {self._homes[rank].global_rank} has given it up. Look for the first error "
            f"in its output, {AFTER_FAILURE}"
        )

    def _error_of_left(
        self,
        ended: list[tuple[int, Board]],
        missing: list[tuple[int, Board]],
        *,
        what: str,
        index: int,
        since: int,
        label: str,
    ) -> ZcoreError:
        """Who left without a word is the cause; if nobody did, what the first of them gave up for."""
        first = min(since, self.board.finished)  # of this rank's open calls: those before are over for it
        told = [self._journal.told_by(rank, since=first) for rank, _ in ended]
        for each, words in zip(ended, told, strict=True):
            if words is None:
                reason = self._journal.reason_left(each[0], since=first)
                missing = [other for other in self.others if other in missing or other is each]
                return self._failure(what, label, missing, reason, index=index)
        return self._journal.give_up(next(words for words in told if words is not None), index=index)

    def _failure(
        self, what: str, label: str, missing: list[tuple[int, Board]], reason: str, *, index: int
    ) -> ZcoreError:
        return self._journal.give_up(failed(what, reason, self._describe(missing), label=label), index=index)

    def _describe(self, missing: list[tuple[int, Board]]) -> str:
        absent: list[Missing] = []
        for rank, board in missing:
            home = self._homes[rank]
            last = "it made no call"
            if board.started:
                last = f"its last call was {board.entry(board.started - 1)} (call {board.started - 1})"
            did = f"{last}; last seen {self._journal.line_of(rank)}"
            absent.append(Missing(home.global_rank, home.state(), did))
        waiting = {rank for rank, _ in missing} | {self.rank}
        arrived = [home.global_rank for rank, home in enumerate(self._homes) if rank not in waiting]
        return about_missing(absent, arrived)


def open_neighbours(shown: Sequence[Introduction], *, rank: int, board: int, journal: Journal) -> Neighbours | None:
    """The ranks that have shown these, seen from `rank`; None if the memory of one of them cannot be opened."""
    mappings = []
    for each, its in enumerate(shown):
        try:
            mappings.append(own_pages().mapping if each == rank else _open(its))
        except OSError as error:
            logger.warning("The memory of process %d cannot be opened: %s.", its.home.process, error)
            return None
    boards = [Board(mapping, its.boards[board]) for mapping, its in zip(mappings, shown, strict=True)]
    return Neighbours(boards, mappings, rank=rank, journal=journal)


_opened: dict[tuple[int, int, int], mmap.mmap] = {}  # several groups of the same processes need one


def _open(its: Introduction) -> mmap.mmap:
    process, file = its.home.process, its.file
    key = os.getpid(), process, Path(f"/proc/{process}/fd/{file}").stat().st_ino
    if key not in _opened:
        _opened[key] = map_file(process, file, file_bytes=its.file_bytes)
    return _opened[key]
