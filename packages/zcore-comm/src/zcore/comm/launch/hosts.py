"""Which hosts take part, and with how many ranks: a hostfile, --include and --exclude, a node list of SLURM. Pure.

worker-1 slots=4      # as DeepSpeed and Open MPI write it; max_slots=8 may follow
me@10.0.0.7:2         # as MPICH writes it
worker-3              # no number: one rank for each accelerator it has, else one
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from zcore.core.errors import ConfigError, nearest

__all__ = ["Host", "expand_nodelist", "parse_hostfile", "select_hosts"]

# max_slots, Open MPI's, is read over: it limits what is started beyond the slots, which nothing is here.
_LINE = re.compile(
    r"(?P<name>[^\s:,]+)(?::(?P<colon>\d+)|\s+slots\s*=\s*(?P<slots>\d+))?(?:\s+max[_-]slots\s*=\s*\d+)?"
)
# A part of a node list: text, and ranges in brackets. gpu-a[1-2]b, rack[0-1]n[01-16]
_NODES = r"(?:[^\s,\[\]]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"


@dataclass(frozen=True, slots=True)
class Host:
    """One host of a run."""

    name: str  # as ssh takes it: worker-1, me@10.0.0.7
    slots: int | None = None  # ranks it can hold; None: not said
    devices: tuple[int, ...] | None = None  # the slots that were picked; None: all

    @property
    def address(self) -> str:
        """Where other hosts reach it."""
        return self.name.rpartition("@")[2]


def parse_hostfile(text: str, *, path: str) -> tuple[Host, ...]:
    """Read a hostfile; its order is the order of ranks. Raises ConfigError with `path` and line.

    >>> parse_hostfile("a slots=4  # the big one", path="hosts")
    (Host(name='a', slots=4, devices=None),)
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        said = line.partition("#")[0].strip()
        if not said:
            continue
        found = _LINE.fullmatch(said)
        if not found:
            advice = " Give each host a line of its own." if "," in said else ""
            raise ConfigError(f"{path}:{number}: `{said}` is no host; expected `NAME` or `NAME slots=NUMBER`.{advice}")
        slots = found["slots"] or found["colon"]
        host = Host(found["name"], None if slots is None else int(slots))
        if host.slots == 0:
            raise ConfigError(f"{path}:{number}: {host.name} has no slot; expected 1 or more. Leave its line out.")
        if host.address in hosts:
            raise ConfigError(f"{path}:{number}: {host.address} is named twice; give all its slots on one line.")
        hosts[host.address] = host
    if not hosts:
        raise ConfigError(f"{path} names no host; expected lines such as `worker-1 slots=4`.")
    return tuple(hosts.values())


def select_hosts(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """The hosts, and the slots of each, that DeepSpeed's syntax `HOST@HOST:SLOT,SLOT` picks or leaves out.

    >>> select_hosts([Host("a", 4), Host("b", 4), Host("c", 4)], exclude="a@b:0,2")
    (Host(name='b', slots=4, devices=(1, 3)), Host(name='c', slots=4, devices=None))
    """
    if include and exclude:
        raise ConfigError("--include and --exclude are both given; expected one of them.")
    if not include and not exclude:
        return tuple(hosts)
    named = _parse_selection(include or exclude, {host.address: host for host in hosts})
    selected: list[Host] = []
    for host in hosts:
        slots = named.get(host.address, ())
        if include and slots is None:
            selected.append(host)
        elif include and slots:
            selected.append(replace(host, devices=slots))
        elif exclude and slots == ():
            selected.append(host)
        elif exclude and slots:
            if host.slots is None:
                raise ConfigError(f"--exclude names slots of {host.address}; say `slots=` in its line of the hostfile.")
            rest = tuple(slot for slot in range(host.slots) if slot not in slots)
            selected += [replace(host, devices=rest)] if rest else []
    if not selected:
        raise ConfigError(f"--exclude {exclude} leaves no host; leave one in.")
    return tuple(selected)


def _parse_selection(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...] | None]:
    """Slots by host; None for a host named without slots."""
    named: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        address, colon, slots = part.partition(":")
        if address not in hosts:
            near = nearest(address, hosts)
            advice = f"did you mean {near}?" if near else f"it has {', '.join(hosts)}."
            where = f"`{address}`" if address == text else f"`{address}` of `{text}`"
            raise ConfigError(f"{where} is not in the hostfile; {advice}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise ConfigError(
                f"`{part}` does not say slots; expected `HOST` or `HOST:SLOT,SLOT`, such as {address}:0,2."
            )
        picked = tuple(sorted({int(slot) for slot in slots.split(",")})) if colon else None
        limit = hosts[address].slots
        if picked and limit is not None and picked[-1] >= limit:
            raise ConfigError(f"`{part}` names slot {picked[-1]}; {address} has slots 0 to {limit - 1}.")
        named[address] = picked
    return named


def expand_nodelist(text: str) -> tuple[str, ...]:
    """The names behind SLURM's short form, in its order.

    >>> expand_nodelist("node[08-10,7],gpu-a[1-2]b")
    ('node08', 'node09', 'node10', 'node7', 'gpu-a1b', 'gpu-a2b')
    """
    if not re.fullmatch(f"{_NODES}(,{_NODES})*", text):
        raise ConfigError(f"`{text}` is no node list of SLURM; expected one such as node[01-03,7],login1.")
    names: list[str] = []
    for part in re.findall(_NODES, text):
        # Split at brackets: text and ranges take turns.
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [_expand_ranges(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
        names += ["".join(chosen) for chosen in product(*choices)]
    return tuple(names)


def _expand_ranges(text: str) -> list[str]:
    """The numbers of `08-10,7`; a range keeps the width of its first number."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers
