"""What torch's elastic launcher does with the output of its ranks: into pipes, and from there as marked lines.

torch's own choice is one file for each stream, which it reads again every 0.1 s; a line may come in two parts then.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

from zcore.comm.launch.lines import LineSplitter, mark

__all__ = ["RankStreams"]

_STDOUT, _STDERR = 1, 2
_DRAIN_S = 2.0  # a process that a rank left behind may hold its pipe for ever


class RankStreams(LogsSpecs):
    """Pipes of the ranks of one host; `close` after the ranks have ended."""

    def __init__(self) -> None:
        super().__init__()
        self._write_fds: list[int] = []
        self._threads: list[threading.Thread] = []

    @property
    def root_log_dir(self) -> str:
        """No files."""
        return os.devnull

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Make the pipes of a start, or restart; torch calls it with the variables of each local rank."""
        self._close_pipes()
        for variables in envs.values():
            variables["TORCHELASTIC_ERROR_FILE"] = ""
        return LogsDest(
            stdouts={local: self._open(int(variables["RANK"]), _STDOUT) for local, variables in envs.items()},
            stderrs={local: self._open(int(variables["RANK"]), _STDERR) for local, variables in envs.items()},
            error_files=dict.fromkeys(envs, os.devnull),
        )

    def note(self, text: str) -> None:
        """Say something that is no rank's."""
        os.write(_STDERR, f"{text}\n".encode())

    def close(self) -> None:
        """Pass on what is left in the pipes; those of another start may follow."""
        self._close_pipes()
        until_s = time.monotonic() + _DRAIN_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        self._threads.clear()

    def _open(self, rank: int, out_fd: int) -> str:
        """A path that torch can open for a rank to write to."""
        read_fd, write_fd = os.pipe()
        self._write_fds.append(write_fd)  # held until torch has opened the path
        thread = threading.Thread(target=self._pass_on, args=(rank, read_fd, out_fd), daemon=True)
        thread.start()
        self._threads.append(thread)
        return f"/dev/fd/{write_fd}"

    def _pass_on(self, rank: int, read_fd: int, out_fd: int) -> None:
        splitter = LineSplitter()
        with suppress(BrokenPipeError), open(read_fd, "rb", buffering=0) as stream:  # the front is gone, so are we soon
            while chunk := stream.read(2**16):
                _write(out_fd, rank, splitter.feed(chunk, now_s=time.monotonic()))
            _write(out_fd, rank, splitter.flush())

    def _close_pipes(self) -> None:
        for write_fd in self._write_fds:
            os.close(write_fd)
        self._write_fds.clear()


def _write(out_fd: int, rank: int, lines: Sequence[bytes]) -> None:
    for line in lines:
        for piece in mark(rank, line):
            os.write(out_fd, piece)
