"""Which function a layer calls: what the registry says, or inside a graph of torch.compile the op by its name.

What a layer calls has tensors of one dtype. Autocast makes others: a projection's bf16 beside a residual stream of
fp32. `alike` widens one of them then, as torch's own arithmetic does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError
from zcore.kernels.ops.pieces import FLOATS
from zcore.kernels.triton.loading import why_unavailable

__all__ = ["alike", "serving"]

# Found out here, since a graph cannot look through folders. What torch.compiler has for such functions,
# assume_constant_result, imports all of torch._dynamo: more than a second for each program with a layer.
_HAS_TRITON = why_unavailable() is None


def serving(op: str, reference: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function that serves `op` for `x`: compiled code where there is some, else `reference`.

    The registry's look-up reads the environment, which a graph cannot hold: ZCORE_OPS counts outside graphs only.
    Raises ConfigError for integers, to whose dtype a result would be cut.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise ConfigError(f"{op}: its first operand is {x.dtype}; expected a floating dtype. Convert it.")
    if not torch.compiler.is_compiling():
        return ops.get(op, device=x.device, dtype=x.dtype)
    function: Callable[..., Any] = getattr(torch.ops.zcore, op)
    is_served = x.device.type == "cpu" or (x.device.type == "cuda" and _HAS_TRITON)
    return function if is_served and x.dtype in FLOATS else reference


def alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, and in the dtype that torch gives their sum; themselves where they are.

    >>> [each.dtype for each in alike(torch.ones(2, dtype=torch.bfloat16), torch.ones(2))]
    [torch.float32, torch.float32]
    """
    if one.dtype is not other.dtype:
        wide = torch.promote_types(one.dtype, other.dtype)
        one, other = one.to(wide), other.to(wide)
    return one.contiguous(), other.contiguous()
