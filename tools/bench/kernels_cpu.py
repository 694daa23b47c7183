"""Measures zcore-kernels on the CPU: AdamW beside torch's fused step and DeepSpeed's, and every op beside torch.

    python tools/bench/kernels_cpu.py [--quick] [--numels 10000000,100000000,250000000] [--pieces 1,150]
                                      [--threads 1,2] [--rounds 9] [--only steps|ops] [--ops rms_norm,swiglu]
                                      [--out FILE]

kernels/steps.py says what is compared of AdamW; other ops are timed as `zcore kernels bench` does, with the most of the
threads asked for. All that is compared takes turns, with a stream of the same bytes that computes nothing, which is the
limit (native/include/zcore/stream.hpp). DeepSpeed has its turns where it is installed; it compiles its step at first.
250 million elements need 12 GiB. Wait for a quiet machine: `load` in the file tells.

Writes docs/benchmarks/kernels-cpu.json after each row of steps and after all ops, and at the end the plot beside it
(needs matplotlib):

    schema, is_benchmark, command, started, machine, versions, load [before, after], rounds
    steps          a row for each number of elements, pieces and threads; in `states` and `update`, for each contender
        bytes_an_element, time_s
        of_memory          the stream's time over this one's
        times_first        its time over that of the first, which is zcore's
        of_allowed_gain    how much faster than the first it is, over how much faster the stream of its bytes is
    ops            rows of `zcore kernels bench`: op, dtype, numel, contender, time_s, bytes_per_s, of_limit, speedup
                   (its time over zcore's)
    targets        name, unit, wanted, is_limit, found, low, high, is_met

Figures are medians with quartiles. A target that is not reached is written as such; the exit code is 0.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from head import head_of
from kernels.plot import draw
from kernels.steps import measure_steps
from kernels.targets import judge

from zcore.core.machine import load
from zcore.kernels.commands.cases import CASES
from zcore.kernels.commands.measuring import measure_op

ROOT = Path(__file__).resolve().parents[2]

NUMELS, PIECES, THREADS = (10_000_000, 100_000_000, 250_000_000), (1, 150), (1, 2)
OPS_NUMEL, QUICK_NUMEL = 10_000_000, 30_000
SLICE_S = 0.3

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, judge, write, draw."""
    options = _read(arguments)
    began_load, steps, ops = load(), [], []
    report: Figures = {
        **head_of("tools/bench/kernels_cpu.py", arguments, is_benchmark=not options.quick),
        "rounds": options.rounds,
        "steps": steps,
        "ops": ops,
    }
    timing = {"rounds": options.rounds, "slice_s": 0.01 if options.quick else SLICE_S}

    def write() -> None:
        targets = [target.to_dict() for target in judge(steps, ops)]
        options.out.write_text(
            json.dumps({**report, "load": [began_load, load()], "targets": targets}, indent=1) + "\n"
        )

    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.only != "ops":
        for numel, pieces, threads in product(options.numels, options.pieces, options.threads):
            steps.append(_in_a_process(threads, measure_steps, numel, pieces, threads, **timing))
            print(*_told(steps[-1]), sep="\n", flush=True)
            write()
    if options.only != "steps":
        numel, threads = QUICK_NUMEL if options.quick else OPS_NUMEL, max(options.threads)
        ops += _in_a_process(threads, _measure_ops, options.ops, numel, threads, **timing)
        write()
    for target in judge(steps, ops):
        print(target)
    draw(report, options.out.with_suffix(".png"))
    print(f"written: {options.out}")


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="test size: no benchmark")
    parser.add_argument("--numels", type=numbers, help=f"elements of a step, by default {','.join(map(str, NUMELS))}")
    parser.add_argument("--pieces", type=numbers, default=list(PIECES), help="tensors of a step")
    parser.add_argument("--threads", type=numbers, default=list(THREADS))
    parser.add_argument("--only", choices=("steps", "ops"))
    parser.add_argument("--ops", type=lambda text: text.split(","), default=list(CASES), help="by default all")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender, by default %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/kernels-cpu.json")
    options = parser.parse_args(arguments)
    options.numels = options.numels or ([QUICK_NUMEL] if options.quick else list(NUMELS))
    return options


def _in_a_process(threads: int, body: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """A new one each time: OpenMP reads the number of its threads when it is loaded, and memory is given back."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(body, *arguments, **named).result()


def _measure_ops(names: Sequence[str], numel: int, threads: int, **timing: Any) -> list[Figures]:
    torch.set_num_threads(threads)
    rows = []
    for op, dtype in product(names, (torch.float32, torch.bfloat16)):
        print(f"{op}, {dtype}", flush=True)
        device, peers = torch.device("cpu"), ("torch", "compile")
        rows += measure_op(op, numel=numel, dtype=dtype, device=device, peers=peers, **timing)
    return [asdict(row) for row in rows]


def _told(row: Figures) -> Iterator[str]:
    yield f"AdamW, {row['numel']} elements in {row['pieces']}, threads {row['threads']}:"
    for name, each in {**row["states"], **row["update"]}.items():
        time_s, memory, times = (each[key]["median"] for key in ("time_s", "of_memory", "times_first"))
        yield f"  {name:36} {time_s * 1e3:8.1f} ms, {memory:.2f} of memory, {times:.2f} times the first"


if __name__ == "__main__":
    main()
