"""A command as a file of figures tells it: what anyone may type, without the path that the file was written to."""

import shlex
from collections.abc import Sequence

__all__ = ["told_command"]


def told_command(program: str, arguments: Sequence[str]) -> str:
    """`python PROGRAM ARGUMENTS`, but `--out FILE`."""
    shown = list(arguments)
    while "--out" in shown:
        at = shown.index("--out")
        del shown[at : at + 2]
    return shlex.join(["python", program, *(each for each in shown if not each.startswith("--out="))])
