"""How output of several ranks shares one stream: a line is never torn, and says which rank wrote it. Pure.

    <1E>3 epoch 1: loss 0.7         rank 3 wrote "epoch 1: loss 0.7"
    <1E>3+a long line, in           rank 3 wrote a line of which more is to come
    <1E>3!-9 worker-1               rank 3, on worker-1, ended with -9: by signal 9
    <1E>3*                          rank 3 starts again: what it wrote before is of another attempt
    ssh: connect to host ...        by no rank: ssh, srun, a launcher

Both ends use this: an agent splits what its ranks write and marks the lines, the front reads the marks. Under srun many
agents share a stream, so what travels is short: a pipe keeps 512 bytes together, srun a line of 1,024. ASCII 1E is the
record separator, with which no text line begins.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

__all__ = ["Ended", "LineReader", "LineSplitter", "Restarted", "Said", "mark", "mark_end", "mark_restart"]

_MARKED = re.compile(rb"\x1e(\d+)( |\+|\*|!(-?\d+) )(.*)", re.DOTALL)
_PIECE_BYTES = 480  # with its mark below 512, POSIX's least PIPE_BUF
_LONGEST_BYTES = 2**16  # what has no end is cut here
_PROGRESS_S = 5.0  # between two looks at a progress bar


@dataclass(frozen=True, slots=True)
class Said:
    """A line of a rank; of none if `rank` is None."""

    rank: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A rank that ended by itself."""

    rank: int
    exitcode: int  # minus the number of the signal that killed it
    host: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """A rank that starts again."""

    rank: int


def mark(rank: int, line: bytes) -> list[bytes]:
    r"""A rank's line as it travels; each piece is to be written by itself.

    >>> mark(3, b"hello")
    [b'\x1e3 hello\n']
    """
    starts = range(0, max(1, len(line)), _PIECE_BYTES)
    pieces = [line[start : start + _PIECE_BYTES] for start in starts]
    return [*(b"\x1e%d+%s\n" % (rank, piece) for piece in pieces[:-1]), b"\x1e%d %s\n" % (rank, pieces[-1])]


def mark_end(ended: Ended) -> bytes:
    """The end of a rank as it travels."""
    return b"\x1e%d!%d %s\n" % (ended.rank, ended.exitcode, ended.host.encode())


def mark_restart(rank: int) -> bytes:
    """The next start of a rank as it travels."""
    return b"\x1e%d*\n" % rank


class LineReader:
    r"""Bytes of one stream in, what they tell out.

    >>> LineReader().feed(b"\x1e3 hello\n\x1e3!-9 worker-1\nmotd\n", now_s=0.0)
    [Said(rank=3, text='hello'), Ended(rank=3, exitcode=-9, host='worker-1'), Said(rank=None, text='motd')]
    """

    def __init__(self) -> None:
        self._splitter = LineSplitter()
        self._begun: defaultdict[int, bytes] = defaultdict(bytes)  # by rank

    def feed(self, chunk: bytes, *, now_s: float) -> list[Said | Ended | Restarted]:
        """What `chunk` completes; with an empty one, the stream's end, what is left."""
        lines = self._splitter.feed(chunk, now_s=now_s) if chunk else self._splitter.flush()
        return [told for line in lines if (told := self._read(line))]

    def _read(self, line: bytes) -> Said | Ended | Restarted | None:
        found = _MARKED.fullmatch(line)
        if not found:
            return Said(None, line.decode(errors="replace"))
        rank, kind, exitcode, text = int(found[1]), found[2], found[3], found[4]
        if exitcode is not None:
            return Ended(rank, int(exitcode), text.decode(errors="replace"))
        if kind == b"*":
            return Restarted(rank)
        if kind == b"+":
            self._begun[rank] += text
            return None
        return Said(rank, (self._begun.pop(rank, b"") + text).decode(errors="replace"))


class LineSplitter:
    r"""Bytes in, whole lines out.

    A progress bar writes `\r` and overwrites its line. Of its states one comes out every 5 seconds, and the last.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._shown_s = float("-inf")

    def feed(self, chunk: bytes, *, now_s: float) -> list[bytes]:
        """The lines that `chunk` completes."""
        *lines, rest = (self._rest + chunk).split(b"\n")
        shown = [_visible(line) for line in lines]
        kept = len(rest.rstrip(b"\r"))  # a carriage return at the end may be half of a line's end
        bar, carriage_return, state = rest[:kept].rpartition(b"\r")
        if carriage_return:
            rest = state + rest[kept:]
            if _visible(bar) and now_s - self._shown_s >= _PROGRESS_S:
                self._shown_s = now_s
                shown.append(_visible(bar))
        while len(rest) > _LONGEST_BYTES:
            shown.append(rest[:_LONGEST_BYTES])
            rest = rest[_LONGEST_BYTES:]
        self._rest = rest
        return shown

    def flush(self) -> list[bytes]:
        """The last line, if it had no end."""
        last, self._rest = _visible(self._rest), b""
        return [last] if last else []


def _visible(line: bytes) -> bytes:
    r"""What a terminal would show in the end: what follows the last `\r` but for one at the very end."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]
