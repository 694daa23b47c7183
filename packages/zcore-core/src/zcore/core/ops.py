"""The op registry: a name stands for one computation, served by whichever implementation suits device and dtype.

Every op has a plain torch reference, beside its user; faster implementations come from modules that wheels name in the
entry point group `zcore.ops` and register when imported, which is at the first look-up. The highest priority among
those that serve the device and dtype and are available here wins; the reference has 0.

    ZCORE_OPS=reference torchrun train.py     everything from the references, to find out whether a fast op is wrong
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch

from zcore.core.errors import NotInstalledError, nearest
from zcore.core.extensions import offered

__all__ = [
    "Implementation",
    "choose",
    "force",
    "forced",
    "get",
    "implementation",
    "implementations",
    "reference",
    "registered",
]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Implementation:
    """One function that serves an op; empty `devices` or `dtypes` mean every one."""

    op: str
    source: str  # "reference", or what made it: "cpp", "cuda", "triton"
    function: Callable[..., Any] = field(repr=False)
    devices: frozenset[str] = frozenset()  # device types
    dtypes: frozenset[torch.dtype] = frozenset()
    priority: int = 0
    why_unavailable: Callable[[], str | None] = field(default=lambda: None, repr=False)

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this cannot serve tensors of `dtype` on a `device` type here, or None if it can."""
        if self.devices and device not in self.devices:
            return f"serves {_listed(self.devices)} only"
        if self.dtypes and dtype not in self.dtypes:
            return f"serves {_listed(str(served) for served in self.dtypes)} only"
        return self.why_unavailable()


_registry: dict[str, dict[str, Implementation]] = {}  # op -> source -> implementation
_forced: str | None = None  # of the process, not of a thread: backward passes run on torch's own threads


def reference(op: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the torch reference of `op`; the function itself stays as it is.

    >>> @reference("double")
    ... def double(x: torch.Tensor) -> torch.Tensor:
    ...     return x * 2
    >>> get("double", device=torch.device("cpu"), dtype=torch.float32)(torch.ones(2))
    tensor([2., 2.])
    """
    return implementation(op, source="reference", priority=0)


def implementation(
    op: str,
    *,
    source: str,
    priority: int,
    devices: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype, ...] = (),
    why_unavailable: Callable[[], str | None] = lambda: None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as one that serves `op`; one per `op` and `source`, a later one replaces.

    `why_unavailable` is asked once for each device and dtype in use: None means it runs here, a string says why not.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        _registry.setdefault(op, {})[source] = Implementation(
            op, source, function, frozenset(devices), frozenset(dtypes), priority, why_unavailable
        )
        _choose.cache_clear()
        return function

    return register


def get(op: str, *, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that serves `op` for tensors of `dtype` on `device`; after the first time, one dictionary look-up.

    Raises NotInstalledError saying what exists and why each cannot serve; BrokenExtensionError if a wheel's fails.
    """
    return _choose(op, device.type, dtype, _forced or os.environ.get("ZCORE_OPS")).function


def choose(op: str, *, device: torch.device, dtype: torch.dtype) -> Implementation:
    """What `get` takes the function of, to be told or looked at. Raises what `get` does."""
    return _choose(op, device.type, dtype, forced())


def forced() -> str | None:
    """The source that `force` or ZCORE_OPS asks for; None where the best implementation is taken."""
    return _forced or os.environ.get("ZCORE_OPS")


@contextmanager
def force(source: str) -> Iterator[None]:
    """Inside, every `get` of the process takes this source or raises; ZCORE_OPS does not count."""
    global _forced  # noqa: PLW0603 - see `_forced`
    before, _forced = _forced, source
    try:
        yield
    finally:
        _forced = before


def registered() -> dict[str, tuple[Implementation, ...]]:
    """Everything that installed wheels register, and what the program has registered so far; as `implementations`."""
    _load_wheels()
    return implementations()


def implementations() -> dict[str, tuple[Implementation, ...]]:
    """Everything registered so far, by op, highest priority first."""
    return {
        op: tuple(sorted(by_source.values(), key=lambda item: -item.priority))
        for op, by_source in sorted(_registry.items())
    }


@cache
def _load_wheels() -> None:
    for offer in offered("zcore.ops"):
        offer.load()


@cache
def _choose(op: str, device: str, dtype: torch.dtype, forced: str | None) -> Implementation:
    _load_wheels()
    registered = implementations()
    if op not in registered:
        near = nearest(op, registered)
        advice = f"did you mean `{near}`?" if near else f"there is {_listed(registered) or 'none'}."
        raise NotInstalledError(
            f"No op is called `{op}`; {advice} An op exists once the module of its reference is imported."
        )
    refusals = []
    for item in registered[op]:
        refusal = (
            f"`{forced}` is asked for, by ZCORE_OPS or force()"
            if forced not in (None, item.source)
            else item.refusal(device, dtype)
        )
        if refusal is None:
            return item
        refusals.append(f"{item.source} ({refusal})")
    raise NotInstalledError(f"Nothing serves the op `{op}` for {dtype} on {device}. There is: {'; '.join(refusals)}.")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
