"""Ranks that run unlike programs: they train as plain torch adding the same parts, or all are told, and none hangs.

below stage 3               any modules in any order, any number of times: nothing is gathered for them
stage 3, inside of a leaf   the same
stage 3, else               a MismatchError, or a CollectiveError, on every rank of the shard group
uneven numbers of calls     whoever waits for a rank that does not come gets a CollectiveError after the timeout
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import is_paragraph
from torch import Tensor, nn

from zcore import zero
from zcore.core.extensions import installed
from zcore.core.mesh import build_mesh
from zcore.core.testing import RankFailed, RankFailure
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
NUM_BLOCKS, STEPS, TIMEOUT_S = 3, 4, 5.0
FOUR = pytest.param(4, marks=pytest.mark.thorough)
ON_FOUR = [pytest.param(4, stage, marks=pytest.mark.thorough) for stage in (1, 3)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Inner(nn.Module):
    """Layers in an order that the caller says. As a leaf it is gathered as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        for index in order:
            x = self.layers[index](x)
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(6, 1)

    def forward(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        return self.head(self.inner(x, order)).square().mean()


IN_A_ROW = "one goes twice"  # through one layer, which is gathered once for both, so that stage 3 has it, too
# The order of layers, by rank and step.
ORDERS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "one skips": lambda rank, step: (0, 1, 2) if rank or step % 2 else (0, 2),
    "each skips another": lambda rank, step: tuple(each for each in range(3) if each != (rank + step) % 3),
    "one takes none": lambda rank, step: () if rank == 1 else (0, 1, 2),
    "backwards": lambda rank, step: (2, 1, 0) if rank % 2 else (0, 1, 2),
    IN_A_ROW: lambda rank, step: (0, 1, 1, 2) if rank == 1 else (0, 1, 2),
    "one changes later": lambda rank, step: (1, 0) if rank == 1 and step == 2 else (0, 1, 2),
}


def rows_of(rank: int, step: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(100 * rank + step))


def built() -> Outer:
    torch.manual_seed(0)
    return Outer()


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def train_in_orders(name: str, *, stage: int, is_leaf: bool = False, **mesh_sizes: int) -> dict[str, Tensor]:
    model, rank = built(), dist.get_rank()
    if is_leaf:
        zero.set_leaf_modules(model, [Inner])
    mesh = build_mesh(**(mesh_sizes or {"dp": -1}))
    zero.shard(model, mesh, stage=stage, options=zero.ShardingOptions(small_numel=0))
    optimizer = optimizer_of(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        model(rows_of(rank, step), ORDERS[name](rank, step)).backward()
        optimizer.step()
    return zero.consolidated_state_dict(model, rank=None)


def train_all_orders(cases: list[dict[str, Any]]) -> list[dict[str, dict[str, Tensor]]]:
    return [{name: train_in_orders(name, **case) for name in orders_of(case)} for case in cases]


def train_plainly(name: str, *, world_size: int) -> dict[str, Tensor]:
    model = built()
    optimizer = optimizer_of(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(world_size):
            (model(rows_of(rank, step), ORDERS[name](rank, step)) / world_size).backward()
        optimizer.step()
    return model.state_dict()


def orders_of(case: dict[str, Any]) -> list[str]:
    """Those that promise parity, but for what has a test of its own below."""
    if case["stage"] < 3:
        return list(ORDERS)
    if "is_leaf" not in case:
        return [IN_A_ROW]
    return [name for name in ORDERS if name != "one takes none"]


HYBRID = {"dp_replicate": 2, "dp_shard": 2}
PROMISED: dict[int, list[dict[str, Any]]] = {
    2: [{"stage": stage} for stage in (0, 1, 2)] + [{"stage": 3, "is_leaf": True}, {"stage": 3}],
    4: [{"stage": 0}, {"stage": 2}, {"stage": 1, **HYBRID}, {"stage": 3, "is_leaf": True, **HYBRID}, {"stage": 3}],
}


@pytest.mark.parametrize("world_size", [2, FOUR])
def test_ranks_may_use_modules_in_orders_of_their_own(ranks: Ranks, world_size: int) -> None:
    """Below stage 3, and inside of a leaf."""
    expected = {name: train_plainly(name, world_size=world_size) for name in ORDERS}
    for of_rank in ranks(world_size, train_all_orders, PROMISED[world_size]):
        for case, by_name in zip(PROMISED[world_size], of_rank, strict=True):
            for name, state in by_name.items():
                for key, value in expected[name].items():
                    torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6, msg=f"{case} {name} {key}")


def is_told(failure: RankFailure) -> bool:
    """Whether a rank ended in words: ours, or where the core is alone and sizes differ those of gloo."""
    if failure.type_name == "Died" and not installed("zcore-comm"):
        return failure.message == "killed by SIGABRT" and "op.preamble.length <= op.nbytes" in failure.output
    return failure.type_name in ("CollectiveError", "MismatchError", "StateError") and is_paragraph(failure.message)


def test_a_rank_may_pass_its_input_through_a_leaf_that_others_use(ranks: Ranks) -> None:
    """As layers that are dropped at random do, and experts where no token of a rank has chosen one."""
    expected = train_plainly("one takes none", world_size=2)
    case = {"stage": 3, "is_leaf": True}
    for state in ranks(2, train_in_orders, "one takes none", **case, group_timeout_s=TIMEOUT_S):
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("world_size", "mesh_sizes"), [(2, {}), pytest.param(4, HYBRID, marks=pytest.mark.thorough)], ids=str
)
@pytest.mark.parametrize("name", [name for name in ORDERS if name != IN_A_ROW])
def test_under_stage_3_every_rank_that_gathers_with_another_order_is_told(
    ranks: Ranks, name: str, world_size: int, mesh_sizes: dict[str, int]
) -> None:
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, train_in_orders, name, stage=3, **mesh_sizes, group_timeout_s=TIMEOUT_S, deadline_s=30.0)
    failures = caught.value.failures
    assert len(failures) == world_size
    for failure in failures:
        assert is_told(failure), failure


# Uneven numbers of micro-batches


def accumulate_unevenly(stage: int) -> dict[str, Tensor]:
    """Rank r has r micro-batches inside of no_sync before the last one."""
    model, rank = built(), dist.get_rank()
    zero.shard(model, build_mesh(dp=-1), stage=stage, options=zero.ShardingOptions(small_numel=0))
    optimizer = optimizer_of(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(rank):
            with zero.no_sync(model):
                model(rows_of(rank, 10 * step + micro), (0, 1, 2)).backward()
        model(rows_of(rank, 10 * step + rank), (0, 1, 2)).backward()
        optimizer.step()
    assert sharding_of(model).ledger.live_bytes == 0
    return zero.consolidated_state_dict(model, rank=None)


def accumulate_unevenly_in_all(stages: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [accumulate_unevenly(stage) for stage in stages]


@pytest.mark.parametrize("world_size", [2, FOUR])
def test_below_stage_3_ranks_may_accumulate_over_different_numbers_of_micro_batches(
    ranks: Ranks, world_size: int
) -> None:
    model = built()
    optimizer = optimizer_of(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(world_size):
            for micro in range(rank + 1):
                (model(rows_of(rank, 10 * step + micro), (0, 1, 2)) / world_size).backward()
        optimizer.step()
    for by_stage in ranks(world_size, accumulate_unevenly_in_all, (0, 1, 2)):
        for state in by_stage:
            torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-4, atol=1e-6)


def train_engine(case: str, *, stage: int) -> int:
    config = {
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, rank = zero.initialize(built(), config), dist.get_rank()
    last = dist.get_world_size() - 1
    num_micro = 5 if case == "one micro-batch less" and rank == last else 6
    for micro in range(num_micro):
        if case == "evaluation on one rank" and rank == 0 and micro == 2:
            with torch.no_grad():
                engine(rows_of(9, 9), (0, 1, 2))
        loss = engine(rows_of(rank, micro), (0, 1, 2))
        if case == "a loss of nothing" and rank == last and micro == 3:
            loss = rows_of(0, 0).mean().requires_grad_()
        engine.backward(loss)
        engine.step()
    engine.memory_report()  # where those meet that are done
    return engine.global_steps


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3), *ON_FOUR])
@pytest.mark.parametrize("case", ["one micro-batch less", "a loss of nothing"])
def test_ranks_that_come_less_often_end_every_rank_by_name(
    ranks: Ranks, case: str, stage: int, world_size: int
) -> None:
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, train_engine, case, stage=stage, group_timeout_s=TIMEOUT_S, deadline_s=30.0)
    failures = caught.value.failures
    assert len(failures) == world_size
    for failure in failures:
        assert is_told(failure), failure


@pytest.mark.parametrize("world_size", [2, FOUR])
def test_an_evaluation_on_one_rank_only_ends_every_rank_by_name(ranks: Ranks, world_size: int) -> None:
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, train_engine, "evaluation on one rank", stage=3, group_timeout_s=TIMEOUT_S, deadline_s=30.0)
    failures = caught.value.failures
    assert len(failures) == world_size
    assert [failure for failure in failures if not is_told(failure)] == []


def evaluate_on_one_rank() -> list[int]:
    return [train_engine("evaluation on one rank", stage=stage) for stage in (0, 1, 2)]


def test_below_stage_3_one_rank_may_evaluate_alone(ranks: Ranks) -> None:
    assert ranks(2, evaluate_on_one_rank) == [[3, 3, 3]] * 2
