"""What a layer of somebody else's may be swapped for: by its class, parts and attributes; only activations are run.

    norms    a name with "Norm", one weight [hidden] or with a bias     RMSNorm (offset 0 or 1), LayerNorm
    MLPs     gate_proj, up_proj, down_proj                              SwiGLU, GeGLU by erf or tanh
             gate_up_proj, down_proj                                    the same, packed
             c_fc, c_proj, dropout                                      BiasGELU

A layer of exactly these parts gets proposals, of which trials.py finds the one that computes the same. Whatever a
replacement could not keep, as buffers, hooks, dropout between projections or a second input, is a reason to leave it.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.kernels.mlps import GPT2MLP, FusedGatedMLP, GatedMLP
from zcore.kernels.nn import BiasGELU, GeGLU, LayerNorm, RMSNorm, SwiGLU
from zcore.kernels.ops.pieces import FLOATS

__all__ = ["OURS", "REFUSALS", "TORCHS_OWN", "Build", "is_candidate", "is_norm", "projections", "proposals", "why_left"]

Build = Callable[[nn.Module], nn.Module]  # a replacement, of the layer or of a small copy of it

OURS = (RMSNorm, LayerNorm, GatedMLP, FusedGatedMLP, GPT2MLP)
GATED, PACKED, GPT2 = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("c_fc", "c_proj")
ACTIVATIONS = ("act_fn", "activation_fn", "act")
ACTIVATION_TOLERANCE = 1e-5  # in fp32, for inputs from -6 to 6; the two forms of GELU lie 5e-4 apart

# What a layer of somebody else's may raise when it is tried on an input it does not take.
REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes of every module
STATE = ("get_extra_state", "_save_to_state_dict", "_load_from_state_dict")
HOOKS = tuple(name for name in sorted(TORCHS_OWN) if name.endswith("_hooks"))


def is_norm(module: nn.Module) -> bool:
    """Whether it calls itself a norm and has no parts."""
    return "Norm" in type(module).__name__ and not _children(module)


def is_candidate(module: nn.Module) -> bool:
    """Whether it looks like something that has a replacement."""
    names = _children(module)
    return is_norm(module) or "down_proj" in names or set(GPT2) <= names


def projections(module: nn.Module) -> tuple[str, ...]:
    """The names of an MLP's linear layers; none where they are not known."""
    names = _children(module)
    return next((each for each in (GATED, PACKED, GPT2) if set(each) <= names), ())


def why_left(module: nn.Module) -> str | None:
    """What of a candidate a replacement would lose or could not serve; None where nothing is."""
    parameters, buffers = list(module.parameters()), [name for name, _ in module.named_buffers()]
    if not parameters:
        return "which has no parameters to tell its size"
    if any(each.device.type != "cpu" or each.dtype not in FLOATS for each in parameters):
        where = sorted({f"{each.dtype} on {each.device}" for each in parameters})
        return f"whose parameters are {', '.join(where)}; compiled layers serve fp32, bf16 and fp16 on the CPU"
    if any(getattr(each, name, None) for each in module.modules() for name in HOOKS):
        return "which has hooks that a swap would lose"
    if "forward" in vars(module):
        return "whose forward is not that of its class; a swap would lose it"
    taken = inspect.signature(module.forward).parameters.values()
    if [each.kind for each in taken] != [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        return f"whose forward takes {', '.join(each.name for each in taken)}; a replacement takes one input"
    if any(getattr(type(module), name) is not getattr(nn.Module, name) for name in STATE):
        return "whose state dict is made in its own way"
    if buffers:
        return f"whose buffers a swap would lose: {', '.join(buffers)}"
    return None if is_norm(module) else _why_left_mlp(module)


def _why_left_mlp(module: nn.Module) -> str | None:
    """The same of its parts: projections, an activation without parameters, dropout of 0 or one that is kept."""
    known = projections(module)
    if not known or any(True for _ in module.parameters(recurse=False)):
        return "whose parts are none of the known"
    for name, child in module.named_children():
        if name in known:
            continue
        if name in ACTIVATIONS:
            if any(True for _ in child.parameters()):
                return f"whose {name} has parameters"
        elif not isinstance(child, nn.Dropout):
            return f"which has a part beside the known: {name}"
        elif child.p > 0.0 and (known != GPT2 or name != "dropout"):
            return f"whose {name} of p={child.p} a swap would lose; without dropout it has a replacement"
    return None


def proposals(module: nn.Module) -> list[Build]:
    """How replacements of a candidate are made, which share its parameters; in the order they are to be tried."""
    return list(_norms(module) if is_norm(module) else _mlps(module))


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _norms(module: nn.Module) -> Iterator[Build]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    named = {id(each) for each in (weight, bias) if each is not None}
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or {id(each) for each in module.parameters()} != named:
        return
    hidden = weight.numel()
    if bias is None and (eps is None or isinstance(eps, float)):
        for offset in (0.0, 1.0):
            yield partial(_rms_norm, hidden, eps, offset)
    if isinstance(eps, float):
        yield lambda of: _sharing(LayerNorm(hidden, eps=eps, elementwise_affine=False), of)


def _rms_norm(hidden: int, eps: float | None, offset: float, original: nn.Module) -> nn.Module:
    return _sharing(RMSNorm(hidden, eps=eps, offset=offset, elementwise_affine=False), original)


def _sharing(norm: RMSNorm | LayerNorm, original: nn.Module) -> nn.Module:
    for name, each in original.named_parameters():
        setattr(norm, name, each)
    return norm


def _mlps(module: nn.Module) -> Iterator[Build]:
    activation = next((getattr(module, each) for each in ACTIVATIONS if hasattr(module, each)), None)
    kind, known = _activation(activation), projections(module)
    if kind is None:
        return
    if known == GPT2:
        # c_fc is not called, its weight is read: it is to be the known layer itself, [in, out] with a bias.
        is_known = "dropout" in _children(module) and type(module.get_submodule("c_fc")).__name__ == "Conv1D"
        if is_known and kind != "silu":
            yield lambda of: GPT2MLP(of, BiasGELU(kind))
    else:
        mlp = GatedMLP if known == GATED else FusedGatedMLP
        yield lambda of: mlp(of, SwiGLU() if kind == "silu" else GeGLU(kind))


def _activation(function: object) -> str | None:
    """By its values: "silu", or "none" or "tanh" for a form of GELU; None for any other."""
    if not callable(function):
        return None
    x = torch.linspace(-6, 6, 1001)
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "none": functional.gelu,
        "tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    with torch.no_grad():
        try:
            found = function(x)
        except REFUSALS:
            return None  # a gate or a learned activation, of another shape
        if not isinstance(found, Tensor) or found.shape != x.shape:
            return None
        return next(
            (name for name, each in known.items() if (found - each(x)).abs().max() <= ACTIVATION_TOLERANCE), None
        )
