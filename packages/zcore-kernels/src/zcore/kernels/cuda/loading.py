"""How ops come to their CUDA kernels: those of the extension `_cuda`, which is built where a CUDA compiler is.

    built without one        no `_cuda` in the wheel: on CUDA ops have Triton, or their reference
    no driver, no device     it can be imported, and serves nothing
    a device                 it serves before Triton, on the stream that is current in torch

Memory is torch's: kernels neither allocate nor wait for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from zcore.core import ops
from zcore.core.errors import NotInstalledError
from zcore.kernels.ops.pieces import FLOATS

__all__ = ["architectures", "extension", "launching", "offer", "why_unavailable"]

PRIORITY = 10  # as compiled code for the CPU; over Triton
NOT_BUILT = (
    "this wheel was built without CUDA kernels; where nvcc is on PATH: "
    "pip install --no-binary zcore-kernels -Ccmake.define.ZCORE_CUDA=ON zcore-kernels"
)


@cache
def why_unavailable() -> str | None:
    """Why no CUDA kernel can run here, or None if one can."""
    if find_spec("zcore.kernels._cuda") is None:
        return NOT_BUILT
    if not torch.cuda.is_available():
        return "needs a CUDA device; torch sees none"
    said: str | None = extension().why_unusable()
    return None if said is None else f"cannot run on this device: {said}. Built for {architectures()}"


def architectures() -> str | None:
    """What the kernels were compiled for, or None where there are none."""
    if find_spec("zcore.kernels._cuda") is None:
        return None
    built: str = import_module("zcore.kernels._cuda").architectures()
    return built


@cache
def extension() -> ModuleType:
    """`_cuda`, imported by the first call. Raises NotInstalledError where it was not built."""
    if find_spec("zcore.kernels._cuda") is None:
        raise NotInstalledError(f"zcore.kernels._cuda: {NOT_BUILT}. ZCORE_OPS=reference computes in plain torch.")
    return import_module("zcore.kernels._cuda")


@contextmanager
def launching(device: torch.device) -> Iterator[int]:
    """Inside, `device` is the current one, on which kernels are launched; gives the number of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def offer(op: str, function: Callable[..., Any], *, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Register `function` as what serves `op` by a CUDA kernel."""
    ops.implementation(
        op, source="cuda", priority=PRIORITY, devices=("cuda",), dtypes=dtypes, why_unavailable=why_unavailable
    )(function)
