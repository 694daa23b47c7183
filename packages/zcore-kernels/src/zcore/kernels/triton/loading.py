"""How ops come to their Triton kernels: a file of them is imported, and triton with it, by the first call.

    on a CUDA device         compiled by Triton, chosen before the reference
    TRITON_INTERPRET=1       run by Triton's interpreter, on CPU tensors too: to test and debug kernels, and far slower
                             than compiled code, so only where `force` or ZCORE_OPS asks for "triton"

The variable has to be set before this is imported, as triton itself wants it.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from zcore.core import ops
from zcore.core.errors import NotInstalledError
from zcore.kernels.ops.operands import first_tensor
from zcore.kernels.ops.pieces import FLOATS

__all__ = ["deferred", "interpretable", "is_interpreted", "offer", "why_unavailable"]

PRIORITY = 5  # below code compiled ahead, over references
LAST = -1  # of interpreted code: below references


def is_interpreted() -> bool:
    """Whether Triton is to interpret kernels; these are the words that it knows."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}


@cache
def why_unavailable() -> str | None:
    """Why no Triton kernel can be loaded here, or None if one can."""
    return None if find_spec("triton") else "needs triton: pip install 'zcore-kernels[triton]'"


def deferred(file: str, function: str) -> Callable[..., Any]:
    """What calls `function` of zcore.kernels.triton.`file`, which is loaded then, on the device of its first tensor.

    The call raises NotInstalledError where triton is not installed.
    """

    @cache
    def found() -> Callable[..., Any]:
        reason = why_unavailable()
        if reason is not None:
            raise NotInstalledError(f"{function} on a GPU {reason}. ZCORE_OPS=reference computes in plain torch.")
        loaded: Callable[..., Any] = getattr(import_module(f"zcore.kernels.triton.{file}"), function)
        return loaded

    def call(*args: Any, **kwargs: Any) -> Any:
        first = first_tensor((*args, *kwargs.values()))
        with nullcontext() if first is None else torch.cuda.device_of(first):  # Triton launches on the current device
            return found()(*args, **kwargs)

    return call


def offer(op: str, function: Callable[..., Any], *, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Register `function` as what serves `op` by Triton, for a first operand of `dtypes`."""
    is_slow = is_interpreted()
    ops.implementation(
        op,
        source="triton",
        priority=LAST if is_slow else PRIORITY,
        devices=("cpu", "cuda") if is_slow else ("cuda",),
        dtypes=dtypes,
        why_unavailable=why_unavailable,
    )(_forcing(function) if is_slow else function)


def interpretable(cpu: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`cpu` itself; where kernels are interpreted, what calls `kernel` while "triton" is forced, and else `cpu`.

    So torch's op for the CPU, its gradient and graphs that hold it come to the kernel, too.
    """
    if not is_interpreted():
        return cpu

    def call(*args: Any, **kwargs: Any) -> Any:
        return (kernel if ops.forced() == "triton" else cpu)(*args, **kwargs)

    return call


def _forcing(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with ops.force("triton"):
            return function(*args, **kwargs)

    return call
