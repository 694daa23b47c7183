"""The memory that processes hold together, looked at from outside every millisecond. Linux only; knows no torch.

    held = sum over processes of their private pages (RssAnon) + sum over files in memory that any of them has open

A page that ranks share lies in such a file (memfd, /dev/shm) and so counts once, however many map it, also while
none does. What is read from disk, as libraries are, does not count: the system may drop it.

    python watch.py PID ...      a program of its own: no watched process runs it, waits for it, or holds its memory
        each line on stdin       one JSON line: peak_bytes since the last one, held_bytes now, samples looked at
        end of stdin             its end
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = ["Held", "Watch"]

EVERY_S = 1e-3
FILES_EVERY_S = 20e-3  # a process opens few, and early


@dataclass(frozen=True, slots=True)
class Held:
    """All processes together. Bytes."""

    peak_bytes: int  # since the last look
    held_bytes: int
    samples: int


class Watch:
    """Watches `processes`, by id, from a process of its own, as long as the `with` block lasts."""

    def __init__(self, processes: Sequence[int]) -> None:
        command = [sys.executable, __file__, *map(str, processes)]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program.communicate()

    def look(self) -> Held:
        """What was held at most since the last look, and is held now."""
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        print(file=self._program.stdin, flush=True)
        return Held(**json.loads(self._program.stdout.readline()))


def private_bytes(process: int) -> int:
    """Pages that the process shares with nobody, or still has from its parent."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0  # it has ended, and its parent has not yet been told


def files_in_memory(processes: Sequence[int]) -> list[str]:
    """One path to each file in memory that any of the processes has open."""
    found: dict[tuple[int, int], str] = {}
    for process in processes:
        folder = f"/proc/{process}/fd"
        for name in os.listdir(folder):  # noqa: PTH208 - a thousand times a second
            path = f"{folder}/{name}"
            try:
                if os.readlink(path).startswith(("/memfd:", "/dev/shm/")):  # noqa: PTH115
                    status = os.stat(path)  # noqa: PTH116
                    found[status.st_dev, status.st_ino] = path
            except FileNotFoundError:  # closed since
                continue
    return list(found.values())


def main() -> None:
    """Watch until stdin ends."""
    processes = [int(each) for each in sys.argv[1:]]
    peak_bytes = samples = 0
    files: list[str] = []
    files_due_s = 0.0
    while True:
        is_asked = bool(select.select([sys.stdin], [], [], EVERY_S)[0])
        if is_asked and not sys.stdin.readline():
            return
        if is_asked or time.monotonic() >= files_due_s:
            files, files_due_s = files_in_memory(processes), time.monotonic() + FILES_EVERY_S
        shared_bytes = sum(os.stat(path).st_blocks * 512 for path in files)  # noqa: PTH116
        held_bytes = shared_bytes + sum(private_bytes(each) for each in processes)
        peak_bytes, samples = max(peak_bytes, held_bytes), samples + 1
        if is_asked:
            print(json.dumps({"peak_bytes": peak_bytes, "held_bytes": held_bytes, "samples": samples}), flush=True)
            peak_bytes = samples = 0


if __name__ == "__main__":
    main()
