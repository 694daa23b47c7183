"""Whether a replacement computes what a layer does: its outputs and gradients on random inputs, compared.

In eval mode and in train mode, with the same random numbers, so that what is dropped is dropped by both. A norm is
tried at its size, with random parameters in place of ones or zeros. An MLP is tried as a small copy with stand-ins for
its projections, which a replacement only calls: what lies between them is to be compared, and takes no memory so.
"""

import copy
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from zcore.kernels.recognising import TORCHS_OWN, is_norm, projections

__all__ = ["TOLERANCE", "distance", "sameness", "small_copy"]

# How far outputs and gradients may lie apart, of their largest: some units of rounding, which sums of a row add up.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HIDDEN, WIDTH = 16, 24  # of stand-ins
SEED = 11


def sameness(module: nn.Module) -> Hashable:
    """Equal of layers that differ in the values of their parameters alone, so that one trial is enough for all."""
    return (
        type(module),
        tuple(
            (name, repr(value) if isinstance(value, int | float | str | tuple | None) else id(value))
            for name, value in sorted(vars(module).items())
            if name not in TORCHS_OWN
        ),
        tuple((name, each.shape, each.dtype) for name, each in module.named_parameters(recurse=False)),
        tuple((name, sameness(child)) for name, child in module.named_children()),
    )


def small_copy(module: nn.Module) -> nn.Module:
    """A copy to be tried, so that the layer keeps its state; an MLP's has small projections where it has plain ones."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)  # shared with the layer otherwise
    names = () if is_norm(module) else projections(module)
    stand_ins = {name: _stand_in(name, module.get_submodule(name)) for name in names}
    if all(each is not None for each in stand_ins.values()):  # else by what it has: adapters, quantised weights
        for name, each in stand_ins.items():
            setattr(copied, name, each)
    return copied


def _stand_in(name: str, projection: nn.Module) -> nn.Module | None:
    into, out = (WIDTH, HIDDEN) if name in {"down_proj", "c_proj"} else (HIDDEN, WIDTH)
    out = 2 * WIDTH if name == "gate_up_proj" else out
    small: nn.Module
    if type(projection) is nn.Linear:
        small = nn.Linear(into, out, bias=projection.bias is not None, device="cpu")
    elif type(projection).__name__ == "Conv1D" and hasattr(projection, "nf"):
        small = type(projection)(out, into)
    else:
        return None
    with torch.no_grad():
        small.get_parameter("weight").normal_(std=into**-0.5)
    return small.to(next(projection.parameters()).dtype)


def distance(original: nn.Module, proposal: nn.Module, *, is_training: bool) -> float:
    """By how much outputs and gradients differ at most, over the largest of each. Draws from torch's generator."""
    hidden = _hidden(original)
    dtype = next(original.parameters()).dtype
    generator = torch.Generator().manual_seed(hidden)
    x, dy = (torch.randn(2, 3, hidden, generator=generator).to(dtype) for _ in range(2))
    values = {
        name: torch.randn(each.shape, generator=generator).to(each.dtype) if each.ndim == 1 else each.detach()
        for name, each in original.named_parameters()
    }
    found = [_try(each, values, x, dy, is_training) for each in (original, proposal)]
    largest = 0.0
    for one, two in zip(*found, strict=True):
        if one.dtype != two.dtype or one.shape != two.shape:
            return float("inf")
        scale = max(one.abs().max().item(), torch.finfo(dtype).tiny)
        largest = max(largest, (one.float() - two.float()).abs().max().item() / scale)
    return largest


def _hidden(module: nn.Module) -> int:
    """How long the rows are that `module` takes."""
    if is_norm(module):
        return module.get_parameter("weight").shape[-1]
    first = projections(module)[0]
    return module.get_parameter(f"{first}.weight").shape[0 if first == "c_fc" else -1]


def _try(module: nn.Module, values: dict[str, Tensor], x: Tensor, dy: Tensor, is_training: bool) -> list[Tensor]:
    """The output for `x` and the gradients of it and of `values`, by name."""
    modes = {each: each.training for each in module.modules()}
    module.train(is_training)
    torch.default_generator.manual_seed(SEED)
    given = {name: value.clone().requires_grad_() for name, value in sorted(values.items())}
    x = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            y: Tensor = torch.func.functional_call(module, given, (x,))
            # Of a sum, since torch imports sympy, half a second, where it is given the gradient of an output.
            return [y.detach(), *torch.autograd.grad((y * dy).sum(), [x, *given.values()])]
    finally:
        for each, mode in modes.items():
            each.training = mode
