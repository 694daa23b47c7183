"""Start commands, show what their ranks write, end all of them when one fails.

    all run --> all ended ------------------------------------------------> 0
      |-- one failed: others have SETTLE_S to report --> all are told to end --> its traceback, its exit code
      |     (its own host ends the ranks there at once)
      `-- Ctrl-C, SIGTERM, SIGHUP, a closed stdout ----> all are told to end --> 128 + signal

One thread, one selector: output, the ends of commands and signals come in one order, and a slow terminal slows the
ranks instead of filling memory. Commands get a session of their own, so that a Ctrl-C reaches them only through here.
"""

import os
import selectors
import signal
import subprocess
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import IO

from zcore.comm.launch.agent import EXPLAINED
from zcore.comm.launch.failure import Failure, choose_first, draw
from zcore.comm.launch.lines import Ended, LineReader, Restarted
from zcore.comm.launch.plan import SHUTDOWN_S, Command
from zcore.comm.launch.screen import Screen
from zcore.core.errors import ConfigError

__all__ = ["run"]

TICK_S = 0.1  # between two looks at processes and signals
SETTLE_S = 1.0  # a rank that only lost its connection may be reported before the one that broke it
DRAIN_S = 2.0  # for the output of a command that has ended; what it left behind (ssh's master) may hold it open
PATIENCE_S = 10.0  # for a launcher to end, beyond what it gives its ranks
KILL_S = 5.0  # between SIGTERM and SIGKILL for a command that does not heed the end of its stdin
KEPT_LINES = 500  # of each rank's stderr
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class RankEnd:
    """The end of a rank, as it became known."""

    ended: Ended
    host: str
    seen_s: float


@dataclass(slots=True)
class Tail:
    """The last of one stderr."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    traceback_s: float | None = None

    def add(self, text: str, now_s: float) -> None:
        """Take in a line."""
        self.lines.append(text)
        if "Traceback (most recent call last):" in text:
            self.traceback_s = now_s


@dataclass(slots=True, eq=False)
class Launcher:
    """A command that was started."""

    command: Command
    process: subprocess.Popen[bytes]
    tail: Tail = field(default_factory=Tail)  # of what no rank wrote
    num_open: int = 2  # stdout, stderr
    ended_s: float | None = None
    is_over: bool = False  # ended, and its output shown
    has_reported: bool = False  # a failed rank
    was_told: bool = False  # to end

    @property
    def host(self) -> str:
        """What its own lines are marked with."""
        return self.command.host or "launcher"

    def tell(self, number: signal.Signals) -> None:
        """End it and its ranks, on whatever host."""
        assert self.process.stdin is not None
        if not self.was_told:
            self.was_told = True
            with suppress(BrokenPipeError), self.process.stdin:
                self.process.stdin.write(f"{number.name}\n".encode())

    def kill(self, number: signal.Signals) -> None:
        """End the command here and now; what it started elsewhere sees its end of file."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


@dataclass(frozen=True, slots=True)
class Stream:
    """One output of a launcher."""

    name: str  # stdout or stderr
    pipe: IO[bytes]  # unbuffered
    launcher: Launcher
    reader: LineReader = field(default_factory=LineReader)


def run(commands: Sequence[Command], screen: Screen, *, shutdown_s: float = SHUTDOWN_S) -> int:
    """Run `commands` to their end; the exit code for all of them. shutdown_s: what launchers give ranks to end."""
    front = _Front(screen, shutdown_s)
    with _handling(STOP_SIGNALS, front.stop):
        return front.run(commands)


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    before = {number: signal.signal(number, lambda got, _: handle(signal.Signals(got))) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Front:
    """The state of one run."""

    def __init__(self, screen: Screen, shutdown_s: float) -> None:
        self._screen = screen
        self._shutdown_s = shutdown_s
        self._selector = selectors.DefaultSelector()
        self._launchers: list[Launcher] = []
        self._tails: defaultdict[int, Tail] = defaultdict(Tail)  # of ranks
        self._ends: list[RankEnd] = []
        self._failed_launchers: list[Failure] = []
        self._stopped_by: signal.Signals | None = None

    def stop(self, number: signal.Signals) -> None:
        """Note that a signal asks to end; called at any moment."""
        self._stopped_by = self._stopped_by or number

    def run(self, commands: Sequence[Command]) -> int:
        """Everything; the exit code."""
        try:
            for command in commands:
                self._start(command)
            self._follow(until=lambda: self._has_failed or self._stopped_by is not None)
            if self._has_failed:
                self._follow(until=lambda: self._stopped_by is not None, for_s=SETTLE_S)
        finally:
            self._end()
            self._close()
        if self._stopped_by is not None:
            return 128 + self._stopped_by
        if not self._has_failed:
            return 0
        first = choose_first([*map(self._failure, self._failed_ends), *self._failed_launchers])
        ended_before = [end.ended.rank for end in takewhile(lambda end: not end.ended.exitcode, self._ends)]
        self._screen.show("stderr", draw(first, ended_before=sorted(ended_before)))
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode

    @property
    def _failed_ends(self) -> list[RankEnd]:
        return [end for end in self._ends if end.ended.exitcode]

    @property
    def _has_failed(self) -> bool:
        return bool(self._failed_launchers or self._failed_ends)

    def _failure(self, end: RankEnd) -> Failure:
        """What the rank has left, once all its output has come."""
        tail = self._tails[end.ended.rank]
        # One that a signal killed did not raise: a traceback of it is older, and was handled.
        seen_s = tail.traceback_s if end.ended.exitcode > 0 and tail.traceback_s else end.seen_s
        return Failure(end.ended.rank, end.host, end.ended.exitcode, tuple(tail.lines), seen_s)

    def _start(self, command: Command) -> None:
        try:
            process = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.variables},
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"{command.argv[0]} cannot be started: {error}. It is to begin this: {command}"
            ) from error
        launcher = Launcher(command, process)
        self._launchers.append(launcher)
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            assert pipe is not None
            self._selector.register(pipe, selectors.EVENT_READ, Stream(name, pipe, launcher))

    def _follow(self, *, until: Callable[[], bool] = lambda: False, for_s: float | None = None) -> None:
        """Show output until all is over, or `until`, or `for_s` has passed."""
        deadline_s = float("inf") if for_s is None else time.monotonic() + for_s
        while not all(launcher.is_over for launcher in self._launchers) and not until():
            if time.monotonic() >= deadline_s:
                return
            for key, _ in self._selector.select(TICK_S):
                self._show(key.data)
            for launcher in self._launchers:
                self._look_after(launcher)
            if self._screen.is_closed:
                self.stop(signal.SIGPIPE)

    def _show(self, stream: Stream) -> None:
        chunk = stream.pipe.read(2**16)
        now_s = time.monotonic()
        for told in stream.reader.feed(chunk, now_s=now_s):
            if isinstance(told, Ended):
                stream.launcher.has_reported |= bool(told.exitcode)
                self._ends.append(RankEnd(told, stream.launcher.command.host or told.host, now_s))
                continue
            if isinstance(told, Restarted):
                self._tails.pop(told.rank, None)
                self._ends = [end for end in self._ends if end.ended.rank != told.rank]
                continue
            if stream.name == "stderr":
                tail = stream.launcher.tail if told.rank is None else self._tails[told.rank]
                tail.add(told.text, now_s)
            whose = stream.launcher.host if told.rank is None else told.rank
            self._screen.show(stream.name, told.text, whose=whose)
        if not chunk:
            stream.launcher.num_open -= 1
            self._selector.unregister(stream.pipe)
            stream.pipe.close()

    def _look_after(self, launcher: Launcher) -> None:
        """Notice the end of a launcher; one that fails without naming a rank is itself the failure."""
        exitcode = launcher.process.poll()
        if exitcode is None or launcher.is_over:
            return
        now_s = time.monotonic()
        launcher.ended_s = launcher.ended_s or now_s
        if launcher.num_open and now_s - launcher.ended_s < DRAIN_S:
            return
        launcher.is_over = True
        if exitcode and not launcher.has_reported and not launcher.was_told:
            lines = (*launcher.tail.lines, *_advice(launcher.command, exitcode))
            self._failed_launchers.append(Failure(None, launcher.host, exitcode, lines, now_s))

    def _end(self) -> None:
        """No process is left when this returns, but for one that cannot be reached."""
        if all(launcher.is_over for launcher in self._launchers):
            return
        if self._stopped_by:
            self._screen.show("stderr", f"{self._stopped_by.name}: all ranks are told to end", whose="zcore run")
        elif not all(launcher.is_over or launcher.has_reported for launcher in self._launchers):
            text = f"ending the ranks of the other hosts, up to {self._shutdown_s:g} s"
            self._screen.show("stderr", text, whose="zcore run")
        for launcher in self._launchers:
            launcher.tell(self._stopped_by if self._stopped_by in STOP_SIGNALS else signal.SIGTERM)
        self._follow(for_s=self._shutdown_s + PATIENCE_S)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for launcher in self._launchers:
                launcher.kill(number)
            self._follow(for_s=KILL_S)

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.pipe.close()
        self._selector.close()
        for launcher in self._launchers:
            assert launcher.process.stdin is not None
            launcher.process.stdin.close()


def _advice(command: Command, exitcode: int) -> tuple[str, ...]:
    """What to do about a launcher that failed by itself."""
    if command.host is None or exitcode == EXPLAINED:
        return ()
    if exitcode == 255:  # ssh's own
        return (f"{command.host} was not reached, or was lost. Try by hand: {' '.join(command.argv[:-1])} true",)
    return (
        f"On {command.host} the same Python with zcore-comm and the same directory are expected as here; this command "
        f"was to run there: {command.argv[-1]}",
    )
