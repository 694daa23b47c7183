"""The devices that ops with CUDA kernels are tried on: the CPU, and a GPU where there is one and kernels are built."""

import pytest

from zcore.kernels.cuda.loading import why_unavailable

__all__ = ["DEVICES", "needs_cuda"]

needs_cuda = pytest.mark.skipif(why_unavailable() is not None, reason=f"CUDA kernels: {why_unavailable()}")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))
