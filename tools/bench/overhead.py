"""Measures what hooks and scheduling cost a step, against the number of modules and of buckets.

    python tools/bench/overhead.py [--quick] [--stages 0,1,2,3] [--sizes 100,1000,10000] [--rounds 9] [--out FILE]
    python tools/bench/overhead.py --profile modules --stages 3 --sizes 10000      where it goes; writes no file

Each module multiplies 8 numbers by a parameter, so that a step computes next to nothing, and the process is rank 0 of 8
whose collectives copy locally and send nothing. What a step of zcore takes longer than one of plain torch is what its
hooks, its scheduling and the start of its collectives cost. Both have a model of their own and take turns.

    modules    as many modules as --sizes says, in 10 blocks: the number of buckets stays
    layers     the same with layers of torch's own, nn.Linear of 8 by 8, of which more is known
    buckets    as many blocks of 2 modules: each is a bucket

Writes docs/benchmarks/step-overhead.json: schema, is_benchmark, command, started, machine, versions, load [before,
after], simulated_ranks, rounds, rows, left_out (rows whose step is expected to take that many seconds, which is too
long), targets (name, unit, wanted, is_limit, found, low, high, is_met). Each row:

    sweep (modules, layers or buckets), size, stage, modules, buckets, torch_s and zcore_s of a step
    overhead_s     zcore_s - torch_s of the same round
    phases_s       the part of the overhead in forward, backward and step (clipping and optimizer); a part is below 0
                   where a sharded optimizer has fewer parameters to step
    per_module_s, per_bucket_s
    growth         overhead a module (a bucket) over that of the row before: 1 where it is linear

All but `growth` and counts are medians and quartiles. A target that is not reached is written as such.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "docs" / "examples"), str(ROOT / "tools")]  # what gpu.worlds imports, and itself

from gpu.worlds import SIMULATED_RANKS  # noqa: E402
from head import head_of  # noqa: E402
from overheads.measure import SWEEPS, measure_row, profile_step  # noqa: E402
from target import Target  # noqa: E402

from zcore.core.machine import load  # noqa: E402
from zcore.core.testing import run_ranks  # noqa: E402

SIZES = (100, 1_000, 10_000)
LIMIT_S = 20.0  # of a step, of which a row takes some ten for each side
MOST_PER_MODULE_US, MOST_GROWTH = 20.0, 1.25
DEADLINE_S = 3000.0

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, judge, write; or show where the time of one step goes."""
    options = _read(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.profile:
        for stage in options.stages:
            for size in options.sizes:
                print(f"a step of zcore {stage} with {size} {options.profile}:")
                print(_in_a_rank(profile_step, options.profile, size, stage))
        return
    began_load = load()
    head = head_of("tools/bench/overhead.py", arguments, is_benchmark=not options.quick, schema=2)
    rows: list[Row] = []
    left_out: dict[str, float] = {}
    for sweep in SWEEPS:
        for stage in options.stages:
            before: Row | None = None
            for size in options.sizes:
                name = f"zcore {stage}, {size} {sweep}"
                if before is not None and (expected_s := _expected_s(before, size)) > LIMIT_S:
                    print(f"{name}: left out, as a step is expected to take {expected_s:.0f} s", flush=True)
                    left_out[name] = expected_s
                    break
                row = _in_a_rank(measure_row, sweep, size, stage, rounds=options.rounds)
                row |= {"size": size, "growth": None if before is None else _cost(row) / _cost(before)}
                rows.append(row)
                before = row
                print(_line(row), flush=True)
    targets = _judge(rows)
    print(*targets, sep="\n")
    report = {
        **head,
        "load": [began_load, load()],
        "simulated_ranks": SIMULATED_RANKS,
        "rounds": options.rounds,
        "rows": rows,
        "left_out": left_out,
        "targets": [target.to_dict() for target in targets],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {options.out}")


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="test size: no benchmark")
    parser.add_argument("--stages", type=numbers, default=[0, 1, 2, 3], help="of ZeRO, by default %(default)s")
    parser.add_argument(
        "--sizes", type=numbers, help=f"of each sweep, ascending, by default {','.join(map(str, SIZES))}"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side, by default %(default)s")
    parser.add_argument(
        "--profile", choices=SWEEPS, help="instead: the functions that a step of such a model spends on"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/step-overhead.json")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or ([20, 40] if options.quick else list(SIZES))
    return options


def _in_a_rank(body: Any, *arguments: Any, **named: Any) -> Any:
    """In a process of its own, which simulates its world by itself."""
    return run_ranks(1, body, *arguments, **named, init_process_group=False, deadline_s=DEADLINE_S)[0]


def _cost(row: Row) -> float:
    """Of what the sweep has more and more of."""
    return float(row["per_bucket_s" if row["sweep"] == "buckets" else "per_module_s"]["median"])


def _expected_s(before: Row, size: int) -> float:
    """What a step will take, should its cost go on growing as it did."""
    return float(before["zcore_s"]["median"] * size / before["size"] * max(1.0, before["growth"] or 1.0))


def _line(row: Row) -> str:
    spread = {name: row[f"per_{name}_s"] for name in ("module", "bucket")}
    shown = ", ".join(f"{each['median'] * 1e6:8.1f} us a {name}" for name, each in spread.items())
    phases = ", ".join(f"{name} {each['median'] * 1e3:.1f}" for name, each in row["phases_s"].items())
    growth = "" if row["growth"] is None else f", growth {row['growth']:.2f}"
    return (
        f"zcore {row['stage']}, {row['modules']:6} modules in {row['buckets']:6} buckets: torch "
        f"{row['torch_s']['median'] * 1e3:8.1f} ms, overhead {row['overhead_s']['median'] * 1e3:8.1f} ms ({phases}), "
        f"{shown}{growth}"
    )


def _judge(rows: Sequence[Row]) -> list[Target]:
    targets = []
    for row in rows:
        kind = row["sweep"].removesuffix("s")
        where = f"zcore {row['stage']} at {row['modules']} modules in {row['buckets']} buckets"
        if row["sweep"] != "buckets":
            found_us = (row["per_module_s"][each] * 1e6 for each in ("median", "low", "high"))
            targets.append(Target(f"overhead a {kind}, {where}", "us", MOST_PER_MODULE_US, True, *found_us))
        if row["growth"] is not None:
            targets.append(Target(f"growth a {kind}, {where}", "x", MOST_GROWTH, True, row["growth"]))
    return targets


if __name__ == "__main__":
    main()
