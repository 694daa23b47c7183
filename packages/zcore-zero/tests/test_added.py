"""Modules that a model gets after it was sharded: noticed, sharded on demand, and trained as in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, batch, refusal, settings, train_steps
from torch import Tensor, nn

from zcore import zero
from zcore.core.mesh import build_mesh

Ranks = Callable[..., Any]
NUM_RANKS = 2


class Adapter(nn.Module):
    """Two matrices and a count beside a Linear, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.base = base
        self.down = nn.Parameter(torch.randn(3, base.in_features, generator=generator) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 3, generator=generator) / 4)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return self.base(x) + x @ self.down.t() @ self.up.t()


def add_adapters(model: nn.Module) -> None:
    for block in model.blocks:
        block.up = Adapter(block.up)


def train_whole(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        for rank in range(NUM_RANKS):
            (model(**batch(step, rank)) / NUM_RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_in_one_process(*, in_group: bool = True, freezes_base: bool = False) -> dict[str, Tensor]:
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    train_whole(optimizer, model, range(2))
    known = set(model.parameters())
    model.requires_grad_(not freezes_base)
    add_adapters(model)
    added = [param for param in model.parameters() if param not in known]
    if in_group:
        optimizer.param_groups[0]["params"] += added
    else:
        optimizer.add_param_group({"params": added, "lr": 0.1})
    train_whole(optimizer, model, range(2, 5))
    return model.state_dict()


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items() if "num_" not in name)


ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-3}}


def train_with_engine(stage: int, freezes_base: bool) -> float:
    engine = zero.initialize(TinyModel(), settings(stage, optimizer=ADAMW))
    train_steps(engine, range(2))
    engine.module.requires_grad_(not freezes_base)  # as peft does
    add_adapters(engine.module)
    added = engine.shard_added()
    assert sorted(param.fqn for param in added) == [
        f"blocks.{block}.up.{name}" for block in (0, 1) for name in ("down", "up")
    ]
    train_steps(engine, range(2, 5))
    expected = trained_in_one_process(freezes_base=freezes_base)
    return worst(engine.consolidated_state_dict(rank=None), expected)


def train_by_hand() -> float:
    model = zero.shard(TinyModel(), build_mesh(dp=-1), stage=3, options=zero.ShardingOptions(small_numel=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)

    def train(steps: range) -> None:
        for step in steps:
            model(**batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(range(2))
    add_adapters(model)
    optimizer.add_param_group({"params": zero.shard_added(model), "lr": 0.1})
    train(range(2, 5))
    return worst(zero.consolidated_state_dict(model, rank=None), trained_in_one_process(in_group=False))


@pytest.mark.parametrize(("stage", "freezes_base"), [*((stage, False) for stage in range(4)), (1, True), (3, True)])
def test_adapters_added_between_steps_train_as_in_one_process(ranks: Ranks, stage: int, freezes_base: bool) -> None:
    assert max(ranks(NUM_RANKS, train_with_engine, stage, freezes_base)) < 1e-6


def test_and_in_a_loop_of_ones_own_in_a_group_of_theirs(ranks: Ranks) -> None:
    assert max(ranks(NUM_RANKS, train_by_hand)) < 1e-6


def refusals(stage: int) -> list[str]:
    engine = zero.initialize(TinyModel(), settings(stage))
    train_steps(engine, range(1))
    words = []
    kept = engine(**batch(1))
    engine.module.extra = nn.Linear(3, 5)
    words.append(refusal(lambda: engine(**batch(1))))
    if torch.distributed.get_rank() == 1:
        del engine.module.extra
        engine.module.extra = nn.Linear(3, 6)
    words.append(refusal(engine.shard_added))
    engine.module.extra = nn.Linear(3, 5)
    engine.shard_added()
    words.append(refusal(lambda: engine.backward(kept)))
    engine.backward(engine(**batch(1)))
    words.append(refusal(engine.shard_added))
    words.append(refusal(lambda: zero.shard_added(engine.module)))
    engine.step()
    engine.module.head = nn.Linear(8, 17)
    words.append(refusal(engine.shard_added))
    return words


@pytest.mark.parametrize("stage", [1, 3])
def test_what_cannot_be_taken_in_is_refused_and_forgotten_modules_are_named(ranks: Ranks, stage: int) -> None:
    expected = [
        "StateError: 2 parameters were added after the model was sharded, the first is extra.weight",
        "MismatchError: Ranks [1] do not build what rank 0 builds. The first difference: parameter.extra.weight is",
        "StateError: Parameters of",
        "StateError: Modules are sharded between optimizer steps",
        "StateError: Modules are sharded between optimizer steps",
        "LayoutError: head.bias was replaced after the model was sharded",
    ]
    for words in ranks(NUM_RANKS, refusals, stage):
        assert [found[: len(start)] for found, start in zip(words, expected, strict=True)] == expected


def meanwhile() -> tuple[float, float, bool]:
    """What evaluation has kept, what a recorder records, and buffers of old modules outlive it."""
    engine = zero.initialize(TinyModel(), settings(3))
    engine.explain_steps()
    train_steps(engine, range(2))
    engine.module.num_forwards += torch.distributed.get_rank()
    before = float(engine.module.num_forwards)
    engine.eval()
    with torch.no_grad():
        engine(**batch(0))
        first = engine(**batch(1))
    engine.module.unused = nn.Linear(40, 50)
    engine.shard_added()
    with torch.no_grad():
        again = engine(**batch(1))
    engine.train()
    train_steps(engine, range(2, 3))
    recorded = "h" in str(engine.explain_step())
    return float(engine.module.num_forwards) - before - 4, float(first - again), recorded


def test_nothing_else_changes(ranks: Ranks) -> None:
    assert ranks(NUM_RANKS, meanwhile) == [(0.0, 0.0, True)] * NUM_RANKS
