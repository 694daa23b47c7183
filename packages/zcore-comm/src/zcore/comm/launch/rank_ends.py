"""How the ranks of one host end: those that fail are told at once, and the others are ended in the time that was said.

torch's agent ends the others of a failed rank before it says so. It gives them 30 s, whatever it was told, and one that
is stopped (SIGSTOP) sleeps through them; what it reports then holds those that it has killed itself. So this looks at
the ranks first, and torch looks when there is nothing left to do:

    one has failed    a mark for each that ended by itself (`lines`); the others have SETTLE_S to say what they know of
                      it; then SIGTERM, and SIGCONT, so that a stopped one wakes to it; SIGKILL after `shutdown_s`
    all ended well    a mark for each

With restarts left a note says what has failed, in place of marks. Ranks that were ended here have neither.
"""

import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from zcore.comm.launch.failure import describe_exit
from zcore.comm.launch.lines import Ended, mark_end, mark_restart
from zcore.comm.launch.plan import parse_shutdown_s
from zcore.comm.launch.rank_streams import RankStreams

__all__ = ["EndingAgent"]

SETTLE_S = 2.0  # less than the front's, which else cuts it short; a dead rank is noticed in shared memory within 0.1 s
LOOK_S = 0.02  # between two looks at ranks that are being ended
KILLED_S = 5.0  # for a killed rank to be gone; one in an uninterruptible sleep may never be
SHOWN_RANKS = 4


class EndingAgent(LocalElasticAgent):
    """torch's agent for the ranks of this host; it is to end them itself where this has not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shutdown_s = parse_shutdown_s(os.environ)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by global rank
        self._marked: set[int] = set()
        self._until_s: float | None = None  # when ranks that are being ended are killed
        self._num_starts = 0
        self._has_failed = False  # since the last start

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        if self._num_starts and self._has_failed:
            self._note(f"restart {self._num_restarts} of {spec.max_restarts}: the ranks of this host start again")
        elif self._num_starts:
            self._note("restart: ranks of another host have failed; those of this host start again")
        if self._num_starts and isinstance(self._logs_specs, RankStreams):
            self._pcontext = None  # which holds ends of the pipes open
            self._logs_specs.close()  # so that what is left of the attempt before comes before the marks of the next
        for worker in worker_group.workers if self._num_starts else ():
            os.write(2, mark_restart(worker.global_rank))
        self._num_starts += 1
        self._marked.clear()  # of a life before: another host may ask for a restart when some had ended here
        self._until_s, self._has_failed = None, False
        pids: dict[int, Any] = super()._start_workers(worker_group)
        assert isinstance(self._pcontext, SubprocessContext)  # a program, never a function
        handlers = self._pcontext.subprocess_handlers
        self._processes = {worker.global_rank: handlers[worker.local_rank].proc for worker in worker_group.workers}
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        failed = {rank: code for rank, code in codes.items() if code}
        left, is_over = self._remaining_restarts, None not in codes.values()
        if not left or (is_over and not failed):
            self._mark(codes)
        if not failed and not is_over:
            return RunResult(state=WorkerState.HEALTHY)
        if failed:
            self._has_failed = True
            steps = [_told(failed)]
            if None in codes.values():
                steps.append(f"ending the others, up to {self._shutdown_s} s")
            if left:
                steps.append(f"restart {self._num_restarts + 1} of {worker_group.spec.max_restarts} follows")
            if len(steps) > 1:
                self._note("; ".join(steps))
            self._wait(until_s=time.monotonic() + SETTLE_S)
            if not left:
                self._mark({rank: process.poll() for rank, process in self._processes.items()})
            self._end(signal.SIGTERM)
        found: RunResult = super()._monitor_workers(worker_group)
        return found

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **kwargs: Any) -> None:
        self._end(death_sig)
        super()._shutdown(death_sig, *args, **kwargs)

    @property
    def _num_restarts(self) -> int:
        """Of this host's own; those that another host asked for do not count."""
        return self._worker_group.spec.max_restarts - self._remaining_restarts

    def _end(self, number: signal.Signals) -> None:
        """Return when no rank is left. Called again, after a signal to this process, it goes on with its waiting."""
        if self._until_s is None:
            self._until_s = time.monotonic() + self._shutdown_s
            for sent in (number, signal.SIGCONT):
                self._send(sent)
        self._wait(until_s=self._until_s)
        if left := self._alive():
            self._note(f"{_listed(left)} did not end within {self._shutdown_s} s: killed")
            self._send(signal.SIGKILL)
            self._wait(until_s=time.monotonic() + KILLED_S)

    def _mark(self, codes: Mapping[int, int | None]) -> None:
        """Tell the ends that are new; first of those that ended well: a failure may follow from that."""
        for rank, code in sorted(codes.items(), key=lambda item: bool(item[1])):
            if code is not None and rank not in self._marked:
                self._marked.add(rank)
                os.write(2, mark_end(Ended(rank, code, platform.node())))

    def _alive(self) -> list[int]:
        return [rank for rank, process in self._processes.items() if process.poll() is None]

    def _wait(self, *, until_s: float) -> None:
        while self._alive() and time.monotonic() < until_s:
            time.sleep(LOOK_S)

    def _send(self, number: signal.Signals) -> None:
        """To each rank that lives, and to what it has started: torch gives it a session of its own."""
        for rank in self._alive():
            with suppress(ProcessLookupError):
                os.killpg(self._processes[rank].pid, number)

    def _note(self, text: str) -> None:
        os.write(2, f"{text}\n".encode())


def _told(failed: dict[int, int]) -> str:
    """Which ranks failed, and how."""
    shown = [f"rank {rank} failed: {describe_exit(code)}" for rank, code in list(failed.items())[:SHOWN_RANKS]]
    more = len(failed) - len(shown)
    return ", ".join([*shown, *([f"and {more} more"] if more else [])])


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
