"""Where a rank lives: its host and process, told once when a group meets; and whether that process still lives."""

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch.distributed as dist

__all__ = ["Home", "own_home"]

ALIVE, STOPPED, ENDED = "S", "Tt", "ZX"  # letters of the system for what a process is up to


@dataclass(frozen=True, slots=True)
class Home:
    """The process of one rank. `host` is equal for processes that can see each other's files in /proc."""

    host: bytes  # 16 bytes
    name: str  # of the host, as people call it
    process: int
    began: int  # in ticks since the host started: a number of a process may be given again
    global_rank: int
    life: int  # of the process in this run, see cards.py

    @property
    def is_here(self) -> bool:
        """Whether this rank's process is on the host of the caller."""
        return self.host == _host()

    def has_ended(self) -> bool:
        """Whether the process is gone; False where that cannot be seen from this host."""
        state = _stat_of(self.process) if self.is_here and self.began else (ALIVE, self.began)
        return state is None or state[1] != self.began or state[0] in ENDED

    def is_stopped(self) -> bool:
        """Whether the process is on this host and halted by a signal, as by Ctrl-Z or a debugger."""
        state = _stat_of(self.process) if self.is_here else None
        return state is not None and state[0] in STOPPED

    def state(self, *, has_moved: bool | None = None) -> str:
        """In words, what is known of the process; `has_moved` if its cards change, None if it is too early to say."""
        if self.has_ended():
            known = "has ended"
        elif self.is_stopped():
            known = "is stopped"
        elif has_moved is None:
            known = "is alive" if self.is_here else "is not seen from here"
        else:
            known = "is alive" if has_moved else "gives no sign of life"
        return f"process {self.process} on {self.name} {known}"


def own_home(life: int) -> Home:
    """Where this rank lives."""
    process = os.getpid()
    state = _stat_of(process)
    return Home(_host(), socket.gethostname(), process, state[1] if state else 0, dist.get_rank(), life)


def _host() -> bytes:
    """What processes have in common that can share memory: the kernel, and the namespaces of processes and network.

    The latter, too: whoever has a network of its own on the same machine is meant to be another host. $ZCORE_COMM_HOST
    sets ranks apart in the same way.
    """
    return _host_named(os.environ.get("ZCORE_COMM_HOST", ""))


@cache
def _host_named(name: str) -> bytes:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        spaces = [Path("/proc/self/ns", kind).stat().st_ino for kind in ("pid", "net")]
    except OSError:  # a system without /proc: each process is by itself, and sees no other's state
        boot, spaces = socket.gethostname(), [os.getpid()]
    return hashlib.sha256(f"{boot} {spaces} {name}".encode()).digest()[:16]


def _stat_of(process: int) -> tuple[str, int] | None:
    """State and start of a process; None if there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return fields[0], int(fields[19])
