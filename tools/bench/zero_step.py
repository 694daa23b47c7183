"""Measures a training step on 2 ranks of this host at each stage of ZeRO, and of its peers: time, memory, bytes sent.

    python tools/bench/zero_step.py [--quick] [--models gpt-25m,gpt-125m] [--contenders "zcore 3,FSDP2"] [--rounds 9]
                                    [--out FILE]

steps/contenders.py says who is compared. Linux only. Each is weighed first, alone and in fresh processes, over some
steps (steps/weigh.py, steps/sent.py). Then all are timed: as many as the machine has memory for live in one process
group and take turns, DDP and FSDP2 always among them, so that what changes on the machine hits all that is compared.
Wait for a quiet machine: `load` in the file tells. Writes docs/benchmarks/step-cpu-2-ranks.json after each model, and
at the end the plot beside it (needs matplotlib). A promise that is not kept is written as such; the exit code is 0.
The file:

    schema, is_benchmark, command, started, machine, versions, load [before, after], world_size, missing (contenders
    that were left out, and why), models; for each model
    parameters, micro_batch (sequences a rank), tokens_per_rank, rounds
    lineups        who took turns with whom: contenders, matmul_flops_per_s (of a rank, all at once: the ceiling),
                   held_by_rank_0_bytes, times of DDP and FSDP2 there
    contenders     of each one, `_bytes` for each rank, on average:
        stage          of ZeRO whose peer it is
        time_s         seconds of a step; times_ddp, times_fsdp2: of each round, its time over theirs. Median, quartiles
        of_matmul      operations per second / ceiling; waiting_share: of the step held by collectives (zcore's)
        losses         of the first three steps; they agree to 1e-4, or nothing is timed
        memory         peak_bytes in a step, held_bytes between steps, start_peak_bytes of building and the first
                       steps, resident_peak_bytes (of rank 0, by the kernel), samples; formula_bytes of the stage's
                       states, states_bytes as zcore counts them
        sent           payload_bytes and calls by op, in_parameters (their sum, all-reduces twice, over the bytes of all
                       parameters), least_bytes (that a rank has to send), loopback_bytes (that it did, over sockets)
    targets        name, wanted, is_limit, found, unit, low, high, is_met
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))  # the model; ranks get this path

from gpt import GPTConfig  # noqa: E402
from head import head_of  # noqa: E402
from steps.contenders import load as load_contender  # noqa: E402
from steps.lineups import plan_lineups  # noqa: E402
from steps.measure import measure_steps  # noqa: E402
from steps.names import DDP, FSDP2, NO_COMMUNICATION, STAGE_OF  # noqa: E402
from steps.plot import draw  # noqa: E402
from steps.targets import judge  # noqa: E402
from steps.weigh import weigh  # noqa: E402
from target import Target  # noqa: E402

from zcore.comm.memory.pages import available_bytes  # noqa: E402
from zcore.core.machine import load  # noqa: E402
from zcore.core.testing import RankFailed, run_ranks  # noqa: E402

WORLD_SIZE = 2
REFERENCES = (DDP, FSDP2)
SEQUENCES = 1
MODELS = {
    "gpt-25m": GPTConfig(vocab_size=6_144, context=128, layers=6, width=512, heads=8),
    "gpt-125m": GPTConfig(vocab_size=26_112, context=128, layers=12, width=768, heads=12),
}
QUICK = {
    "tiny": GPTConfig(vocab_size=128, context=16, layers=2, width=96, heads=2)
}  # matrices are not too small to shard
DEADLINE_S = 3000.0
ROOM_SHARE = 0.7  # of available memory, for states that are held at once; the rest for what one step takes beside them

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, judge, write, draw."""
    options = _read(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"
    missing = _find_missing(options.contenders)
    for name, reason in missing.items():
        print(f"left out: {name}, as {reason}", flush=True)
    began_load = load()
    models: dict[str, Figures] = {}
    report: Figures = {
        **head_of("tools/bench/zero_step.py", arguments, is_benchmark=not options.quick, schema=2),
        "world_size": WORLD_SIZE,
        "missing": missing,
        "models": models,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.contenders if name not in missing]
    for model in options.models:
        print(f"{model} ...", flush=True)
        models[model], targets = _measure({**MODELS, **QUICK}[model], names, rounds=options.rounds)
        for target in targets:
            print(f"  {target}", flush=True)
        options.out.write_text(json.dumps({**report, "load": [began_load, load()]}, indent=1) + "\n")
    draw(report, options.out.with_suffix(".png"))
    print(f"written: {options.out}")


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="test size: no benchmark")
    parser.add_argument("--models", help=f"which, by default {','.join(MODELS)}")
    parser.add_argument(
        "--contenders", default=",".join(STAGE_OF), help="which; DDP and FSDP2 are always there. By default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender, by default %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/step-cpu-2-ranks.json")
    options = parser.parse_args(arguments)
    options.models = list(QUICK if options.quick else MODELS) if options.models is None else options.models.split(",")
    chosen = {*options.contenders.split(","), *REFERENCES}
    if unknown := [*(chosen - STAGE_OF.keys()), *(set(options.models) - MODELS.keys() - QUICK.keys())]:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join([*STAGE_OF, *MODELS])}")
    options.contenders = [name for name in STAGE_OF if name in chosen]
    return options


def _find_missing(names: Sequence[str]) -> dict[str, str]:
    """Those of `names` that cannot be measured here, and why."""
    asked = [name for name in names if name.startswith("DeepSpeed")]
    if not asked:
        return {}
    if find_spec("deepspeed") is None:
        return dict.fromkeys(asked, "deepspeed is not installed")
    try:
        run_ranks(1, load_contender, asked[0], deadline_s=DEADLINE_S)  # compiles at first; two ranks would both
    except RankFailed as error:
        return dict.fromkeys(asked, f"deepspeed does not start: {error.failures[0].message}")
    return {}


def _measure(sizes: GPTConfig, names: Sequence[str], *, rounds: int) -> tuple[Figures, list[Target]]:
    weighed = {}
    for name in names:
        weighed[name] = run_ranks(WORLD_SIZE, weigh, name, sizes, sequences=SEQUENCES, deadline_s=DEADLINE_S)[0]
        _show_weight(name, weighed[name])
    lineups = plan_lineups(
        [*names, NO_COMMUNICATION],
        held_bytes={NO_COMMUNICATION: 0} | {name: _all_ranks_bytes(each) for name, each in weighed.items()},
        references=REFERENCES,
        room_bytes=ROOM_SHARE * available_bytes(),
    )
    rows: dict[str, Figures] = {}
    timed: list[Figures] = []
    for lineup in lineups:
        figures, _ = run_ranks(
            WORLD_SIZE, measure_steps, sizes, lineup, sequences=SEQUENCES, rounds=rounds, deadline_s=DEADLINE_S
        )
        own = figures.pop("contenders")
        references = {name: own[name]["time_s"] for name in REFERENCES}
        timed.append({"contenders": lineup, **figures, **references})
        for name, row in own.items():
            rows.setdefault(
                name, {"stage": STAGE_OF.get(name), "lineup": len(timed) - 1, **row, **weighed.get(name, {})}
            )
            _show_time(name, row)
    parameters = {lineup.pop("parameters") for lineup in timed}.pop()
    order = [name for name in (*STAGE_OF, NO_COMMUNICATION) if name in rows]
    targets = judge(rows)
    return {
        "parameters": parameters,
        "micro_batch": SEQUENCES,
        "tokens_per_rank": SEQUENCES * sizes.context,
        "rounds": rounds,
        "lineups": timed,
        "contenders": {name: rows[name] for name in order},
        "targets": [target.to_dict() for target in targets],
    }, targets


def _all_ranks_bytes(weighed: Figures) -> float:
    return WORLD_SIZE * weighed["memory"]["peak_bytes"]


def _show_weight(name: str, weighed: Mapping[str, Any]) -> None:
    memory, sent = weighed["memory"], weighed["sent"]
    print(
        f"  {name:24} peak {memory['peak_bytes'] / 2**20:8.1f} MiB a rank, between steps "
        f"{memory['held_bytes'] / 2**20:8.1f} MiB; hands {sent['in_parameters']:.2f} x parameters to collectives",
        flush=True,
    )


def _show_time(name: str, row: Mapping[str, Any]) -> None:
    time_s, waiting = row["time_s"], row["waiting_share"]
    held = "" if waiting is None else f"  held by collectives {waiting:.0%}"
    shown = f"{time_s['median'] * 1e3:8.1f} ms ({time_s['low'] * 1e3:.1f} - {time_s['high'] * 1e3:.1f})"
    ratios = f"{row['times_ddp']['median']:.2f} x DDP, {row['times_fsdp2']['median']:.2f} x FSDP2"
    print(f"  {name:24} {shown}  {ratios}{held}", flush=True)


if __name__ == "__main__":
    main()
