"""torch.compile sees the modules of a sharded model, and nothing of what sharding hooks into them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.zero.sharding import ShardingOptions

Ranks = Callable[..., Any]
WIDTH, STEPS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).chunk(3, dim=-1)
        return self.out(torch.softmax(queries @ keys.mT, dim=-1) @ values)


class Layer(nn.Module):
    """What a block is: modules that own parameters, modules in modules, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x) * self.scale


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


class InContainers(nn.Module):
    """Parts that are called one by one, in blocks that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "attention": Attention()}) for _ in range(3)]
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["attention"](layer["norm"](x))
        return self.head(x).square().mean()


class Graphs:
    """A backend that counts the operations of each graph it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.sizes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = model(torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compiled(
    way: str, prepare: Callable[[nn.Module], nn.Module], *, evaluates: bool = False
) -> tuple[list[float], list[int]]:
    """evaluates: without the compiler, before."""
    torch.compiler.reset()
    torch.manual_seed(0)
    graphs = Graphs()
    model: nn.Module = InContainers() if way == "in containers" else Layers()
    if way == "replaced":
        model.layers = nn.ModuleList([torch.compile(layer, backend=graphs) for layer in model.layers])
    model = prepare(model)
    if evaluates:
        with torch.no_grad():
            model(torch.ones(2, 5, WIDTH))
    if way == "in place":
        for layer in model.layers:
            layer.compile(backend=graphs)
    elif way in ("whole", "in containers"):
        model.compile(backend=graphs)
    return train(model), graphs.sizes


def train_compiled() -> list[tuple[str, int, list[float], list[int], list[float], list[int]]]:
    """Of each way and stage: losses and sizes of graphs of plain torch, and of the sharded model."""
    found = []
    for way, stages in (("in place", (0, 2, 3)), ("replaced", (3,)), ("whole", (3,)), ("in containers", (3,))):
        plain = compiled(way, lambda model: model)
        for stage in stages:
            shard = partial(zero.shard, mesh=build_mesh(dp=-1), stage=stage, options=ShardingOptions(small_numel=16))
            found.append((way, stage, *plain, *compiled(way, shard, evaluates=stage == 2)))
    return found


def test_blocks_are_compiled_as_in_plain_torch(ranks: Ranks) -> None:
    """One test for all of it: the compiler takes seconds to load."""
    for of_rank in ranks(2, train_compiled):
        for way, stage, expected, plain_graphs, losses, graphs in of_rank:
            assert losses == pytest.approx(expected, rel=1e-5), (way, stage)
            if way == "in containers":
                continue
            of_blocks = [17, 17]  # one for inputs without a gradient, one for those with
            assert plain_graphs == (of_blocks if way != "whole" else [54])
            # What sharding does between blocks cuts a whole model into them, and into single operations.
            assert [size for size in graphs if size > 1] == of_blocks, (way, stage)
