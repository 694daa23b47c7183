"""Measures every collective of every implementation on 2 ranks of this host, and judges what zcore-comm promises.

    python tools/bench_collectives.py [--max-bytes 1GiB] [--rounds 9] [--turn 0.1] [--out FILE]

One `zcore comm bench -n 2`, beside plain torch.distributed over gloo. Writes its report to
docs/benchmarks/collectives-cpu-2-ranks.json with one more key, and the plot beside it (needs matplotlib):

    targets    name, wanted, found (of the worst size it speaks of), at_bytes, is_met; ratios are medians over rounds

A promise that is not kept is written as such; the exit code is 0. Wait for a quiet machine: `load` in the file tells.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from zcore.comm.bench.measure import Report, Row

ROOT = Path(__file__).resolve().parent.parent
BORN, COPIED = "shared memory", "shared memory, plain tensors"


@dataclass(frozen=True, slots=True)
class Target:
    """A promise about one op of one implementation, for payloads from `from_bytes` on."""

    op: str
    implementation: str
    from_bytes: int
    wanted: float
    unit: str = "x plain gloo"  # or seconds, which are to stay below `wanted`

    @property
    def name(self) -> str:
        """The promise in words."""
        return f"{self.implementation}: {self.op} from {self.from_bytes} bytes"


LARGE, SMALL = 16 << 20, 4 << 10
OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")
TARGETS = (
    Target("reduce_scatter", "pairwise", LARGE, 2.5),
    Target("reduce_scatter", BORN, LARGE, 8.0),
    Target("all_gather", "pairwise", LARGE, 2.0),
    Target("all_gather", BORN, LARGE, 6.0),
    *(Target(op, name, SMALL, 1.0) for op in OPS for name in ("pairwise", BORN, COPIED)),
    Target("barrier", BORN, 0, 20e-6, "s"),
)


def judge(report: Report, target: Target) -> dict[str, object] | None:
    """What was found at the size that keeps `target` worst; None where nothing of it was measured."""
    rows = [
        row
        for row in report.rows
        if (row.op, row.implementation) == (target.op, target.implementation) and row.payload_bytes >= target.from_bytes
    ]
    if not rows:
        return None
    is_time = target.unit == "s"
    figure: Callable[[Row], float] = (lambda row: -row.time_s.median) if is_time else (lambda row: row.speedup.median)
    worst = min(rows, key=figure)
    spread = worst.time_s if is_time else worst.speedup
    is_met = spread.median <= target.wanted if is_time else spread.median >= target.wanted
    told = {"name": target.name, "wanted": target.wanted, "unit": target.unit, "found": asdict(spread)}
    return {**told, "at_bytes": worst.payload_bytes, "is_met": is_met}


def main() -> None:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max-bytes", default="1GiB", help="the largest payload; by default %(default)s, 12 GiB in all"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each implementation")
    parser.add_argument("--turn", type=float, default=0.1, help="seconds of a turn: now and then a call waits for 4 ms")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/collectives-cpu-2-ranks.json")
    options = parser.parse_args()
    command = ["comm", "bench", "-n", "2", "--max-bytes", options.max_bytes, "--rounds", str(options.rounds)]
    command += ["--turn", str(options.turn)]
    command += ["--json", str(options.out), "--plot", str(options.out.with_suffix(".png"))]
    start = "from zcore.core.cli import main; main()"
    subprocess.run([sys.executable, "-c", start, *command], check=True)
    text = options.out.read_text()
    report = Report.from_json(text)
    targets = [judged for target in TARGETS if (judged := judge(report, target)) is not None]
    asked = f"--max-bytes {options.max_bytes} --rounds {options.rounds} --turn {options.turn}"
    told = {**json.loads(text), "command": f"python tools/bench_collectives.py {asked}", "targets": targets}
    options.out.write_text(json.dumps(told, indent=1) + "\n")
    for each in targets:
        met = "met   " if each["is_met"] else "MISSED"
        print(
            f"{met} {each['name']}: wanted {each['wanted']} {each['unit']}, found {each['found']} at {each['at_bytes']}"
        )


if __name__ == "__main__":
    main()
