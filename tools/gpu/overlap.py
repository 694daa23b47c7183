"""The trace of one step as torch's profiler sees it: zcore's collectives, the kernels, and how busy the device is."""

import gc

import torch
from gpu.timing import timed_s, wait_for
from gpu.trainers import Batch, Trainer, build_trainer, make_batch
from gpu.worlds import MODELS, QUICK, SEQUENCES, WORLDS, Figures, entered, run_in
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # documented, not in its __all__
from torch.profiler import ProfilerActivity, profile

__all__ = ["profile_steps"]


def profile_steps(device_type: str, *, is_quick: bool) -> Figures:
    """Profile one step of every trainer of the smallest model, in both worlds."""
    return {world: run_in(world, _profile_trainers, device_type, is_quick=is_quick) for world in WORLDS}


def _profile_trainers(world: str, device_type: str, is_quick: bool) -> Figures:
    with entered(world, device_type) as mesh:
        name, config = next(iter((QUICK if is_quick else MODELS).items()))
        batch = make_batch(config, torch.device(device_type), sequences=SEQUENCES, seed=0)
        found: Figures = {"model": name}
        for kind in WORLDS[world]:
            trainer = build_trainer(kind, config, mesh=mesh)
            found[kind] = _profile_step(trainer, batch, torch.device(device_type))
            del trainer
            gc.collect()
        return found


def _profile_step(trainer: Trainer, batch: Batch, device: torch.device) -> Figures:
    for _ in range(3):
        trainer.step([batch])
    wait_for(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        took_s = timed_s(lambda: trainer.step([batch]), device)
    on_host = [event for event in trace.events() if event.device_type == DeviceType.CPU]
    # Ranges such as "zcore::all_gather" are drawn on the device, too, over the kernels inside them.
    kernels = [
        event
        for event in trace.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    counts: dict[str, int] = {}
    for event in on_host:
        if event.name.startswith("zcore::"):
            op = event.name.split()[0]
            counts[op] = counts.get(op, 0) + 1
    return {
        "profiled_step_s": took_s,
        "collectives": counts,
        "kernels": len(kernels),
        "kernels_s": sum(event.time_range.elapsed_us() for event in kernels) / 1e6,
        "busy_s": _covered_us([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e6,
        "nccl_s": sum(event.time_range.elapsed_us() for event in kernels if "nccl" in event.name.lower()) / 1e6,
    }


def _covered_us(intervals: list[tuple[float, float]]) -> float:
    """The time in which at least one of the intervals runs."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
