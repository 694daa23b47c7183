"""How wheels find each other: entry points looked up when used, and the table of which wheel serves which contract.

    [project.entry-points."zcore.collectives"]     in a wheel's pyproject.toml: the group is the contract,
    comm = "zcore.comm.choice:offer"               the name is what users write, the value is loaded on first use

A wheel that is installed but fails to load is an error that names it, never a silent fall back to something slower.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

from zcore.core.errors import NotInstalledError, ZcoreError

__all__ = ["CONTRACTS", "WHEELS", "BrokenExtensionError", "Contract", "Offer", "Wheel", "installed", "load", "offered"]


class BrokenExtensionError(ZcoreError, ImportError):
    """A wheel is installed, and what it offers fails to load; the message names the wheel and the cause."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One of the seven distributions; `holds_work` is false while only its name and place exist."""

    name: str
    gives: str
    holds_work: bool


@dataclass(frozen=True, slots=True)
class Contract:
    """A group of entry points: what it is for, what the core serves by itself, whose wheel it is to serve more."""

    group: str
    purpose: str
    default: str
    wheel: str | None = None


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel("zcore-core", "contracts and plumbing every wheel stands on", holds_work=True),
        Wheel("zcore-zero", "ZeRO 0-3 training: states sharded over ranks", holds_work=True),
        Wheel("zcore-comm", "faster collectives on CPU ranks, their diagnosis and recording", holds_work=True),
        Wheel("zcore-pipe", "pipeline parallelism", holds_work=False),
        Wheel("zcore-offload", "CPU and NVMe tiers", holds_work=False),
        Wheel("zcore-infer", "inference engine and server", holds_work=False),
        Wheel("zcore-kernels", "fast ops in C++, CUDA and Triton; optimizers, layers, file I/O", holds_work=True),
    )
}

CONTRACTS = {
    contract.group: contract
    for contract in (
        Contract("zcore.collectives", "moves flat tensors between ranks", "torch.distributed", "zcore-comm"),
        Contract("zcore.recorders", "tells what collectives took", "counts and bytes", "zcore-comm"),
        Contract("zcore.stores", "where a shard rests", "the device it is on", "zcore-offload"),
        Contract("zcore.ops", "numeric ops by device and dtype", "torch references", "zcore-kernels"),
        Contract("zcore.optimizers", "steps of flat parameters", "torch.optim", "zcore-kernels"),
        Contract("zcore.sinks", "where metrics go", "log, jsonl, memory"),
        Contract("zcore.commands", "commands of `zcore`", "doctor"),
        Contract("zcore.findings", "tells what would serve on this machine", "devices and wheels"),
    )
}


@dataclass(frozen=True, slots=True)
class Offer:
    """Something an installed wheel offers under a name; nothing of it is imported before `load`."""

    group: str
    name: str
    wheel: str
    version: str
    entry_point: EntryPoint = field(repr=False)

    def load(self) -> object:
        """The object the entry point names. Raises BrokenExtensionError if importing it fails, for whatever reason."""
        try:
            return self.entry_point.load()
        except Exception as error:  # a foreign import may raise anything; it is named and passed on
            raise BrokenExtensionError(
                f"{self.wheel} {self.version} offers `{self.name}` in {self.group}, but {self.entry_point.value} "
                f"fails to load: {type(error).__name__}: {error}. "
                f"Reinstall it (pip install --force-reinstall {self.wheel}) or remove it (pip uninstall {self.wheel})."
            ) from error


@cache
def offered(group: str) -> tuple[Offer, ...]:
    """What the installed wheels offer in `group`, by name. Cached: metadata is read once for each process."""
    entries = [(entry, entry.dist) for entry in entry_points(group=group)]
    offers = [Offer(group, entry.name, dist.name, dist.version, entry) for entry, dist in entries if dist]
    return tuple(sorted(offers, key=lambda offer: (offer.name, offer.wheel)))


@cache
def load(group: str, name: str) -> object:
    """What is offered as `name` in `group`, imported on first use.

    Raises NotInstalledError, with the pip command where one would help; BrokenExtensionError as `Offer.load` does, or
    if two wheels offer the same name.
    """
    found = [offer for offer in offered(group) if offer.name == name]
    if len(found) > 1:
        wheels = " and ".join(offer.wheel for offer in found)
        raise BrokenExtensionError(f"`{name}` in {group} is offered by both {wheels}; uninstall one of them.")
    if found:
        return found[0].load()
    there = ", ".join(offer.name for offer in offered(group)) or "nothing beyond the core's default"
    raise NotInstalledError(
        f"No installed wheel offers `{name}` in {group}; there is {there}. {_advice(group)}".rstrip()
    )


def installed(wheel: str) -> str | None:
    """The version of a distribution in this environment, or None.

    >>> installed("zcore-nonesuch") is None
    True
    """
    try:
        return version(wheel)
    except PackageNotFoundError:
        return None


def _advice(group: str) -> str:
    """The pip command, but only for a wheel that exists to be installed and holds something."""
    wheel = WHEELS.get(CONTRACTS[group].wheel or "") if group in CONTRACTS else None
    if wheel is None or (installed(wheel.name) and wheel.holds_work):
        return ""
    if not wheel.holds_work:
        return f"{wheel.name} ({wheel.gives}) is the wheel for it, and holds nothing yet."
    return f"{wheel.name} brings {wheel.gives}: pip install {wheel.name}"
