"""What each rank holds is what the formula says, measured on 2 and 4 ranks and laid out for 64 and 1,024.

The formula is `placement.state_bytes`, the table of arXiv 1910.02054 in elements; what is measured are live tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.core.testing import simulated_world
from zcore.zero.memory import measure_memory
from zcore.zero.placement import TABLE, state_bytes
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
ADAM_BYTES = 8  # two fp32 moments
DIM = 128


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Residuals(nn.Module):
    """Large enough for padding to vanish: 200,000 elements in three blocks."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@dataclass(frozen=True)
class Case:
    """A row of the table and a precision."""

    stage: int
    shard_size: int = -1
    is_bf16: bool = False


@dataclass(frozen=True)
class Measured:
    """By data rank; and the elements of the model."""

    parameters: list[int]
    gradients: list[int]
    optimizer: list[int]
    data_parallel: int
    peaks: list[int]
    numel: int


def measure(cases: list[Case]) -> list[Measured]:
    measured = []
    for case in cases:
        torch.manual_seed(0)
        config = {
            "bf16": {"enabled": case.is_bf16},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {
                "stage": case.stage,
                "mics_shard_size": case.shard_size,
                "stage3_param_persistence_threshold": 0,
            },
        }
        engine = zero.initialize(Residuals(), config)
        for _ in range(2):
            engine.backward(engine(torch.randn(2, DIM)))
            engine.step()
        report = engine.memory_report()
        measured.append(
            Measured(
                [each.parameters_bytes for each in report.ranks],
                [each.gradients_bytes for each in report.ranks],
                [each.optimizer_bytes for each in report.ranks],
                report.data_parallel.states_bytes,
                [each.gathered_peak_bytes for each in report.ranks],
                engine.sharding.num_params,
            )
        )
    return measured


def expected(case: Case, *, numel: int, shard_size: int) -> int:
    return state_bytes(
        TABLE[case.stage],
        numel=numel,
        shard_size=shard_size,
        compute_bytes=2 if case.is_bf16 else 4,
        master_bytes=4,
        optimizer_bytes=ADAM_BYTES,
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_measured_bytes_of_each_rank_are_the_formula_within_2_percent(ranks: Ranks, world_size: int) -> None:
    cases = [Case(stage, is_bf16=is_bf16) for stage in range(4) for is_bf16 in (False, True)]
    if world_size == 4:
        cases += [Case(stage, shard_size=2, is_bf16=is_bf16) for stage in (1, 2, 3) for is_bf16 in (False, True)]
    by_rank = ranks(world_size, measure, cases)
    assert all(each == by_rank[0] for each in by_rank)
    for case, found in zip(cases, by_rank[0], strict=True):
        shard_size = world_size if case.shard_size == -1 else case.shard_size
        formula = expected(case, numel=found.numel, shard_size=shard_size)
        totals = [sum(parts) for parts in zip(found.parameters, found.gradients, found.optimizer, strict=True)]
        assert totals == [pytest.approx(formula, rel=0.02)] * world_size, case
        whole = expected(Case(0, is_bf16=case.is_bf16), numel=found.numel, shard_size=1)
        assert found.data_parallel == pytest.approx(whole, rel=0.02), case


def test_each_stage_saves_what_it_shards_and_gathers_little_at_a_time(ranks: Ranks) -> None:
    found = ranks(2, measure, [Case(stage) for stage in range(4)])[0]
    whole = found[0].numel * 4
    near_whole, near_half = pytest.approx(whole, rel=0.02), pytest.approx(whole / 2, rel=0.02)
    parts = [(each.parameters[1], each.gradients[1], each.optimizer[1] / 2) for each in found]
    assert parts == [
        (near_whole, near_whole, near_whole),
        (near_whole, near_whole, near_half),
        (near_whole, near_half, near_half),
        (near_half, near_half, near_half),
    ]
    block = whole / 3
    assert found[0].peaks[1] == found[1].peaks[1] == 0  # nothing comes and goes
    assert found[2].peaks[1] <= 2.1 * block  # one block's gradient is summed while the next one's is computed
    assert found[3].peaks[1] <= 4.2 * block  # and the parameters of the block at hand and the one ahead


def measure_live_tensors(stage: int) -> tuple[int, int]:
    """Bytes that the report gives and bytes of all flat tensors that are really allocated, at rest."""
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine = zero.initialize(Residuals(), config)
    for _ in range(2):
        engine.backward(engine(torch.randn(2, DIM)))
        engine.step()
    tensors: list[Tensor] = []
    for bucket in engine.sharding.buckets:
        tensors += [bucket.memory.gathered, bucket.memory.master]
        for param in bucket.params:
            tensors += [param.shard.detach().as_subclass(Tensor), param.full.detach()]
            tensors += [] if param.full.grad is None else [param.full.grad]
        if bucket.gradients is not None:
            held = [value for value in vars(bucket.gradients).values() if isinstance(value, Tensor)]
            tensors += held
    assert engine.optimizer is not None
    for state in engine.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    rank = torch.distributed.get_rank()
    return engine.memory_report().ranks[rank].states_bytes, sum(storages.values())


def measure_live_tensors_of_all() -> list[tuple[int, int]]:
    return [measure_live_tensors(stage) for stage in range(4)]


def test_the_report_counts_every_storage_that_is_allocated_once(ranks: Ranks) -> None:
    for of_rank in ranks(2, measure_live_tensors_of_all):
        for reported, allocated in of_rank:
            assert reported == allocated


# Worlds that no test can start: the fake process group moves nothing, but buffers are allocated as on a real rank.


@pytest.mark.parametrize("world_size", [64, 1024])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_step_in_a_large_world_leaves_what_the_formula_says(world_size: int, stage: int, is_bf16: bool) -> None:
    with simulated_world(world_size):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(2)))
        options = zero.ShardingOptions(small_numel=0, precision=zero.Precision(torch.bfloat16 if is_bf16 else None))
        sharding = sharding_of(zero.shard(model, build_mesh(dp=-1), stage=stage, options=options))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # gradients there are undefined
        model(torch.zeros(1, 1024)).sum().backward()
        optimizer.step()
        report = measure_memory(sharding, [optimizer])
        own = report.ranks[0]
        assert str(report).splitlines()[1].split()[:3] == ["rank", "parameters", "gradients"]
        assert sharding.dp.size == world_size
        numel = sum(param.fragment.numel for bucket in sharding.buckets for param in bucket.params)
    formula = state_bytes(
        TABLE[stage],
        numel=2 * 1024**2,
        shard_size=world_size,
        compute_bytes=2 if is_bf16 else 4,
        master_bytes=4,
        optimizer_bytes=4,
    )
    assert own.states_bytes == pytest.approx(formula, rel=0.02)
    assert numel == 2 * 1024**2 // world_size
