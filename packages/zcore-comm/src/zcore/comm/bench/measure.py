"""`zcore comm bench` on one rank: every collective of every implementation, in turns, beside torch's own calls.

    python -m zcore.comm.bench.measure [PLAN [FILE]]   under `zcore run` or torchrun: PLAN as JSON, the report into FILE

Bandwidths are those of nccl-tests, see comm_report.py. The report, as JSON, with `_s` seconds and `_bytes` bytes:

    schema, command, started      1; how to measure it again; when
    machine, versions, load       see machine.py; load: before and after, the ranks' own work included
    backend, world_size, threads  threads: of each rank, for arithmetic
    plan                          what was asked for: ops, sizes_bytes, rounds, slice_s (timing.py)
    rows                          op, payload_bytes, implementation,
                                  time_s, bus_bytes_per_s: median, low, high (quartiles over rounds)
                                  speedup over torch's call, of_copy (share of a copy's speed): of each round, likewise

A wrong result ends the bench: what is fast and wrong has no time.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zcore.comm.bench.contenders import COPY, OPS, Contender, build_contenders, whole_numel
from zcore.comm.memory.pages import available_bytes
from zcore.comm.recording.comm_report import bus_factor
from zcore.core import compat
from zcore.core.device import backend_for, choose_device
from zcore.core.errors import CollectiveError, ConfigError, nearest
from zcore.core.events import progress
from zcore.core.machine import find_machine, find_versions, load
from zcore.core.quantities import shown_bytes
from zcore.core.timing import Spread, time_in_turns

__all__ = ["Plan", "Report", "Row", "leave_out_too_large", "main", "measure", "sizes_up_to", "with_tuples"]

logger = logging.getLogger(__name__)

SCHEMA = 1
BUFFERS = 6  # as large as a payload, on each rank


def sizes_up_to(max_bytes: int, *, min_bytes: int = 1024) -> tuple[int, ...]:
    """Payloads to measure, each four times the one before.

    >>> sizes_up_to(20_000)
    (1024, 4096, 16384)
    """
    sizes = [min_bytes]
    while sizes[-1] * 4 <= max_bytes:
        sizes.append(sizes[-1] * 4)
    return tuple(sizes)


def with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a plan as JSON has them, with its lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    ops: tuple[str, ...] = OPS
    sizes_bytes: tuple[int, ...] = sizes_up_to(1 << 30)
    rounds: int = 7
    slice_s: float = 0.02  # hundreds of the shortest calls; the meeting before them takes 0.1 ms

    def __post_init__(self) -> None:
        for op in self.ops:
            if op not in OPS:
                near = nearest(op, OPS)
                advice = f" Did you mean {near}?" if near else ""
                raise ConfigError(f"There is no collective {op!r} to measure; there are {', '.join(OPS)}.{advice}")
        if not self.sizes_bytes or min(self.sizes_bytes) < 1 or self.rounds < 1:
            raise ConfigError(f"{self} measures nothing; expected sizes and rounds of 1 or more.")

    @property
    def cases(self) -> list[tuple[str, int]]:
        """Every op with every payload; a barrier has none."""
        return [(op, num_bytes) for op in self.ops for num_bytes in ((0,) if op == "barrier" else self.sizes_bytes)]

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan of such a text; what it leaves out is as by default."""
        return cls(**with_tuples(json.loads(text)))


@dataclass(frozen=True, slots=True)
class Row:
    """One op of one implementation at one size. None where there is nothing to compare or to carry."""

    op: str
    payload_bytes: int
    implementation: str
    time_s: Spread
    bus_bytes_per_s: Spread | None
    speedup: Spread | None
    of_copy: Spread | None

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Row":
        """The row of JSON types."""
        told: dict[str, Any] = {
            name: Spread(**value) if isinstance(value, dict) else value for name, value in plain.items()
        }
        return cls(**told)


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and on what."""

    command: str
    started: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    load: tuple[float, float]
    backend: str
    world_size: int
    threads: int
    plan: Plan
    rows: tuple[Row, ...]

    @property
    def plain(self) -> str:
        """Whom the others are held against."""
        return f"torch {self.backend}"

    @property
    def implementations(self) -> list[str]:
        """All that have a row, in the order of measuring."""
        return list(dict.fromkeys(row.implementation for row in self.rows))

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report of such a text. Raises ConfigError for one of another schema."""
        told = json.loads(text)
        if told.pop("schema", None) != SCHEMA:
            raise ConfigError(f"This is no report of `zcore comm bench` of schema {SCHEMA}. Measure one anew.")
        told["rows"] = tuple(Row.from_plain(row) for row in told["rows"])
        told["plan"] = Plan.from_json(json.dumps(told["plan"]))
        return cls(**{**told, "load": tuple(told["load"])})


def measure(
    group: dist.ProcessGroup,
    plan: Plan,
    *,
    device: torch.device,
    command: str,
    contenders: Sequence[Contender] | None = None,
) -> Report:
    """Measure what `plan` says on the ranks of `group`, all of which call this and get the same rows.

    contenders: by default all; the first is what the others are held against.

    Raises CollectiveError for an implementation with a wrong result.
    """
    began_load, started = load(), datetime.now(UTC).isoformat(timespec="seconds")
    contenders = contenders or build_contenders(group, device)
    cases, size = plan.cases, dist.get_world_size(group)
    rows: list[Row] = []
    with progress("bench", total=len(cases), rank=dist.get_rank()) as bar:
        for op, num_bytes in cases:
            times_s = _time(contenders, op, num_bytes, group=group, plan=plan, device=device)
            payload_bytes = whole_numel(num_bytes, size) * torch.float32.itemsize if op != "barrier" else 0
            rows += rows_of(op, payload_bytes, size, times_s, plain=contenders[0].name)
            bar.update(op=op, bytes=num_bytes)
    return Report(
        command=command,
        started=started,
        machine=find_machine(device),
        versions=find_versions(),
        load=(began_load, load()),
        backend=compat.backend_name(group),
        world_size=size,
        threads=torch.get_num_threads(),
        plan=plan,
        rows=tuple(rows),
    )


def leave_out_too_large(plan: Plan, device: torch.device) -> Plan:
    """`plan` without payloads for which a rank has no memory; every rank calls this and gets the same.

    Raises ConfigError where nothing is left.
    """
    if device.type == "cpu":
        free_bytes = available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        free_bytes = torch.cuda.mem_get_info(device)[0]
    least = torch.tensor([free_bytes], device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    sizes_bytes = tuple(each for each in plan.sizes_bytes if each * BUFFERS <= least.item())
    if sizes_bytes == plan.sizes_bytes:
        return plan
    told = f"a rank needs memory for {BUFFERS} payloads, and one of them has {shown_bytes(least.item())}"
    if not sizes_bytes:
        raise ConfigError(f"Every payload is too large: {told}. Ask for smaller ones.")
    if dist.get_rank() == 0:
        logger.warning("Payloads above %s are left out: %s.", shown_bytes(sizes_bytes[-1]), told)
    return replace(plan, sizes_bytes=sizes_bytes)


def _time(
    contenders: Sequence[Contender],
    op: str,
    num_bytes: int,
    *,
    group: dist.ProcessGroup,
    plan: Plan,
    device: torch.device,
) -> dict[str, list[float]]:
    runs = {}
    for contender in contenders:
        case = contender.prepare(op, num_bytes)
        if case is not None:
            _check(case.is_right(), f"{op} of {num_bytes} bytes by {contender.name}", group, device)
            runs[contender.name] = case.run
    return time_in_turns(runs, group=group, device=device, rounds=plan.rounds, slice_s=plan.slice_s)


def _check(is_right: bool, what: str, group: dist.ProcessGroup, device: torch.device) -> None:
    wrong = torch.tensor([0 if is_right else 1], device=device)
    dist.all_reduce(wrong, group=group)
    if wrong.item():
        raise CollectiveError(
            f"{what} gave a wrong result on {int(wrong.item())} ranks. Report this with the output of `zcore doctor`."
        )


def rows_of(op: str, payload_bytes: int, size: int, times_s: Mapping[str, Sequence[float]], *, plain: str) -> list[Row]:
    """What the times of one op at one size say. Pure."""
    bus_bytes = bus_factor(op, size) * payload_bytes

    def against(name: str, other: str) -> Spread | None:
        if other not in times_s:
            return None
        return Spread.of([theirs / own for own, theirs in zip(times_s[name], times_s[other], strict=True)])

    return [
        Row(
            op=op,
            payload_bytes=payload_bytes,
            implementation=name,
            time_s=Spread.of(own_s),
            bus_bytes_per_s=Spread.of([bus_bytes / each for each in own_s]) if bus_bytes else None,
            speedup=against(name, plain),
            of_copy=against(name, COPY),
        )
        for name, own_s in times_s.items()
    ]


def main(argv: Sequence[str]) -> None:
    """Be one rank of a bench. Rank 0 writes the report into the file, or to stdout."""
    plan = Plan.from_json(argv[0]) if argv else Plan()
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend_for(device))
    try:
        assert dist.group.WORLD is not None
        command = f"zcore run -n {dist.get_world_size()} -m zcore.comm.bench.measure {shlex.quote(plan.to_json())}"
        report = measure(dist.group.WORLD, leave_out_too_large(plan, device), device=device, command=command)
        if dist.get_rank() == 0:
            if len(argv) > 1:
                Path(argv[1]).write_text(report.to_json(), encoding="utf-8")
            else:
                sys.stdout.write(report.to_json())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
