"""What one training step costs beside plain torch and FSDP2: time, memory, and waits of the host for the device.

All trainers of a model live in one process and take turns, so that what changes on the machine hits all of them.
"""

import gc
import statistics
import warnings
from collections.abc import Iterable

import torch
from gpt import GPTConfig
from gpu.timing import summarize, timed_s, wait_for
from gpu.trainers import Batch, Plain, Trainer, Zcore, build_trainer, make_batch
from gpu.worlds import MODELS, QUICK, SEQUENCES, WORLDS, Figures, entered, run_in
from torch.distributed.device_mesh import DeviceMesh

from zcore.zero.placement import row_for, state_bytes

__all__ = ["count_waits", "time_steps"]


def time_steps(device_type: str, *, is_quick: bool) -> Figures:
    """Step time, tokens per second, memory and synchronisations of every trainer in both worlds."""
    return {world: run_in(world, _time_models, device_type, is_quick=is_quick) for world in WORLDS}


def _time_models(world: str, device_type: str, is_quick: bool) -> Figures:
    with entered(world, device_type) as mesh:
        models = QUICK if is_quick else MODELS
        figures: Figures = {}
        for name, config in models.items():
            figures[name] = _time_model(config, WORLDS[world], mesh, is_quick)
            gc.collect()  # the trainers of one model make room for the next's
        return figures


def _time_model(config: GPTConfig, kinds: tuple[str, ...], mesh: DeviceMesh, is_quick: bool) -> Figures:
    device = torch.device(mesh.device_type)
    num_rounds, steps_in_round = (3, 1) if is_quick else (12, 4)
    batch = make_batch(config, device, sequences=SEQUENCES, seed=0)
    rows: dict[str, Figures] = {}
    trainers: dict[str, Trainer] = {}
    for kind in kinds:
        trainers[kind], rows[kind] = _build_measured(kind, config, mesh, batch)
    times_s: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(num_rounds):
        for kind, trainer in trainers.items():
            times_s[kind].append(timed_s(lambda: trainer.step([batch]), device, repeats=steps_in_round))  # noqa: B023
    for kind, trainer in trainers.items():
        median_s = statistics.median(times_s[kind])
        ratios = [mine / plain for mine, plain in zip(times_s[kind], times_s["plain"], strict=True)]
        rows[kind] |= {
            **summarize(times_s[kind]),
            "times_plain": statistics.median(ratios),
            "tokens_per_s": batch[0].numel() / median_s,
            "synchronizations": _count_synchronizations(trainer, batch) if device.type == "cuda" else None,
        }
    plain = trainers["plain"]
    assert isinstance(plain, Plain)
    numel = sum(param.numel() for param in plain.params)
    shape = {"parameters": numel, "sequences": SEQUENCES, "context": config.context, "rounds": num_rounds}
    return {**shape, "steps_in_round": steps_in_round, "trainers": rows}


def _build_measured(kind: str, config: GPTConfig, mesh: DeviceMesh, batch: Batch) -> tuple[Trainer, Figures]:
    """A trainer after three steps, and the bytes that it holds between steps and at the peak of one."""
    on_cuda = mesh.device_type == "cuda"
    before_bytes = torch.cuda.memory_allocated() if on_cuda else 0
    trainer = build_trainer(kind, config, mesh=mesh)
    for _ in range(3):
        trainer.step([batch])
    row: Figures = {"held_bytes": None, "peak_bytes": None}
    if on_cuda:
        wait_for(torch.device("cuda"))
        gc.collect()
        row["held_bytes"] = torch.cuda.memory_allocated() - before_bytes
        torch.cuda.reset_peak_memory_stats()
        trainer.step([batch])
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before_bytes
    if isinstance(trainer, Zcore):
        sharding = trainer.engine.sharding
        row["states_bytes"] = trainer.engine.memory_report().ranks[0].states_bytes
        row["states_formula_bytes"] = state_bytes(
            row_for(sharding.zero_stage, shard_size=sharding.dp.shard_size),
            numel=sharding.num_params,
            shard_size=sharding.dp.shard_size,
            compute_bytes=2,
            master_bytes=4,
            optimizer_bytes=8,
        )
    return trainer, row


def _count_synchronizations(trainer: Trainer, batch: Batch) -> dict[str, int]:
    """How often one step makes the host wait for the device, by the line that does."""
    wait_for(torch.device("cuda"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            trainer.step([batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return count_waits(caught)


def count_waits(caught: Iterable[warnings.WarningMessage]) -> dict[str, int]:
    """Of what torch warns in this mode: its waits by line, and not that the mode is a prototype, told once."""
    counts = {"total": 0}
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            place = f"{'/'.join(warning.filename.split('/')[-3:])}:{warning.lineno}"
            counts["total"] += 1
            counts[place] = counts.get(place, 0) + 1
    return counts
