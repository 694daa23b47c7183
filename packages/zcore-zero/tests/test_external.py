"""A weight of another module that was registered is whole while its user runs, as if it were its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import relative
from tiny_models import Product, refusal
from torch import Tensor, nn

from zcore import zero
from zcore.core.mesh import build_mesh

Ranks = Callable[..., Any]
OPTIONS = zero.ShardingOptions(small_numel=0)


class User(nn.Module):
    """Gives a weight that it does not own to a function of its own, which a fragment refuses."""

    def __init__(self, owner: nn.Linear) -> None:
        super().__init__()
        self.owner = [owner]  # not a submodule

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.owner[0].weight)


class Model(nn.Module):
    def __init__(self, *, registers: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.owner, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.user = User(self.owner)
        if registers:
            zero.register_external_parameter(self.user, self.owner.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.user(x)) + self.owner(x)).square().mean()


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def train(when: str) -> dict[str, Tensor]:
    model = Model(registers=when == "before")
    zero.shard(model, build_mesh(dp=-1), stage=3, options=OPTIONS)
    if when == "after":
        zero.register_external_parameter(model.user, model.owner.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        if when == "added" and step == 2:
            zero.register_external_parameter(model.user, model.owner.weight)
            model.unused = nn.Linear(2, 2)
            zero.shard_added(model)
            del model.unused
        if when == "added" and step < 2:
            view = model.owner.weight
            assert "view_as" in refusal(lambda: model(batch(0, 0)))
            assert view is model.owner.weight
            continue
        model(batch(step, torch.distributed.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return zero.consolidated_state_dict(model, rank=None)


def plain(steps: range) -> dict[str, Tensor]:
    model = Model(registers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        for rank in range(2):
            (model(batch(step, rank)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(("when", "steps"), [("before", range(4)), ("after", range(4)), ("added", range(2, 4))])
def test_a_registered_weight_is_whole_for_its_user(ranks: Ranks, when: str, steps: range) -> None:
    expected = plain(steps)
    for found in ranks(2, train, when):
        assert max(relative(found[name], value) for name, value in expected.items()) < 1e-6


def refusals() -> list[str]:
    model = Model(registers=False)
    before = model.owner.weight
    words = [refusal(lambda: zero.register_external_parameter(model.user, torch.ones(3)))]
    zero.shard(model, build_mesh(dp=-1), stage=3, options=OPTIONS)
    words.append(refusal(lambda: zero.register_external_parameter(model.user, before)))
    return words


def test_what_is_no_parameter_or_was_replaced_is_refused(ranks: Ranks) -> None:
    for no_parameter, replaced in ranks(2, refusals):
        assert no_parameter.startswith("StateError: register_external_parameter got a Tensor")
        assert replaced.startswith("StateError: owner.weight is given as it was before sharding")
