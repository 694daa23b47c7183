"""What every file of figures begins with: how it came about, and where."""

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from zcore.core.machine import find_machine, find_versions

__all__ = ["head_of", "told_command"]


def head_of(program: str, arguments: Sequence[str] | None, *, is_benchmark: bool, schema: int = 1) -> dict[str, Any]:
    """For the report of `program`, a path in the tree; `arguments` None are those of this process."""
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "schema": schema,
        "is_benchmark": is_benchmark,
        "command": told_command(program, given),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": find_machine(torch.device("cpu")),
        "versions": find_versions() | ({"deepspeed": version("deepspeed")} if find_spec("deepspeed") else {}),
    }


def told_command(program: str, arguments: Sequence[str]) -> str:
    """`python PROGRAM ARGUMENTS`, but `--out FILE`: what anyone may type, not the path that was written to."""
    shown = list(arguments)
    while "--out" in shown:
        at = shown.index("--out")
        del shown[at : at + 2]
    return shlex.join(["python", program, *(each for each in shown if not each.startswith("--out="))])
