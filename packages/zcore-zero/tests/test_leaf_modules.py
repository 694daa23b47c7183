"""Leaf modules: ranks that use different parts of them neither wait for each other nor lose gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import refusal, settings
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import ConfigError
from zcore.zero.units import find_blocks

Ranks = Callable[..., Any]
NUM_EXPERTS = 3


class Experts(nn.Module):
    """One of several networks for each batch; the last one is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)) for _ in range(NUM_EXPERTS)
        )

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return x + self.experts[chosen](x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.mixture, self.outer = nn.Linear(12, 12), Experts(), nn.Linear(12, 12)

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.outer(self.mixture(torch.tanh(self.inner(x)), chosen)).square().mean()


def test_without_leaves_each_expert_is_a_block_and_with_them_all_are_one() -> None:
    model = Routed()
    assert list(find_blocks(model)) == [f"mixture.experts.{index}" for index in range(NUM_EXPERTS)]
    for wanted in ([Experts], ["Experts"], [f"{Experts.__module__}.Experts"]):
        model = Routed()
        assert zero.set_leaf_modules(model, wanted) == [model.mixture]
        assert list(find_blocks(model)) == ["mixture"]
    model = Routed()
    assert zero.set_leaf_modules(model, names=["mixture"], suffixes=["ture"]) == [model.mixture]
    assert list(find_blocks(model)) == ["mixture"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"classes": ["Expert"]}, "of the class 'Expert'"),
        ({"names": ["mixtur"]}, "of the name 'mixtur'"),
        ({"suffixes": ["x"]}, "of the name ending 'x'"),
    ],
)
def test_a_leaf_that_is_not_there_is_refused(wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        zero.set_leaf_modules(Routed(), **wanted)


def train_routed(leaf: dict[str, Any]) -> list[tuple[list[float], dict[str, Tensor], list[bool]]]:
    """At stage 0, where nothing is gathered, and at 3; each rank has experts of its own in every step."""
    seen = []
    for stage in (0, 3):
        model = Routed()
        engine = zero.initialize(
            model,
            settings(stage, zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 16, **leaf}),
        )
        losses = []
        for step in range(4):
            x = torch.randn(2, 12, generator=torch.Generator().manual_seed(10 * step + engine.dp_rank))
            loss = engine(x, chosen=(step + engine.dp_rank) % (NUM_EXPERTS - 1))
            engine.backward(loss)
            has_gradient = [param.grad is not None for param in model.mixture.experts[-1].parameters()]
            engine.step()
            losses.append(loss.item())
        seen.append((losses, engine.consolidated_state_dict(rank=None), has_gradient))
    return seen


LEAVES: list[dict[str, Any]] = [
    {"leaf_module": {"classes": ["Experts"]}},
    {"leaf_module": {"names": ["mixture"]}},
]


@pytest.mark.parametrize("leaf", LEAVES, ids=["class", "name"])
def test_experts_of_some_ranks_only_train_as_whole_ones_do(ranks: Ranks, leaf: dict[str, Any]) -> None:
    for whole, sharded in ranks(2, train_routed, leaf):
        assert sharded[0] == whole[0]
        assert {name: torch.equal(value, whole[1][name]) for name, value in sharded[1].items()} == dict.fromkeys(
            whole[1], True
        )
        assert whole[2] == sharded[2] == [False] * 4  # as in plain torch, what nobody uses has no gradient


def name_a_stranger() -> str:
    config = settings(3, zero_optimization={"stage": 3, "leaf_module": {"classes": ["MixtralSparseMoeBlock"]}})
    return refusal(lambda: zero.initialize(Routed(), config))


def test_a_leaf_of_the_config_that_is_not_there_is_refused_on_every_rank(ranks: Ranks) -> None:
    first, second = ranks(2, name_a_stranger)
    assert first == second
    assert "'MixtralSparseMoeBlock'" in first
