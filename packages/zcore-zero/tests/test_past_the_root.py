"""Modules that are not simply called by their root in its own mode: results are those of plain torch all the same."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core.mesh import build_mesh

Ranks = Callable[..., Any]
WIDTH, STEPS = 24, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Gate(nn.Module):
    """Passes on what it gets, as a layer that is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Gated(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) * 2
        self.gate(hidden).add_(1)  # into `hidden`
        return x + self.down(hidden)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # torch has *grads
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Looking(nn.Module):
    """Looks at its weight as a whole in its forward, and hands it to a function of the user's after that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
        self.norms: list[float] = []
        self.is_sharded = False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_sharded:
            with zero.GatheredParameters([self.weight]):
                self.norms.append(self.weight.norm().item())
        return x + Product.apply(x, self.weight)


class Force(nn.Module):
    """A derivative under `enable_grad` in a forward without autograd, through weights of modules it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        point = x.detach().requires_grad_()
        energy = torch.tanh(torch.tanh(point @ self.one.weight) @ self.two.weight) * self.scale.sum()
        with torch.no_grad():
            x = self.three(x)
        (force,) = torch.autograd.grad(energy.square().sum(), point)
        return x + force


class Energies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.force = nn.LayerNorm(4), Force()
        self.more = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x[:, :4]).sum()
        with torch.enable_grad():
            x = self.force(x)
        for layer in self.more:
            x = layer(x)
        return x


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "blocks": lambda: nn.Sequential(Block(), Block()),
    "gates in checkpoints": lambda: nn.Sequential(Recomputed(), Recomputed()),
    "weights that are looked at": lambda: nn.Sequential(Looking(), Looking()),
}
ROWS: list[dict[str, int]] = [
    {"stage": 0, "small_numel": 0},
    {"stage": 1, "small_numel": 0},
    {"stage": 3, "small_numel": 0},
    {"stage": 3, "small_numel": 10_000},  # all stays whole
]


def sharded(model: nn.Module, *, stage: int, small_numel: int) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Looking):
            module.is_sharded = True
    return zero.shard(model, build_mesh(dp=-1), stage=stage, options=zero.ShardingOptions(small_numel=small_numel))


def train(name: str, row: dict[str, int] | None, *, looks: bool, is_late: bool) -> list[float]:
    """looks: a module is called by itself before each step; is_late: the optimizer is built after the first call."""
    torch.manual_seed(0)
    model = BUILDS[name]()
    if row is not None:
        sharded(model, **row)
    optimizer = None if is_late else torch.optim.SGD(model.parameters(), lr=0.05)
    x, losses = torch.ones(2, WIDTH), []
    for _ in range(STEPS):
        if looks:
            with torch.no_grad():
                next(each for each in model.modules() if isinstance(each, nn.Linear))(x)
        if optimizer is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


WAYS = {
    "called by its root": ("blocks", False, False),
    "called by itself": ("blocks", True, False),
    "called by itself, and the optimizer is built after that": ("blocks", True, True),
    "passes its input through in a checkpoint": ("gates in checkpoints", False, False),
    "looks at its whole weight in its forward": ("weights that are looked at", False, False),
}


def rows_of(way: str) -> list[dict[str, int]]:
    """Under stage 3 what passes through a module that is freed comes out as a copy (see results.py)."""
    passes = "passes its input through" in way
    return [row for row in ROWS if not passes or row["stage"] < 3 or row["small_numel"]]


def train_all(way: str) -> list[list[float]]:
    name, looks, is_late = WAYS[way]
    return [train(name, row, looks=looks, is_late=is_late) for row in rows_of(way)]


@pytest.mark.parametrize("way", WAYS)
def test_a_module_trains_as_in_plain_torch_that_is(ranks: Ranks, way: str) -> None:
    name, looks, is_late = WAYS[way]
    expected = train(name, None, looks=looks, is_late=is_late)
    assert expected[-1] < 0.9 * expected[0]
    for of_rank in ranks(2, train_all, way):
        for row, losses in zip(rows_of(way), of_rank, strict=True):
            assert losses == pytest.approx(expected, rel=1e-5), row


def call_a_layer(row: dict[str, int] | None) -> tuple[list[float], set[str]]:
    """A layer inside a block is called with and without the block, failing once: results, and what is left shown."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    if row is not None:
        sharded(model, **row)
    layer = next(each for each in model[0].modules() if isinstance(each, nn.Linear))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, found, shown = torch.ones(2, WIDTH), [], set()
    for _ in range(STEPS):
        with pytest.raises(RuntimeError, match="shapes"):
            layer(x[:, 1:])
        shown.add(type(layer.weight).__name__)
        model.zero_grad()
        (model(layer(x)).square().mean() + layer(x).square().mean()).backward()
        optimizer.step()
        with torch.no_grad():
            found.append(layer(x).sum().item())
        shown.add(type(layer.weight).__name__)
    return found, shown


def call_layers() -> list[tuple[list[float], set[str]]]:
    return [call_a_layer(row) for row in ROWS]


def test_a_layer_is_called_with_and_without_its_block(ranks: Ranks) -> None:
    expected, _ = call_a_layer(None)
    for of_rank in ranks(2, call_layers):
        for row, (found, shown) in zip(ROWS, of_rank, strict=True):
            assert found == pytest.approx(expected, rel=1e-5), row
            assert shown == {"ShardedParameter"}, row


class Weighing(Block):
    """Has a hook of its user's own, by which a layer returns its weight beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_hook(lambda layer, _args, result: (result, layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        hidden, weight = self.up(x)
        return x + self.down(torch.tanh(hidden)) + torch.tanh(x) @ weight


def train_under_hooks(stage: int | None) -> tuple[list[list[float]], list[int]]:
    """Losses plainly, under hooks that keep what is saved as it is, and with a hook on a layer; hooks at their ends."""
    found, counts = [], []
    for build, keeps in ((Block, False), (Block, True), (Weighing, False)):
        torch.manual_seed(0)
        model = nn.Sequential(build(), build())
        if stage is not None:
            sharded(model, stage=stage, small_numel=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(STEPS):
            model.zero_grad()
            kept = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
            with kept if keeps else contextlib.nullcontext():
                loss = model(torch.ones(2, WIDTH)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        counts.append(sum(len(layer._forward_hooks) for layer in layers))
    return found, counts


@pytest.mark.parametrize("stage", [2, 3])
def test_a_layer_of_torch_has_a_hook_at_its_end_where_others_may_keep_its_weight(ranks: Ranks, stage: int) -> None:
    expected, (_, _, of_user) = train_under_hooks(None)
    for found, counts in ranks(2, train_under_hooks, stage):
        for losses, plain in zip(found, expected, strict=True):
            assert losses == pytest.approx(plain, rel=1e-5)
        assert counts == ([0, 4, of_user + 2] if stage == 3 else [0, 0, of_user])


def take_forces() -> list[list[float]]:
    found = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        model = Energies()
        if is_sharded:
            options = zero.ShardingOptions(small_numel=30, bucket_numel=700)
            zero.shard(model, build_mesh(dp=-1), stage=3, options=options)
        with torch.no_grad():
            found.append([model(torch.ones(2, WIDTH)).sum().item() for _ in range(3)])
    return found


def test_a_derivative_in_a_forward_without_autograd_reads_weights_that_are_there(ranks: Ranks) -> None:
    for plain, of_shards in ranks(2, take_forces):
        assert of_shards == pytest.approx(plain, rel=1e-6)


def outputs_of_8_bits() -> list[Tensor]:
    """Of a frozen weight of fp8 beside its scale, before and after sharding under bf16."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter((torch.randn(WIDTH, WIDTH) * 100).to(torch.float8_e4m3fn), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(0.01), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            assert self.weight.element_size() == 1
            return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype))

    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(), nn.Linear(WIDTH, 1)).bfloat16(), torch.ones(2, WIDTH).bfloat16()
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    before = model(x)
    engine = zero.initialize(
        model, {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    )
    return [before.detach(), engine(x).detach()]


def test_floats_of_one_byte_are_never_cast(ranks: Ranks) -> None:
    for before, after in ranks(2, outputs_of_8_bits):
        torch.testing.assert_close(after, before, rtol=1e-2, atol=0)


class Differentiated(torch.autograd.Function):
    """A module's graph is built in the forward and differentiated in the backward, inside of the outer one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.result = module(ctx.x)
        return ctx.result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        torch.autograd.backward(ctx.result, grad)
        return ctx.x.grad, None


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = Block(), Block(), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(Differentiated.apply(self.before(x), self.inner)).square().mean()


def train_around(stage: int) -> list[list[float]]:
    """Losses of plain torch, and sharded."""
    found = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        model: nn.Module = Around()
        if is_sharded:
            zero.shard(model, build_mesh(dp=-1), stage=stage, options=zero.ShardingOptions(small_numel=30))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(STEPS):
            loss = model(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_graph_inside_a_function_is_differentiated_in_its_backward(ranks: Ranks, stage: int) -> None:
    for plain, sharded in ranks(2, train_around, stage):
        assert sharded == pytest.approx(plain, rel=1e-5)
