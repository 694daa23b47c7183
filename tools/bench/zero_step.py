"""Measures a training step on 2 ranks of this host: zcore's ZeRO-3 over each kind of collectives, DDP and FSDP2.

    python tools/bench/zero_step.py [--quick] [--models quickstart,gpt-125m] [--rounds 9] [--out FILE]

All kinds of a model live in one process group and take turns, so that what changes on the machine hits all of them.
steps/trainers.py says what the kinds are. Writes docs/benchmarks/step-cpu-2-ranks.json, and the plot beside it (needs
matplotlib). The file: {"schema": 1, "is_benchmark", "command", "started", "machine", "versions", "load" (before and
after), "world_size", "models"}, and for each model

    parameters, tokens_per_rank, rounds, matmul_flops_per_s (of a rank, all at once: the ceiling)
    kinds    time_s, times_plain (own time / that over plain gloo, of each round), times_ddp: median and quartiles;
             of_matmul (operations per second / ceiling), waiting_share (held by collectives), losses (first three)
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))  # the model; ranks get this path

from gpt import GPTConfig  # noqa: E402
from steps.measure import measure_steps  # noqa: E402
from steps.plot import draw  # noqa: E402
from steps.trainers import KINDS  # noqa: E402

from zcore.comm.bench.machine import find_machine, find_versions, load  # noqa: E402
from zcore.core.testing import run_ranks  # noqa: E402

MODELS = {
    "quickstart": (GPTConfig(), 4, KINDS),  # of docs/examples/train_gpt.py, with its batch
    # All kinds would hold 20 GB.
    "gpt-125m": (GPTConfig(vocab_size=26_112, context=128, layers=12, width=768, heads=12), 1, (KINDS[0], *KINDS[3:])),
}
QUICK = {"tiny": (GPTConfig(vocab_size=64, context=16, layers=2, width=32, heads=2), 1, KINDS)}
DEADLINE_S = 3000.0


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="test size: no benchmark")
    parser.add_argument("--models", default=",".join(MODELS), help="which, by default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/step-cpu-2-ranks.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began_load, started = load(), datetime.now(UTC).isoformat(timespec="seconds")
    chosen = QUICK if options.quick else {name: MODELS[name] for name in options.models.split(",")}
    models: dict[str, Mapping[str, Any]] = {}
    report: dict[str, object] = {
        "schema": 1,
        "is_benchmark": not options.quick,
        "command": shlex.join(["python", "tools/bench/zero_step.py", *sys.argv[1:]]),
        "started": started,
        "machine": find_machine(torch.device("cpu")),
        "versions": find_versions(),
        "world_size": 2,
        "models": models,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (sizes, sequences, kinds) in chosen.items():
        print(f"{name} ...", flush=True)
        models[name], _ = run_ranks(
            2, measure_steps, sizes, kinds, sequences=sequences, rounds=options.rounds, deadline_s=DEADLINE_S
        )
        show(models[name])
        options.out.write_text(json.dumps({**report, "load": [began_load, load()]}, indent=1) + "\n")
    draw(report, options.out.with_suffix(".png"))
    print(f"written: {options.out}")


def show(figures: Mapping[str, Any]) -> None:
    """A line for each kind."""
    for kind, row in figures["kinds"].items():
        time_s, waiting = row["time_s"], row["waiting_share"]
        held = "" if waiting is None else f"  held by collectives {waiting:.0%}"
        shown = f"{time_s['median'] * 1e3:8.1f} ms ({time_s['low'] * 1e3:.1f} - {time_s['high'] * 1e3:.1f})"
        print(f"  {kind:22} {shown}  {row['times_ddp']['median']:.2f} x DDP{held}", flush=True)


if __name__ == "__main__":
    main()
