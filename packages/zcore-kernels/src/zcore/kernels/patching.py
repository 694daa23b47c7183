"""Swap layers of a model in place for compiled ones that compute the same, sharing their parameters.

A layer is recognised by what it computes: its class and parts propose replacements (recognising.py), and one is taken
only if on random inputs it has the original's outputs and gradients (trials.py). So Gemma's norm, which multiplies by
weight + 1, is served as such, and what only looks alike stays. Layers that are alike are tried once.

What is left is listed with the reason: a line for each layer that looked as if it could be swapped, and one for each
kind that never is (unserved.py). Keys of the state dict stay as they are, and attributes that others may read.
"""

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from zcore.kernels.recognising import (
    OURS,
    REFUSALS,
    TORCHS_OWN,
    Build,
    is_candidate,
    proposals,
    why_left,
)
from zcore.kernels.trials import TOLERANCE, distance, sameness, small_copy
from zcore.kernels.unserved import loss_of, why_never

__all__ = ["Left", "PatchReport", "Swap", "patch"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Swap:
    """One layer that was swapped."""

    name: str
    original: str  # its class
    replacement: str


@dataclass(frozen=True, slots=True)
class Left:
    """One layer that looked as if it could be swapped and was not, or the first of a kind that never is."""

    name: str
    original: str
    why: str
    count: int = 1  # how many there are of that kind

    def __str__(self) -> str:
        others = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.name}{others}: {self.original}, {self.why}"


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What `patch` did; its text has a line for each layer, and for each kind that is never swapped."""

    swapped: tuple[Swap, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        done = [f"swapped  {each.name}: {each.original} -> {each.replacement}" for each in self.swapped]
        return "\n".join([*done, *(f"left     {each}" for each in self.left)])


def patch(model: nn.Module) -> PatchReport:
    """Swap what can be served on the CPU in fp32, bf16 or fp16; `model` computes as before, within rounding.

    Patch before torch.compile, FSDP or hooks are put on: a layer with hooks is left.
    """
    replacements: dict[int, nn.Module | str] = {}
    verdicts: dict[Hashable, Build | str] = {}
    swapped: list[Swap] = []
    left: list[Left] = []
    kinds: dict[tuple[str, str], list[str]] = {}
    places = [
        (f"{path}.{name}" if path else name, parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
    ]
    if is_candidate(model):
        left.append(Left("(the model itself)", type(model).__name__, "which has no owner to swap it in"))
    for path, parent, name, child in places:
        if isinstance(child, OURS):
            continue
        if not is_candidate(child):
            why = why_never(name, child)
            if why is not None:
                kinds.setdefault((type(child).__name__, why), []).append(path)
            continue
        if id(child) not in replacements:  # one layer may stand in several places
            replacements[id(child)] = _replacement(child, verdicts)
        replacement = replacements[id(child)]
        if isinstance(replacement, str):
            left.append(Left(path, type(child).__name__, replacement))
            continue
        setattr(parent, name, replacement)
        swapped.append(Swap(path, type(child).__name__, _title(replacement)))
    left += [Left(paths[0], title, why, len(paths)) for (title, why), paths in kinds.items()]
    loss = loss_of(model)
    if loss is not None:
        name, head, why = loss
        left.append(Left(name, type(head).__name__, why))
    report = PatchReport(tuple(swapped), tuple(left))
    _log.info("patched %d layers and left %d of %s", len(swapped), len(left), type(model).__name__)
    return report


def _title(module: nn.Module) -> str:
    inner = getattr(module, "gated", getattr(module, "bias_gelu", None))
    return f"{type(module).__name__} with {inner}" if inner is not None else str(module)


def _replacement(module: nn.Module, verdicts: dict[Hashable, Build | str]) -> nn.Module | str:
    """A layer that computes what `module` does, or why there is none; `verdicts` are those of layers before it."""
    why = why_left(module)
    if why is not None:
        return why
    key = sameness(module)
    if key not in verdicts:
        with _alone():
            verdicts[key] = _verdict(module)
    verdict = verdicts[key]
    if isinstance(verdict, str):
        return verdict
    replacement = verdict(module)
    for name, value in vars(module).items():  # other code of the model may read them
        if name not in TORCHS_OWN and not hasattr(replacement, name):
            setattr(replacement, name, value)
    for name, child in module.named_children():  # an activation, and dropout that drops nothing
        if not hasattr(replacement, name):
            replacement.add_module(name, child)
    return replacement.train(module.training)


@contextmanager
def _alone() -> Iterator[None]:
    """Trials inside depend on no mode of the caller's, and leave what a patched model draws as it was."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        yield


def _verdict(module: nn.Module) -> Build | str:
    """How the replacement is made that computes what `module` does, or why there is none."""
    builds = proposals(module)
    if not builds:
        return "whose parts are none of the known"
    tried, apart = small_copy(module), []
    dtype = next(tried.parameters()).dtype
    for build in builds:
        proposal = build(tried)
        for mode, is_training in (("eval", False), ("train", True)):
            try:
                found = distance(tried, proposal, is_training=is_training)
            except REFUSALS as error:
                return f"which cannot be tried in {mode} mode: {error}"
            if not found <= TOLERANCE[dtype]:
                apart.append(f"{_title(proposal)} by {found:.1g} in {mode} mode")
                break
        else:
            return build
    return f"which computes something else: it differs from {'; from '.join(apart)} of its largest value"
