"""Where the lines of a run go: stdout or stderr, each with a prefix that says whose it is, in a colour of its own."""

import os
from typing import TextIO

__all__ = ["Screen"]

COLOURS = (36, 33, 35, 32, 34, 31)  # by rank; red last, as it looks like an error
DIM = 2  # what no rank wrote


class Screen:
    """Two streams that may be terminals; `is_closed` once nobody reads one of them."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, has_prefix: bool = True, has_colour: bool = True) -> None:
        self.is_closed = False  # as by `| head`
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._has_prefix = has_prefix
        self._coloured = {name for name, stream in self._streams.items() if has_colour and stream.isatty()}

    def show(self, name: str, text: str, *, whose: int | str | None = None) -> None:
        """Write one line to `name`, stdout or stderr."""
        prefix = f"[{whose}] " if self._has_prefix and whose is not None else ""
        if prefix and name in self._coloured:
            colour = COLOURS[whose % len(COLOURS)] if isinstance(whose, int) else DIM
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        stream = self._streams[name]
        try:
            line = f"{prefix}{text}\n"
            encoding = stream.encoding or "utf-8"
            stream.write(line.encode(encoding, errors="backslashreplace").decode(encoding))  # whatever ranks write
            stream.flush()
        except BrokenPipeError:
            self.is_closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python fails on it once more at its exit
