"""What every rank of tools/bench_two_hosts.py runs: calls and training steps that take turns, their times and bytes.

    zcore run --hostfile ... rank.py FOLDER [quick]       rank 0 writes FOLDER/figures.json

Times are of the slowest rank. Bytes are those that the device between the hosts sent in one direction, of the two that
with more: the same in every run, whatever else the machine does. Next to them stands what would have to cross even if
each host were one rank: half of every buffer that is gathered or scattered, all of one that is all-reduced.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from two_hosts.pair import SENT_BYTES

from zcore import zero
from zcore.comm.bench.contenders import build_contenders
from zcore.core import extensions
from zcore.core.timing import Spread, time_in_turns

CPU = torch.device("cpu")
CONTENDERS = ("torch gloo", "pairwise", "two levels")
CROSSING = {"reduce_scatter": 0.5, "all_gather": 0.5, "all_reduce": 1.0}  # of the larger side, between two hosts
PAYLOADS_BYTES = (256 << 10, 4 << 20, 16 << 20)
ROUNDS, SLICE_S = 5, 0.25
COUNTED_BYTES = 4 << 20  # by repeating small calls: what else ranks tell each other meanwhile is lost in so many

TRAINING = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
}
NUM_TOKENS = 64  # a rank and step: few, as it is the communication that is looked at

Figures = dict[str, object]


def main() -> None:
    """Measure, and write."""
    folder, is_quick = Path(sys.argv[1]), sys.argv[2:] == ["quick"]
    torch.set_num_threads(1)
    zero.init_distributed()
    figures = {
        "collectives": measure_calls(PAYLOADS_BYTES[:1] if is_quick else PAYLOADS_BYTES),
        "zero_step": measure_steps(GPTConfig(vocab_size=512, layers=1, width=64) if is_quick else GPTConfig(), folder),
    }
    if dist.get_rank() == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def measure_calls(payloads_bytes: tuple[int, ...]) -> list[Figures]:
    """A row for each op and size: {"op", "payload_bytes", "crossing_bytes", "by": {name: times and bytes}}."""
    world = _world()
    contenders = [each for each in build_contenders(world, CPU) if each.name in CONTENDERS]
    assert [each.name for each in contenders] == list(CONTENDERS), contenders
    rows: list[Figures] = []
    for op, crossing in CROSSING.items():
        for payload_bytes in payloads_bytes:
            cases = {each.name: each.prepare(op, payload_bytes) for each in contenders}
            runs: dict[str, Callable[[], None]] = {}
            for name, case in cases.items():
                assert case is not None
                assert case.is_right(), (op, payload_bytes, name)
                runs[name] = case.run
            num_calls = max(1, COUNTED_BYTES // payload_bytes)
            sent_bytes = {name: count_bytes(run, num_calls) for name, run in runs.items()}
            times_s = time_in_turns(runs, group=world, device=CPU, rounds=ROUNDS, slice_s=SLICE_S)
            rows.append(
                {
                    "op": op,
                    "payload_bytes": payload_bytes,
                    "crossing_bytes": crossing * payload_bytes,
                    "by": {name: _figures(times_s[name], sent_bytes[name]) for name in CONTENDERS},
                }
            )
    return rows


def measure_steps(sizes: GPTConfig, folder: Path) -> Figures:
    """The same for a training step: {"parameters", "crossing_bytes", "by"}. Losses have to be equal to the bit."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(sizes.vocab_size, (1, NUM_TOKENS + 1), generator=generator)
    engines: dict[str, zero.Engine] = {"two levels": _engine(sizes)}
    with _alone_on_its_host():
        engines["pairwise"] = _engine(sizes)
    with _without_comm(folder / f"site{dist.get_rank()}"):
        engines["core"] = _engine(sizes)
    losses: dict[str, list[float]] = {name: [] for name in engines}

    def step_of(name: str) -> Callable[[], None]:
        def step() -> None:
            loss = engines[name](tokens[:, :-1], targets=tokens[:, 1:])
            engines[name].backward(loss)
            engines[name].step()
            losses[name].append(loss.item())

        return step

    runs = {name: step_of(name) for name in engines}
    for run in runs.values():
        run()  # torch imports and allocates in the first
    traffic = engines["two levels"].traffic().values()
    for each in traffic:
        each.clear()
    sent_bytes = {name: count_bytes(run, 1) for name, run in runs.items()}
    crossing_bytes = sum(CROSSING[op] * size for each in traffic for op, size in each.payload_bytes.items())
    times_s = time_in_turns(runs, group=_world(), device=CPU, rounds=ROUNDS, slice_s=SLICE_S)
    shortest = min(map(len, losses.values()))
    assert len({tuple(each[:shortest]) for each in losses.values()}) == 1, losses
    return {
        "parameters": sum(each.numel() for each in GPT(sizes).parameters()),
        "crossing_bytes": crossing_bytes,
        "by": {name: _figures(times_s[name], sent_bytes[name]) for name in engines},
    }


def count_bytes(run: Callable[[], None], num_calls: int) -> float:
    """What a call of `run` sends from host to host, in the direction of more."""
    dist.barrier()
    before = int(SENT_BYTES.read_text())
    for _ in range(num_calls):
        run()
    dist.barrier()
    sent = torch.tensor(int(SENT_BYTES.read_text()) - before, dtype=torch.float64)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    return sent.item() / num_calls


def _engine(sizes: GPTConfig) -> zero.Engine:
    torch.manual_seed(0)
    with zero.Init(config=TRAINING):
        model = GPT(sizes)
    return zero.initialize(model, config=TRAINING)


@contextmanager
def _alone_on_its_host() -> Iterator[None]:
    """Groups made in here take every rank for a host of its own, and are served pairwise."""
    os.environ["ZCORE_COMM_HOST"] = str(dist.get_rank())
    try:
        yield
    finally:
        del os.environ["ZCORE_COMM_HOST"]


@contextmanager
def _without_comm(site: Path) -> Iterator[None]:
    """Groups made in here are the core's: an empty wheel of the name zcore-comm comes before the real one."""
    wheel = site / "zcore_comm-0.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: zcore-comm\nVersion: 0\n")
    sys.path.insert(0, str(site))
    extensions.offered.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        extensions.offered.cache_clear()


def _figures(times_s: list[float], sent_bytes: float) -> Mapping[str, object]:
    return {**{f"{name}_s": value for name, value in asdict(Spread.of(times_s)).items()}, "sent_bytes": sent_bytes}


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


if __name__ == "__main__":
    main()
