"""bf16 parameters without masters: each step is fp32's, rounded without bias, and the same bits in every row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from parity import Recipe, Run, bits_that_differ, by_row, train_rows
from tiny_models import TinyModel, batch, digest, refusal, settings, train_step, train_steps
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import ConfigError
from zcore.core.mesh import build_mesh
from zcore.zero.optimizers.rounding import noise_for, round_stochastically

Ranks = Callable[..., Any]
WITHOUT_MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}
ALL_BF16 = {**WITHOUT_MASTERS, "bf16_optimizer_states": True}
EVERY_NOISE = torch.arange(1 << 16, dtype=torch.int32)


@hypothesis.given(st.floats(width=32, allow_nan=False))
def test_over_all_noise_a_number_becomes_its_neighbours_as_often_as_it_lies_near(number: float) -> None:
    value = torch.tensor(number, dtype=torch.float32)
    rounded = round_stochastically(value.expand(1 << 16).contiguous(), EVERY_NOISE).double()
    low, high = rounded.min(), rounded.max()
    assert low <= value.double() <= high
    toward_zero = (value.view(torch.int32) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    away = (toward_zero.view(torch.int16) + 1).view(torch.bfloat16)
    assert set(rounded.tolist()) <= {float(toward_zero), float(away)}
    if torch.isfinite(rounded).all():  # else the largest numbers, above which bf16 has none
        assert float(rounded.mean()) == pytest.approx(number, rel=1e-12, abs=0)


@hypothesis.given(st.floats(width=16, allow_nan=False).map(lambda x: torch.tensor(x).to(torch.bfloat16)))
def test_what_bf16_holds_stays_as_it_is(value: Tensor) -> None:
    rounded = round_stochastically(value.float().expand(1 << 16).contiguous(), EVERY_NOISE)
    assert (rounded == value).all()


def test_not_a_number_stays_one() -> None:
    assert round_stochastically(torch.full((1 << 16,), float("nan")), EVERY_NOISE).isnan().all()


def steps_by_hand(optimizer: str) -> list[str]:
    """Names of parameters that one step leaves elsewhere than fp32's step on the same numbers, rounded."""
    torch.manual_seed(0)
    config = settings(1, bf16=WITHOUT_MASTERS, optimizer={"type": optimizer, "params": {"lr": 0.01}})
    engine = zero.initialize(TinyModel(), config)
    wrong = []
    states: dict[str, dict[str, Any]] = {}
    for step in range(3):
        engine.backward(engine(**batch(step)))
        before = {name: part.detach().as_subclass(Tensor).clone() for name, part in engine.sharding.fragments.items()}
        grads = {name: part.grad.as_subclass(Tensor).clone() for name, part in engine.sharding.fragments.items()}
        engine.step()
        for bucket in engine.sharding.buckets:
            noise = noise_for(bucket, step=step, column=0)
            for param in bucket.params:
                name, place = param.shard.fqn, param.fragment
                own = nn.Parameter(before[name].float())
                own.grad = grads[name].float()
                plain = getattr(torch.optim, optimizer)([own], lr=0.01, fused=True)
                plain.state[own] = states.get(name, {})
                plain.step()
                states[name] = plain.state[own]
                expected = round_stochastically(own.detach(), noise[place.offset : place.offset + place.numel])
                if not torch.equal(engine.sharding.masters[name], expected):
                    wrong.append(f"{name} in step {step}")
    return wrong


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_step_is_that_of_fp32_rounded(ranks: Ranks, optimizer: str) -> None:
    assert ranks(2, steps_by_hand, optimizer) == [[], []]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_every_row_comes_to_the_same_bits(ranks: Ranks, world_size: int) -> None:
    recipes = [
        Recipe(model, steps=4, compute=torch.bfloat16, masters=False, states=states, optimizer=optimizer, clip=0.5)
        for model, optimizer, states in (
            ("gpt", "AdamW", None),
            ("odd", "AdamW", torch.bfloat16),
            ("gpt", "Muon", torch.bfloat16),
        )
    ]
    recipes[2] = Recipe(**{**vars(recipes[2]), "hyper": (("lr", 1e-2), ("muon_lr", 1e-2))})
    rows = [{"stage": stage} for stage in range(4)]
    if world_size == 4:
        rows = [rows[0], rows[3], {"stage": 3, "shard_size": 2}]
    runs: list[Run] = by_row(ranks(world_size, train_rows, [(recipe, row) for recipe in recipes for row in rows]))
    for index in range(len(recipes)):
        of_recipe = runs[len(rows) * index : len(rows) * (index + 1)]
        assert [bits_that_differ(run, of_recipe[0]) for run in of_recipe] == [[] for _ in rows]


def learn(steps: int) -> dict[str, float]:
    """How far from its goal a vector of ones comes to rest by steps of a five-hundredth, in four precisions."""
    goal = 1.05 + torch.linspace(0, 0.02, 4096)

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.ones(4096))

        def forward(self) -> Tensor:
            return (self.values.float() - goal).square().sum() / 2

    def distance(precision: zero.Precision) -> float:
        model = zero.shard(Vector(), build_mesh(dp=-1), options=zero.ShardingOptions(precision=precision))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(steps):
            model().backward()
            if precision.masters:
                optimizer.step()
            else:
                zero.rounded_step(model, optimizer, step=step)
            optimizer.zero_grad()
        whole = zero.consolidated_state_dict(model, rank=None)["values"].float()
        return float((whole.mean() - goal.mean()).abs())

    plain = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    nearest = torch.optim.SGD([plain], lr=0.02)
    for _ in range(steps):
        plain.grad = (plain.detach().float() - goal).to(torch.bfloat16)
        nearest.step()
    return {
        "with masters": distance(zero.Precision(torch.bfloat16)),
        "without": distance(zero.Precision(torch.bfloat16, masters=False)),
        "rounded to the nearest": float((plain.detach().float().mean() - goal.mean()).abs()),
    }


def test_small_steps_are_kept_on_average(ranks: Ranks) -> None:
    """Steps of 0.001 are an eighth of what bf16 can tell from 1, and every one is lost when rounded to the nearest."""
    (found, _) = ranks(2, learn, 200)
    assert found["rounded to the nearest"] == pytest.approx(0.06, abs=0.001)
    assert found["with masters"] < 0.002
    assert found["without"] < 0.003  # what bf16 gradients and 4,096 roundings leave


def continues(folder: Path) -> bool:
    config = settings(3, bf16=ALL_BF16)
    engine = zero.initialize(TinyModel(), config)
    train_steps(engine, range(3))
    engine.save_checkpoint(folder)
    train_steps(engine, range(3, 6))
    again = zero.initialize(TinyModel(seed=1), config)
    again.load_checkpoint(folder)
    train_steps(again, range(3, 6))
    return digest(engine) == digest(again)


def test_a_run_continues_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, continues, tmp_path) == [True, True]


def memory_of(bf16: dict[str, Any], stage: int) -> tuple[int, int, int]:
    engine = zero.initialize(TinyModel(num_blocks=3), settings(stage, bf16=bf16))
    train_step(engine, 0)
    fragments = engine.sharding.fragments.values()
    assert engine.optimizer is not None
    states = sum(
        value.numel() * value.element_size()
        for fragment in fragments
        for key, value in engine.optimizer.state[fragment].items()
        if key != "step"
    )
    numel = sum(fragment.full_stop - fragment.full_start for fragment in fragments)
    return numel, sum(part.memory.resting_bytes[1] for part in engine.sharding.buckets), states


@pytest.mark.parametrize("stage", [1, 3])
def test_no_master_lives_between_steps_and_states_are_as_small_as_asked(ranks: Ranks, stage: int) -> None:
    for numel, masters, states in ranks(2, memory_of, WITHOUT_MASTERS, stage):
        assert (masters, states) == (0, 8 * numel)
    for numel, masters, states in ranks(2, memory_of, ALL_BF16, stage):
        assert (masters, states) == (0, 4 * numel)


def refused_step() -> str:
    precision = zero.Precision(torch.bfloat16, masters=False)
    model = zero.shard(TinyModel(), build_mesh(dp=-1), options=zero.ShardingOptions(precision=precision))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch(0)).backward()
    return refusal(optimizer.step)


def test_an_optimizer_that_would_lose_small_steps_is_refused(ranks: Ranks) -> None:
    for words in ranks(2, refused_step):
        assert words.startswith("StateError: SGD steps embed.weight, which is bf16 without a master")
        assert "zero.rounded_step" in words


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"enabled": True, "bf16_optimizer_states": True}, "bf16_master_weights_and_grads"),
        ({"bf16_master_weights_and_grads": True}, '"enabled": true'),
    ],
)
def test_half_a_section_is_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        zero.TrainingConfig.read({"bf16": section})


def test_no_masters_in_other_precisions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not torch\.float16"):
        zero.Precision(torch.float16, masters=False)
    with pytest.raises(ConfigError, match="with masters"):
        zero.Precision(torch.bfloat16, states=torch.bfloat16)
