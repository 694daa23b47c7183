"""Who serves an op on CUDA where a kernel that is compiled ahead takes some of its operands, and not others.

    ZCORE_OPS or force() asks for     the kernel serves the operands     it does not
    nothing                           the kernel                         `otherwise`
    cuda                              the kernel                         refused, with the reason
    another source                    `otherwise`                        `otherwise`

Beside each kernel's function, in its file of zcore.kernels.cuda, is one called `why_not_` it, which says of the same
operands why the kernel does not serve them; and for the registry `why_unavailable`.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from zcore.core import ops
from zcore.core.errors import ConfigError
from zcore.kernels.cuda.loading import PRIORITY

__all__ = ["choosing", "offer"]

HALVES = (torch.bfloat16, torch.float16)  # what tensor cores take as it is


def choosing(op: str, file: str, *, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What calls the kernel of `op` in `file`, loaded then, or `otherwise`; raises ConfigError to refuse."""

    @cache
    def found() -> tuple[Callable[..., Any], Callable[..., str | None]]:
        module = import_module(f"zcore.kernels.cuda.{file}")
        return getattr(module, op), getattr(module, f"why_not_{op}")

    def call(*args: Any) -> Any:
        forced = ops.forced()
        if forced and forced != "cuda":
            return otherwise(*args)
        kernel, why_not = found()
        reason = why_not(*args)
        if reason is None:
            return kernel(*args)
        if forced == "cuda":
            raise ConfigError(
                f"{op}: {reason} `cuda` is asked for, by ZCORE_OPS or force(); without that, what else there is serves."
            )
        return otherwise(*args)

    return call


def offer(op: str, file: str, function: Callable[..., Any]) -> None:
    """Register `function`, torch's way to the kernel in `file`, as what serves `op` on CUDA first."""
    ops.implementation(
        op,
        source="cuda",
        priority=PRIORITY,
        devices=("cuda",),
        dtypes=HALVES,
        why_unavailable=lambda: import_module(f"zcore.kernels.cuda.{file}").why_unavailable(),
    )(function)
