"""What the one rank of tools/bench/overhead.py runs: a step of zcore and one of plain torch, in a simulated world."""

import cProfile
import gc
import io
import pstats
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist
from gpu.worlds import entered
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from zcore import zero
from zcore.core.timing import Spread, time_in_turns

__all__ = ["SWEEPS", "measure_row", "profile_step"]

SWEEPS = ("modules", "layers", "buckets")
BLOCKS = 10  # where modules or layers are what there is more and more of
NUMEL = 8  # of a parameter
LEARNING_RATE = 1e-9  # parameters stay 1, or numbers would vanish on their way through so many modules
WARM_STEPS = 3
SHOWN = 30  # functions of a profile
PHASES = ("forward", "backward", "step")


class Scale(nn.Module):
    """Multiply by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUMEL))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [NUMEL] to the same shape."""
        return x * self.weight


def _linear() -> nn.Module:
    layer = nn.Linear(NUMEL, NUMEL, bias=False)
    nn.init.eye_(layer.weight)
    return layer


class Block(nn.Module):
    """Modules one after the other, gathered as one."""

    def __init__(self, modules: int, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(kind() for _ in range(modules))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [NUMEL] to the same shape."""
        for part in self.parts:
            x = part(x)
        return x


class Chain(nn.Module):
    """Blocks one after the other; their mean is the loss."""

    def __init__(self, blocks: int, modules: int, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(modules, kind) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [NUMEL] to a loss."""
        for block in self.blocks:
            x = block(x)
        return x.mean()


class Timed:
    """A step, and how long its phases took each time."""

    def __init__(self, forward: Callable[[], Tensor], backward: Callable[[Tensor], object], step: Callable[[], object]):
        self._forward, self._backward, self._step = forward, backward, step
        self.phases_s: list[tuple[float, ...]] = []

    def __call__(self) -> None:
        """Take one."""
        began_s = time.perf_counter()
        loss = self._forward()
        ran_s = time.perf_counter()
        self._backward(loss)
        del loss
        returned_s = time.perf_counter()
        self._step()
        self.phases_s.append((ran_s - began_s, returned_s - ran_s, time.perf_counter() - returned_s))


def _chain(sweep: str, size: int) -> Chain:
    if sweep == "buckets":
        return Chain(size, 2, Scale)
    return Chain(BLOCKS, size // BLOCKS, Scale if sweep == "modules" else _linear)


def _in_torch(sweep: str, size: int) -> Timed:
    model, x = _chain(sweep, size), torch.ones(NUMEL)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Timed(lambda: model(x), lambda loss: loss.backward(), step)


def _in_zcore(sweep: str, size: int, stage: int, mesh: DeviceMesh) -> tuple[Timed, zero.Engine]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE, "fused": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, x = zero.initialize(_chain(sweep, size), config, mesh=mesh), torch.ones(NUMEL)
    return Timed(lambda: engine(x), engine.backward, engine.step), engine


def measure_row(sweep: str, size: int, stage: int, *, rounds: int) -> dict[str, object]:
    """Time both steps in turns."""
    with entered("simulated", "cpu") as mesh:
        assert dist.group.WORLD is not None
        torch_step = _in_torch(sweep, size)
        zcore_step, engine = _in_zcore(sweep, size, stage, mesh)
        for _ in range(WARM_STEPS):
            torch_step()
            zcore_step()
        for each in (torch_step, zcore_step):
            each.phases_s.clear()
        times_s = time_in_turns(
            {"torch": torch_step, "zcore": zcore_step},
            group=dist.group.WORLD,
            device=torch.device("cpu"),
            rounds=rounds,
            slice_s=0.05,
        )
        num_modules = sum(isinstance(module, Scale | nn.Linear) for module in engine.module.modules())
        num_buckets = len(engine.sharding.buckets)
    overheads_s = [ours - plain for ours, plain in zip(times_s["zcore"], times_s["torch"], strict=True)]
    return {
        "sweep": sweep,
        "stage": stage,
        "modules": num_modules,
        "buckets": num_buckets,
        "torch_s": asdict(Spread.of(times_s["torch"])),
        "zcore_s": asdict(Spread.of(times_s["zcore"])),
        "overhead_s": asdict(Spread.of(overheads_s)),
        "phases_s": _phases(torch_step, zcore_step),
        "per_module_s": asdict(Spread.of([each / num_modules for each in overheads_s])),
        "per_bucket_s": asdict(Spread.of([each / num_buckets for each in overheads_s])),
    }


def _phases(plain: Timed, ours: Timed) -> dict[str, dict[str, float]]:
    """What each phase takes longer, over the steps that both took; they did not take equally many."""
    found = {}
    for phase, ours_s, plain_s in zip(
        PHASES, zip(*ours.phases_s, strict=True), zip(*plain.phases_s, strict=True), strict=True
    ):
        expected_s = Spread.of(plain_s).median
        found[phase] = asdict(Spread.of([each - expected_s for each in ours_s]))
    return found


def profile_step(sweep: str, size: int, stage: int) -> str:
    """The functions that a step spends most processor time in, each with its file and line; Python is slower then."""
    with entered("simulated", "cpu") as mesh:
        step, _ = _in_zcore(sweep, size, stage, mesh)
        for _ in range(WARM_STEPS):
            step()
        profile = cProfile.Profile(time.process_time)
        gc.collect()
        gc.disable()  # as where steps are timed; else a collection is told as time of whoever it met
        try:
            profile.runcall(step)
        finally:
            gc.enable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(SHOWN)
    return text.getvalue()
