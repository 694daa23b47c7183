"""Torch's library of these ops, which refuses the derivatives that compiled ops do not have.

They have first derivatives, by autograd's backward. Derivatives in forward mode (torch.func.jvp, jacfwd, dual tensors)
torch would take for zero and say nothing; torch.func.grad and jacrev end in words about torch's own insides. Both are
refused by name here, before the op runs. torch.vmap serves: torch calls the op for each element.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from zcore.core.errors import StateError

__all__ = ["LIBRARY"]


class _Library(torch.library.Library):
    """What torch.library.register_autograd puts under "Autograd" is guarded."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **given: Any) -> None:
        """As torch's."""
        kernel = _guarded(str(op_name).removeprefix("zcore::"), fn) if dispatch_key == "Autograd" else fn
        super().impl(op_name, kernel, dispatch_key, **given)  # type: ignore[no-untyped-call]  # torch's has no types


def _guarded(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        for each in args:
            if isinstance(each, Tensor) and unpack_dual(each).tangent is not None:
                raise _refusal(op, "forward-mode derivatives")
        # Private in torch, whose autograd.Function asks it for the same: it refuses a Function like those of ops.
        if torch._C._are_functorch_transforms_active() and _needs_gradient(args):
            raise _refusal(op, "derivatives by torch.func")
        return kernel(keyset, *args, **kwargs)

    return call


def _needs_gradient(operands: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in operands)


def _refusal(op: str, what: str) -> StateError:
    return StateError(
        f"zcore::{op} has no {what}; compiled ops have first derivatives only, by backward() and torch.autograd.grad. "
        "For others set ZCORE_OPS=reference, which computes in plain torch."
    )


LIBRARY: torch.library.Library = _Library("zcore", "DEF")  # type: ignore[no-untyped-call]  # nor has this
