"""What is installed, who serves which contract, what one would gain by installing what; as data, and drawn.

`examine` only looks: it imports what wheels offer, to find out whether it loads, and starts nothing. A wheel that holds
nothing yet is said to, and never advised.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from zcore.core import ops
from zcore.core.extensions import CONTRACTS, WHEELS, BrokenExtensionError, installed, offered

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Finding", "Report", "draw", "examine", "plan_gains"]

EXTRAS = (  # that one may do without; what each needs, and gives. Without [cli] there is no doctor
    ("zcore-core[yaml]", "pyyaml", "reads configurations in YAML"),
    ("zcore-comm[bench]", "matplotlib", "plots of `zcore comm bench`"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a wheel says of this machine: it offers `() -> Sequence[Finding]` as `zcore.findings`."""

    case: str  # what is to be served, in a word or two: it is never broken
    served_by: str
    otherwise: str  # what others would give there, or what keeps a better one from serving


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `zcore doctor` says."""

    python: str
    torch: str
    devices: tuple[str, ...]
    backends: dict[str, bool]  # of torch.distributed: built in or not
    wheels: dict[str, str | None]  # version, None where not installed
    contracts: dict[str, tuple[str, ...]]  # who serves each, the core's default first
    ops: dict[str, dict[str, str]]  # op -> device type -> the source that serves fp32 there, or others: "cpp (int8)"
    findings: dict[str, tuple[Finding, ...]]  # by whoever offers them
    gains: dict[str, str]  # pip command -> what it brings
    problems: tuple[str, ...]  # what is installed and does not load


def examine() -> Report:
    """Look at this environment."""
    device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    wheels = {name: installed(name) for name in WHEELS}
    contracts: dict[str, tuple[str, ...]] = {}
    findings: dict[str, tuple[Finding, ...]] = {}
    problems: list[str] = []
    for contract in CONTRACTS.values():
        served_by = [contract.default]
        for offer in offered(contract.group):
            try:
                loaded = offer.load()
            except BrokenExtensionError as error:
                problems.append(str(error))
            else:
                served_by.append(f"{offer.name} ({offer.wheel})")
                if contract.group == "zcore.findings":
                    find = cast("Callable[[], Sequence[Finding]]", loaded)
                    try:
                        findings[offer.wheel] = tuple(find())
                    except Exception as error:  # noqa: BLE001 - told; the rest of the report is wanted most of all now
                        problems.append(f"{offer.wheel} finds out nothing: {type(error).__name__}: {error}")
        contracts[contract.group] = tuple(served_by)
    return Report(
        python=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        torch=str(torch.__version__),
        devices=tuple(_devices()),
        backends={
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": dist.is_available() and dist.is_nccl_available(),
        },
        wheels=wheels,
        contracts=contracts,
        ops={
            op: {device: _source(served, device) for device in device_types}
            for op, served in ops.implementations().items()
        },
        findings=findings,
        gains=plan_gains(lambda name: installed(name) is not None),
        problems=tuple(problems),
    )


def plan_gains(has: Callable[[str], bool]) -> dict[str, str]:
    """What to install where `has` tells which distributions are there. An extra is advised where its wheel is."""
    gains = {
        f"pip install {each.name}": each.gives for each in WHEELS.values() if each.holds_work and not has(each.name)
    }
    for extra, needs, gives in EXTRAS:
        if has(extra.partition("[")[0]) and not has(needs):
            gains[f"pip install '{extra}'"] = gives
    return gains


def _devices() -> list[str]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerators = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"cpu: {os.cpu_count()} cores, {memory_bytes / 2**30:.1f} GiB",
        *(f"cuda:{index}: {it.name}, {it.total_memory / 2**30:.1f} GiB" for index, it in enumerate(accelerators)),
    ]


def _source(served: tuple[ops.Implementation, ...], device: str) -> str:
    of_fp32 = next((item.source for item in served if item.refusal(device, torch.float32) is None), "nothing")
    if of_fp32 not in {"reference", "nothing"}:
        return of_fp32
    for item in served:  # codes are of other dtypes
        dtypes = [str(each) for each in item.dtypes if item.refusal(device, each) is None]
        if dtypes:
            return f"{item.source} ({', '.join(sorted(dtypes)).replace('torch.', '')})"
    return of_fp32


def _told(report: Report, group: str) -> str:
    """Who serves `group`; ops are too many to name, and stand in a table of their own."""
    if group != "zcore.ops" or not report.ops:
        return ", ".join(report.contracts[group])
    counts = Counter(source.partition(" ")[0] for sources in report.ops.values() for source in sources.values())
    return ", ".join(f"{source} ({count})" for source, count in counts.most_common()) + ": see below"


def draw(report: Report) -> "RenderableType":
    """The report for people; it reads well from 60 columns on."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, *columns: str) -> Table:
        made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        made.add_column(columns[0], no_wrap=True)
        for column in columns[1:]:
            made.add_column(column)
        parts.extend([Text(f"\n{title}", style="bold"), made])
        return made

    parts: list[RenderableType] = []
    facts = Table.grid(padding=(0, 2))
    facts.add_row("python", report.python)
    facts.add_row("torch", report.torch)
    facts.add_row(
        "backends", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in report.backends.items())
    )
    facts.add_row("devices", "\n".join(report.devices))
    parts.append(facts)

    wheels = table("Wheels", "name", "version", "gives")
    for name, version in report.wheels.items():
        gives, holds_work = WHEELS[name].gives, WHEELS[name].holds_work
        style = "" if version and holds_work else "dim"
        wheels.add_row(name, version or "-", gives if holds_work else f"nothing yet; to be: {gives}", style=style)

    contracts = table("Contracts", "name", "purpose", "served by")
    for group in report.contracts:
        contracts.add_row(group, CONTRACTS[group].purpose, _told(report, group))

    for wheel, findings in report.findings.items():
        found = table(f"{wheel} on this machine", "case", "served by", "otherwise")
        for finding in findings:
            found.add_row(finding.case, finding.served_by, finding.otherwise)

    if report.ops:
        served = table("Ops in fp32, or as said", "name", *next(iter(report.ops.values())))
        for op, sources in report.ops.items():
            served.add_row(op, *sources.values())

    gains = table("To gain", "by", "you get")
    for command, gives in report.gains.items():
        gains.add_row(Text(command, style="cyan"), gives)
    if not report.gains:
        gains.add_row("nothing", "every wheel that holds something is here")

    problems = [f"\nProblem: {problem}" for problem in report.problems]
    return Group(*parts, *(Text(problem, style="red") for problem in problems))
