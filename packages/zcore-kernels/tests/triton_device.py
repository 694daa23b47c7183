"""Where tests of Triton's kernels run: on a GPU where there is one, else in Triton's interpreter, on CPU tensors.

The interpreter has to be chosen before triton is imported, so test_triton.py runs their files in a process of its own;
`TRITON_INTERPRET=1 pytest` with a file's name does, too.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from zcore.kernels.triton.loading import is_interpreted, why_unavailable

__all__ = ["DEVICE", "WHY_NOT_INTERPRETED", "WHY_SKIPPED", "run_interpreted", "why_not_interpreted"]

LIMIT_S = 400  # of a file in the interpreter, which takes a minute or less


def why_not_interpreted(triton: str | None, numpy: str | None) -> str | None:
    """Why these versions cannot interpret kernels, or None if they can.

    >>> why_not_interpreted("3.6.0", "2.4.0")
    "the interpreter of triton 3.6.0 fails over NumPy 2.4.0: it makes an int of an array of one element"
    """
    if triton is None:
        return "triton is not installed"
    if numpy is None:
        return "Triton's interpreter needs NumPy"
    if _minor(triton) < (3, 7) and _minor(numpy) >= (2, 4):
        return (
            f"the interpreter of triton {triton} fails over NumPy {numpy}: it makes an int of an array of one element"
        )
    return None


def _minor(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")[:2]))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_interpreted(file: str) -> str:
    """Run pytest on a file of this folder in the interpreter, in a process of its own, and return what it says."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


DEVICE = torch.device("cpu" if is_interpreted() or not torch.cuda.is_available() else "cuda")
WHY_NOT_INTERPRETED = why_unavailable() or why_not_interpreted(_installed("triton"), _installed("numpy"))
WHY_SKIPPED = why_unavailable() or (
    WHY_NOT_INTERPRETED
    if is_interpreted()
    else None
    if DEVICE.type == "cuda"
    else "runs on a GPU, or with TRITON_INTERPRET=1, by test_triton.py"
)
