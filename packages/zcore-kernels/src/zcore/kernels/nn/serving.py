"""Which function a layer calls: what the registry says, or inside a graph of torch.compile the op by its name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zcore.core import ops
from zcore.kernels.ops.pieces import FLOATS
from zcore.kernels.triton.loading import why_unavailable

__all__ = ["serving"]


def serving(op: str, reference: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function that serves `op` for `x`: compiled code where there is some, else `reference`.

    The registry's look-up reads the environment, which a graph cannot hold: ZCORE_OPS counts outside graphs only.
    """
    if not torch.compiler.is_compiling():
        return ops.get(op, device=x.device, dtype=x.dtype)
    function: Callable[..., Any] = getattr(torch.ops.zcore, op)
    is_served = x.device.type == "cpu" or (x.device.type == "cuda" and _has_triton())
    return function if is_served and x.dtype in FLOATS else reference


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's has no types
def _has_triton() -> bool:
    return why_unavailable() is None
