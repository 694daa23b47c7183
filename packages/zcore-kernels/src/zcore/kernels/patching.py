"""Swap layers of a model in place for compiled ones that compute the same, sharing their parameters.

A layer is recognised by what it computes: class and attributes propose replacements, and one is taken only if on random
inputs, with random values for the norm's parameters, it has the original's outputs and gradients. So Gemma's norm,
which multiplies by weight + 1, is served as such, and what only looks alike stays.

    norms    a name with "Norm", one weight [hidden] or with a bias     RMSNorm (offset 0 or 1), LayerNorm
    MLPs     gate_proj, up_proj, down_proj                              SwiGLU, GeGLU by erf or tanh
             gate_up_proj, down_proj                                    the same, packed
             c_fc, c_proj, dropout                                      BiasGELU

What is left is listed with the reason. Keys of the state dict stay as they are.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.kernels.mlps import GPT2MLP, FusedGatedMLP, GatedMLP
from zcore.kernels.nn import BiasGELU, GeGLU, LayerNorm, RMSNorm, SwiGLU
from zcore.kernels.ops.pieces import FLOATS

__all__ = ["Left", "PatchReport", "Swap", "patch"]

_log = logging.getLogger(__name__)

# How far outputs and gradients may lie apart, of their largest: some units of rounding, which sums of a row add up.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ACTIVATION_TOLERANCE = 1e-5  # in fp32, for inputs from -6 to 6; the two forms of GELU lie 5e-4 apart

# What a layer of somebody else's may raise when it is tried on an input it does not take.
REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

OURS = (RMSNorm, LayerNorm, GatedMLP, FusedGatedMLP, GPT2MLP)


@dataclass(frozen=True, slots=True)
class Swap:
    """One layer that was swapped."""

    name: str
    original: str  # its class
    replacement: str


@dataclass(frozen=True, slots=True)
class Left:
    """One layer that looked as if it could be, and was not."""

    name: str
    original: str
    why: str


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What `patch` did; its text has a line for each layer."""

    swapped: tuple[Swap, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        done = [f"swapped  {each.name}: {each.original} -> {each.replacement}" for each in self.swapped]
        return "\n".join([*done, *(f"left     {each.name}: {each.original}, {each.why}" for each in self.left)])


def patch(model: nn.Module) -> PatchReport:
    """Swap what can be served on the CPU in fp32, bf16 or fp16; `model` computes as before, within rounding.

    Patch before torch.compile, FSDP or hooks are put on: a layer with hooks is left.
    """
    verdicts: dict[int, nn.Module | str] = {}
    swapped: list[Swap] = []
    left: list[Left] = []
    places = [
        (f"{path}.{name}" if path else name, parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
    ]
    if _is_candidate(model):
        left.append(Left("(the model itself)", type(model).__name__, "which has no owner to swap it in"))
    for path, parent, name, child in places:
        if isinstance(child, OURS) or not _is_candidate(child):
            continue
        if id(child) not in verdicts:  # one layer may stand in several places
            verdicts[id(child)] = _replacement(child)
        verdict = verdicts[id(child)]
        if isinstance(verdict, str):
            left.append(Left(path, type(child).__name__, verdict))
            continue
        setattr(parent, name, verdict)
        swapped.append(Swap(path, type(child).__name__, _title(verdict)))
    report = PatchReport(tuple(swapped), tuple(left))
    _log.info("patched %d layers and left %d of %s", len(swapped), len(left), type(model).__name__)
    return report


def _title(module: nn.Module) -> str:
    inner = getattr(module, "gated", getattr(module, "act", None))
    return f"{type(module).__name__} with {inner}" if inner is not None else str(module)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not _children(module)


def _is_candidate(module: nn.Module) -> bool:
    names = _children(module)
    return _is_norm(module) or "down_proj" in names or {"c_fc", "c_proj"} <= names


def _replacement(module: nn.Module) -> nn.Module | str:
    """A layer that computes what `module` does, or why there is none."""
    parameters = list(module.parameters())
    if not parameters:
        return "which has no parameters to tell its size"
    if any(each.device.type != "cpu" or each.dtype not in FLOATS for each in parameters):
        where = sorted({f"{each.dtype} on {each.device}" for each in parameters})
        return f"whose parameters are {', '.join(where)}; compiled layers serve fp32, bf16 and fp16 on the CPU"
    if any(_has_hooks(each) for each in module.modules()):
        return "which has hooks that a swap would lose"
    proposals = list(_norms(module) if _is_norm(module) else _mlps(module))
    hidden = _hidden(module) if proposals else None
    if hidden is None:
        return "whose parts are none of the known"
    apart = []
    for proposal in proposals:
        proposal.train(module.training)
        try:
            distance = _distance(module, proposal, hidden)
        except REFUSALS as error:
            return f"which cannot be tried on [2, 3, {hidden}]: {error}"
        if distance <= TOLERANCE[parameters[0].dtype]:
            return proposal
        apart.append(f"{_title(proposal)} by {distance:.1g}")
    return f"which computes something else: it differs from {'; from '.join(apart)} of its largest value"


def _has_hooks(module: nn.Module) -> bool:
    return any(
        getattr(module, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or len(list(module.parameters())) > 2:
        return
    hidden = weight.numel()
    proposals: list[RMSNorm | LayerNorm] = []
    if bias is None and (eps is None or isinstance(eps, float)):
        proposals = [RMSNorm(hidden, eps=eps, offset=each, elementwise_affine=False) for each in (0.0, 1.0)]
    if isinstance(eps, float):
        proposals.append(LayerNorm(hidden, eps=eps, elementwise_affine=False))
    for proposal in proposals:
        proposal.weight = weight
        if bias is not None:
            proposal.bias = bias
        yield proposal


def _mlps(module: nn.Module) -> Iterator[nn.Module]:
    names = _children(module)
    activation = next(
        (getattr(module, each) for each in ("act_fn", "activation_fn", "act") if hasattr(module, each)), None
    )
    kind = _activation(activation)
    if kind is None:
        return
    gated = SwiGLU() if kind == "silu" else GeGLU(kind)
    if {"gate_proj", "up_proj", "down_proj"} <= names:
        yield GatedMLP(module, gated)
    elif {"gate_up_proj", "down_proj"} <= names:
        yield FusedGatedMLP(module, gated)
    elif {"c_fc", "c_proj", "dropout"} <= names and kind != "silu":
        yield GPT2MLP(module, BiasGELU(kind))


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


def _hidden(module: nn.Module) -> int | None:
    """How long the rows are that `module` takes."""
    for name in ("weight", "gate_proj.weight", "gate_up_proj.weight"):
        parameter = dict(module.named_parameters()).get(name)
        if parameter is not None:
            return parameter.shape[-1]
    first = dict(module.named_parameters()).get("c_fc.weight")
    return None if first is None else first.shape[0]


def _distance(original: nn.Module, proposal: nn.Module, hidden: int) -> float:
    """By how much outputs and gradients differ at most, over the largest of each.

    The norm's parameters, which are often ones or zeros at first, are replaced by random ones for the trial.
    """
    generator = torch.Generator().manual_seed(hidden)
    dtype = next(original.parameters()).dtype
    x = torch.randn(2, 3, hidden, generator=generator).to(dtype)
    dy = torch.randn(2, 3, hidden, generator=generator).to(dtype)
    values = {
        name: torch.randn(each.shape, generator=generator).to(each.dtype) if each.ndim == 1 else each.detach()
        for name, each in original.named_parameters()
    }
    found = [_try(each, values, x, dy) for each in (original, proposal)]
    largest = 0.0
    for one, two in zip(*found, strict=True):
        if one.dtype != two.dtype or one.shape != two.shape:
            return float("inf")
        scale = max(one.abs().max().item(), torch.finfo(dtype).tiny)
        largest = max(largest, (one.float() - two.float()).abs().max().item() / scale)
    return largest


def _try(module: nn.Module, values: dict[str, Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output for `x` and the gradients of it and of `values`, by name, without dropout."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    given = {name: value.clone().requires_grad_() for name, value in sorted(values.items())}
    x = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            y: Tensor = torch.func.functional_call(module, given, (x,))
            return [y.detach(), *torch.autograd.grad(y, [x, *given.values()], dy.to(y.dtype))]
    finally:
        for each, mode in modes.items():
            each.training = mode
