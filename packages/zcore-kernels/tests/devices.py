"""The devices that ops with CUDA kernels are tried on: the CPU, and a GPU where there is one and kernels are built."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from zcore.kernels.cuda.loading import why_unavailable

__all__ = ["DEVICES", "needs_cuda", "without_waits"]

needs_cuda = pytest.mark.skipif(why_unavailable() is not None, reason=f"CUDA kernels: {why_unavailable()}")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))


@contextmanager
def without_waits() -> Iterator[None]:
    """Inside, what makes the host wait for a CUDA device raises RuntimeError.

    The first change of the mode warns that it is a prototype, when it is made already: as an error that would leave it
    to every later test.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype feature")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
