"""What an optimizer is given to step, whole parameters or fragments, as plain flat tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from zcore.zero.parts import Parts
from zcore.zero.sharded_parameter import ShardedParameter

__all__ = ["evaluate", "gradient_of", "parts_of", "values_of", "zeros_for"]


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """What the closure of an optimizer's step returns, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def parts_of(param: Tensor) -> Parts:
    """Of a fragment; an ordinary parameter is whole."""
    if isinstance(param, ShardedParameter) and param.owner is not None:
        return param.owner.parts(param.position)
    numel = param.numel()
    return Parts(tuple(param.shape), (range(numel),), slice(0, numel), None)


def values_of(param: Tensor) -> Tensor:
    """What this rank steps, as a plain flat tensor without a graph; edits are edits of the parameter."""
    with torch._C.DisableTorchFunctionSubclass():
        return param.detach().as_subclass(Tensor).view(-1)


def gradient_of(param: Tensor) -> Tensor | None:
    """Its reduced gradient, plain and flat."""
    with torch._C.DisableTorchFunctionSubclass():
        return None if param.grad is None else param.grad.as_subclass(Tensor).reshape(-1)


def zeros_for(param: Tensor) -> Tensor:
    """A state of what this rank steps, in its shape and dtype."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.zeros_like(param.detach().as_subclass(Tensor))
