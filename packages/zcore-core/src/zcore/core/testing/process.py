"""One rank as the launcher sees it: a process, a pipe to it, and its last word.

It ends when `end` returns, whatever state it was in. Only processes started here are ever signalled.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path

from zcore.core.testing.child import Job, Returned, main
from zcore.core.testing.report import RankFailure, describe_exit

__all__ = ["RankProcess", "give_up"]

ANSWER_S = 2.0  # for a rank to say where it stands; one that holds the GIL never answers


class RankProcess:
    """One process and its last word. Times are absolute until `outcome`."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("forkserver")
        self.said: Returned | RankFailure | None = None  # None while the body runs; a failure is final
        self.exited = False
        self._rank = job.rank
        self._output_path = Path(job.output_path)
        self._control, theirs = context.Pipe()
        self._listening = True
        self._process = context.Process(target=main, args=(job, theirs), name=f"rank{job.rank}")
        self._process.start()
        theirs.close()

    @property
    def handles(self) -> list[connection.Connection | int]:
        """What becomes ready when the rank says something or ends."""
        return [self._process.sentinel, *([self._control] if self._listening else [])]

    def tell(self, reason: str | None) -> None:
        """Let the rank leave (None), or ask where it stands before it is killed for `reason`."""
        with suppress(OSError):  # a rank that is gone hears nothing
            self._control.send(reason)

    def read(self) -> None:
        """Take in what the rank said, and its end."""
        exitcode = self._process.exitcode  # looked at before the pipe: what a rank says precedes its end
        try:
            while self._listening and self._control.poll():
                word = self._control.recv()
                self.said = self.said if isinstance(self.said, RankFailure) else word
        except (EOFError, OSError):
            self._listening = False
        self.exited = exitcode is not None
        if exitcode is not None and (self.said is None or (exitcode and isinstance(self.said, Returned))):
            self.said = self._failure("Died", describe_exit(exitcode), exitcode=exitcode)

    def abort(self, reason: str) -> None:
        """Give up a rank that does not answer: it dies by SIGABRT, and faulthandler writes its stacks as it does."""
        self._signal(signal.SIGABRT)
        self._process.join(ANSWER_S)
        stacks = self._output().rpartition("Fatal Python error: Aborted")[2].strip()
        self.said = self._failure("Hung", reason, traceback=stacks)

    def outcome(self, started_s: float) -> Returned | RankFailure:
        """The last word, with what a failed rank cannot say itself."""
        assert self.said is not None
        if isinstance(self.said, Returned):
            return self.said
        return replace(self.said, after_s=max(0.0, self.said.after_s - started_s), output=self._output())

    def end(self) -> None:
        """Kill the rank, and what it started, if it still runs; no process and no pipe of it is left."""
        if self._process.is_alive():
            self._signal(signal.SIGKILL)
            self._process.join()
        self._process.close()
        self._control.close()

    def _failure(self, type_name: str, message: str, traceback: str = "", exitcode: int | None = None) -> RankFailure:
        return RankFailure(self._rank, type_name, message, traceback, exitcode, time.monotonic())

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:  # it has no group of its own yet, or is gone
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _output(self) -> str:
        return self._output_path.read_text(errors="replace") if self._output_path.exists() else ""


def give_up(late: Sequence[RankProcess], reason: str) -> None:
    """Get from every late rank where it stands: from itself, or as it aborts."""
    for rank in late:
        rank.tell(reason)
    answer_by_s = time.monotonic() + ANSWER_S
    while silent := [rank for rank in late if not rank.exited and not isinstance(rank.said, RankFailure)]:
        if not connection.wait([h for rank in silent for h in rank.handles], max(0.0, answer_by_s - time.monotonic())):
            break
        for rank in silent:
            rank.read()
    for rank in silent:
        rank.abort(reason)
