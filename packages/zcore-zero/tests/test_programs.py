"""Programs as people write them: each trains under stages 1 and 3 as the same program does in one process.

Modules that use weights which are not their own, run twice or not at all; losses that do not come straight from one
forward; several backward passes to a step. All of them run in one start of the ranks per stage, and each is one test.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import relative
from tiny_models import Product
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core.mesh import build_mesh

Ranks = Callable[..., Any]
Losses = Iterator[Tensor]  # each is followed by a backward of its own


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Recurrent(nn.Module):
    """`nn.LSTM` keeps a list of its weights beside its parameters; the cell is called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(8, 8, batch_first=True), nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1]
        return self.cell(x, self.cell(x, hidden))


class Listed(nn.Module):
    """Parameters in containers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(2)])
        self.named = nn.ParameterDict({"last": torch.randn(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.listed:
            x = torch.tanh(x @ weight)
        return x @ self.named["last"]


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.normed(x))


class Borrowing(nn.Module):
    """Weights of modules that are not called, by functions of torch and of the user."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.layer, self.other = nn.Linear(8, 8), Layer(), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(functional.linear(x, self.lent.weight.t()))
        other = self.other.weight.view_as(self.other.weight)
        return Product.apply(x, other) @ self.lent.weight + self.lent.bias


class Keeping(nn.Module):
    """References to weights of modules that have run, and will run, kept while others are gathered and released."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(8, 8), nn.ModuleList(Layer() for _ in range(3)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        later = self.head.weight
        x = self.stem(x)
        kept = [self.stem.weight, self.stem.bias]
        for layer in self.layers:
            x = layer(x)
            kept.append(layer.up.weight)
        x = functional.linear(self.head(x), later)
        return functional.linear(x, kept[0], kept[1]) + sum(weight.square().sum() for weight in kept[2:])


class Blocks(nn.Module):
    """Blocks, one of them in two places."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        first = Layer()
        self.recompute = recompute
        self.layers = nn.ModuleList([first, Layer(), first])

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "reentrant":
            x.requires_grad_()
        for layer in self.layers:
            if self.recompute:
                x = x + checkpoint(layer, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = x + layer(x)
        return x


class Branches(nn.Module):
    """Two branches, in containers as outputs come."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.branches = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> dict[str, Any]:
        stem = self.stem(x)
        return {"first": [self.branches[0](stem)], "second": (self.branches[1](x), None)}


def one_loss(model: nn.Module, x: Tensor) -> Losses:
    yield (model(x) - 1).square().mean()


def loss_of_both_branches(model: nn.Module, x: Tensor) -> Losses:
    result = model(x)
    yield (result["first"][0] * result["second"][0] - 1).square().mean()


def loss_of_one_branch(model: nn.Module, x: Tensor) -> Losses:
    yield (model(x)["second"][0] - 1).square().mean()


def loss_of_two_forwards(model: nn.Module, x: Tensor) -> Losses:
    yield (model(x) - model(-2 * x) - 1).square().mean()


def loss_beside_a_forward_without_gradient(model: nn.Module, x: Tensor) -> Losses:
    result = model(x)
    with torch.no_grad():
        target = model(x + 1)
    yield (result - target - 1).square().mean()


def a_backward_per_branch(model: nn.Module, x: Tensor) -> Losses:
    yield (model(x)["first"][0] - 1).square().mean()
    yield (model(x)["second"][0] - 1).square().mean()


def two_backwards_of_one_forward(model: nn.Module, x: Tensor) -> Losses:
    result = model(x)
    yield result.square().mean()
    yield (result - 1).square().mean()


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Losses]]] = {
    "recurrent": (Recurrent, one_loss),
    "parameter lists": (Listed, one_loss),
    "weight norm": (Parametrized, one_loss),
    "borrowed weights": (Borrowing, one_loss),
    "references kept between modules": (Keeping, one_loss),
    "a block in two places": (Blocks, one_loss),
    "checkpointed": (lambda: Blocks("not reentrant"), one_loss),
    "checkpointed reentrantly": (lambda: Blocks("reentrant"), one_loss),
    "two branches": (Branches, loss_of_both_branches),
    "one branch of two": (Branches, loss_of_one_branch),
    "two forwards": (Blocks, loss_of_two_forwards),
    "a forward without gradient between": (Blocks, loss_beside_a_forward_without_gradient),
    "a backward per branch": (Branches, a_backward_per_branch),
    "two backwards of one forward": (Blocks, two_backwards_of_one_forward),
}


def train(name: str, model: nn.Module, parameters: Iterator[nn.Parameter], *, batches: list[list[Tensor]]) -> None:
    """The loop of torch; gradients are the mean over the parts of a batch."""
    _, program = PROGRAMS[name]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for parts in batches:
        optimizer.zero_grad()
        for part in parts:
            for loss in program(model, part.clone()):
                (loss / len(parts)).backward(retain_graph=name == "two backwards of one forward")
        optimizer.step()


def train_all(stage: int) -> dict[str, dict[str, float]]:
    """By program, the parameters that are not what one process makes of them."""
    rank, mesh = dist.get_rank(), build_mesh(dp=-1)
    batches = [torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).chunk(2) for step in range(3)]
    wrong: dict[str, dict[str, float]] = {}
    for name, (build, _) in PROGRAMS.items():
        torch.manual_seed(0)
        model = build()
        plain = copy.deepcopy(model)
        zero.shard(model, mesh, stage=stage, options=zero.ShardingOptions(small_numel=12))
        train(name, model, model.parameters(), batches=[[parts[rank]] for parts in batches])
        train(name, plain, plain.parameters(), batches=[list(parts) for parts in batches])
        found = zero.consolidated_state_dict(model, rank=None)
        different = {key: relative(found[key], value.detach()) for key, value in plain.named_parameters()}
        wrong[name] = {key: value for key, value in different.items() if value > 1e-6}
    return wrong


@pytest.fixture(scope="module", params=[1, 3], ids="stage {}".format)
def wrong(request: pytest.FixtureRequest, ranks: Ranks) -> dict[str, dict[str, float]]:
    """What `train_all` found, the same on every rank."""
    first, second = ranks(2, train_all, request.param)
    assert first == second
    found: dict[str, dict[str, float]] = first
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_trains_as_it_does_in_one_process(wrong: dict[str, dict[str, float]], name: str) -> None:
    assert wrong[name] == {}
