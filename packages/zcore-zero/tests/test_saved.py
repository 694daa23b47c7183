"""Weights that a backward reads where no module says so, under stage 3: equal to plain torch; and nothing is kept."""

import contextlib
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import Product
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core.errors import StateError, ZcoreError
from zcore.core.mesh import build_mesh

WIDTH = 24
# Small enough that weights of a module lie in several buckets where no block is recognised.
OPTIONS = zero.ShardingOptions(small_numel=12, bucket_numel=700)


@dataclass(slots=True)
class Result:
    hidden: Tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH, WIDTH), 0.2))
        self.losses: list[Tensor] = []
        self.is_late = False  # from the third step on, when gathers are started ahead

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class LossInAList(Layer):
    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x) + self.scale.sum() * 1e-3
        self.losses[:] = [(x[:1].t() * self.scale * x[:1]).square().mean()] if self.is_late else []
        return result


class SlottedResult(Layer):
    def forward(self, x: Tensor) -> Result:
        return Result((super().forward(x) @ self.scale) @ self.up.weight)


class FrozenInAProduct(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.scale.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ (self.scale * self.up.weight.exp()) * 0.1


class PrefixThroughFrozen(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(4, WIDTH))
        self.up.requires_grad_(False)
        self.down.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        prefix = torch.tanh(self.prefix @ self.up.weight) @ self.down.weight
        return x + torch.tanh(x @ prefix.t()) @ prefix


class InnerTakenOut(Layer):
    """The loss is computed from what a module inside of the block returns, past the block's own result."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        self.losses[:] = [hidden.square().mean()]
        return x + self.down(hidden.detach())


class InnerTakenOutUnderHooks(InnerTakenOut):
    """The same where the user's hooks keep what autograd saves, views of weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return super().forward(x)


class Offloaded(nn.Module):
    """Keeps what autograd saves in a way of its own, as an offload of activations does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return torch.tanh(x @ self.weight) @ self.weight.t()


class OffloadedTakenOut(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.up = Offloaded()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x.detach())  # so that no gradient comes to it by way of later blocks
        self.losses[:] = [hidden.square().mean()]
        return x.detach() + self.down(hidden.detach())


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH, WIDTH), 0.2))

    def forward(self) -> Tensor:
        return self.weight


class InnerWeightTakenOut(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.own = Scale()

    def forward(self, x: Tensor) -> Tensor:
        self.losses[:] = [self.own().square().mean()]
        return super().forward(x)


class OwnWeightReturned(Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.scale[:2]


class Borrowing(Layer):
    """Hands the weight of a module that it does not call to a function of its own."""

    as_view = True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.down.weight
        return Product.apply(self.up(x), weight.view_as(weight) if self.as_view else weight)


class Stack(nn.Module):
    def __init__(self, kind: type[Layer], *, recompute: bool = False, regularise: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.recompute, self.regularise = recompute, regularise

    def forward(self, x: Tensor) -> Tensor:
        loss = x.new_zeros(())
        returned: list[Tensor] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            result = checkpoint(layer, x, use_reentrant=True) if self.recompute else layer(x)
            if isinstance(result, tuple):
                result, weight = result
                returned.append(weight)
            x = result.hidden if isinstance(result, Result) else result
            if self.regularise and layer.is_late:
                loss = loss + 1e-3 * layer.up.weight.pow(2).sum()
        for layer in self.layers:
            assert isinstance(layer, Layer)
            loss = loss + sum(layer.losses)
        return loss + x.square().mean() + sum((weight.square().mean() for weight in returned), x.new_zeros(()))


@dataclass(frozen=True)
class Program:
    build: Callable[[], nn.Module]
    input_has_gradient: bool = False


class Stashing(torch.autograd.Function):
    """Holds the weight by itself, and not as torch saves tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x, weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad @ ctx.weight, grad.t() @ ctx.x


class Stashes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Stashing.apply(x, self.weight)


class PassedOn(nn.Module):
    """Has a weight, and returns what its last part returns; there is no block, so each has a bucket of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.first, self.second = Stashes(WIDTH, WIDTH), Stashes(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x * self.scale)))


class PassedOnTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), PassedOn()
        self.scale = nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x) * self.scale).square().mean()


class Shared(nn.Module):
    """One layer, three times through a reentrant checkpoint, and a weight used there and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(self.layers[0], x, use_reentrant=True)
        return self.head(x).square().mean()


class Force(nn.Module):
    """Takes a derivative inside its forward, and goes on with its weights after that."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.layers[0](point).square().sum(), point)
        return self.layers[1](self.layers[0](x) + force).square().mean()


PROGRAMS = {
    "one layer in reentrant checkpoints": Program(Shared, input_has_gradient=True),
    "a derivative inside the forward": Program(Force),
    "a regulariser beside the modules": Program(lambda: Stack(Layer, regularise=True)),
    "a loss in a list": Program(lambda: Stack(LossInAList)),
    "a result with slots": Program(lambda: Stack(SlottedResult)),
    "frozen inside a product": Program(lambda: Stack(FrozenInAProduct), input_has_gradient=True),
    "frozen inside a product, recomputed": Program(lambda: Stack(FrozenInAProduct, recompute=True), True),
    "a prefix through frozen layers": Program(lambda: Stack(PrefixThroughFrozen), input_has_gradient=True),
    "a prefix through frozen layers, recomputed": Program(lambda: Stack(PrefixThroughFrozen, recompute=True), True),
    "an inner result taken out": Program(lambda: Stack(InnerTakenOut)),
    "an inner result taken out, under hooks": Program(lambda: Stack(InnerTakenOutUnderHooks)),
    "an inner result that was offloaded, taken out": Program(lambda: Stack(OffloadedTakenOut)),
    "an inner weight taken out": Program(lambda: Stack(InnerWeightTakenOut)),
    "a module that returns its weight": Program(lambda: Stack(OwnWeightReturned)),
    "a borrowed weight in a function of the user's": Program(lambda: Stack(Borrowing)),
    "weights held by functions, below who returns their results": Program(PassedOnTwice),
}


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def losses_of(program: Program, *, is_sharded: bool) -> list[float]:
    torch.manual_seed(0)
    model = program.build()
    if is_sharded:
        zero.shard(model, build_mesh(dp=-1), stage=3, options=OPTIONS)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.02)
    losses = []
    for step in range(5):
        for layer in model.layers:
            assert isinstance(layer, Layer)
            layer.is_late = step >= 2
        loss = model(batch(step).requires_grad_(program.input_has_gradient))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_all() -> dict[str, list[float]]:
    return {name: losses_of(program, is_sharded=True) for name, program in PROGRAMS.items()}


@pytest.fixture(scope="module")
def losses(ranks) -> list[dict[str, list[float]]]:
    return ranks(2, run_all)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_backward_reads_is_there(losses, name):
    expected = losses_of(PROGRAMS[name], is_sharded=False)
    for by_name in losses:
        assert by_name[name] == pytest.approx(expected, rel=1e-6)


class Listening(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def warnings_of_all() -> list[str]:
    listening = Listening()
    logging.getLogger("zcore").addHandler(listening)
    for name, program in PROGRAMS.items():
        if "loss in a list" not in name and "regulariser" not in name:  # these do change their order, once
            losses_of(program, is_sharded=True)
    return listening.heard


def test_steps_that_are_alike_are_not_said_to_change_their_order(ranks):
    assert ranks(2, warnings_of_all) == [[], []]


def read_after_a_failed_backward() -> list[str]:
    model = zero.shard(Stack(Layer), build_mesh(dp=-1), stage=3, options=OPTIONS)
    nodes: list[Any] = []

    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    def hook(module: nn.Module, args: object, result: Tensor) -> None:
        nodes.append(result.grad_fn)
        result.register_hook(fail)

    model.layers[1].up.register_forward_hook(hook)
    loss = model(batch(0))
    with contextlib.suppress(ArithmeticError):
        loss.backward()
    told = []
    for _ in range(3):
        with pytest.raises(StateError) as refused:
            nodes[0]._saved_mat2  # noqa: B018  # the weight
        told.append(str(refused.value))
    return told


def test_a_saved_weight_is_refused_outside_of_a_backward_after_one_that_failed_too(ranks):
    for told in ranks(2, read_after_a_failed_backward):
        assert all("outside of a backward" in each for each in told)


def evaluate_a_returned_weight() -> float:
    torch.manual_seed(0)
    model = zero.shard(Stack(OwnWeightReturned), build_mesh(dp=-1), stage=3, options=OPTIONS)
    with torch.no_grad():
        return float(model(batch(0)))


def test_a_weight_that_a_module_returns_is_there_in_an_evaluation_too(ranks):
    torch.manual_seed(0)
    with torch.no_grad():
        expected = float(Stack(OwnWeightReturned)(batch(0)))
    assert ranks(2, evaluate_a_returned_weight) == [pytest.approx(expected, rel=1e-6)] * 2


def count_objects() -> list[int]:
    """Python objects that many steps, and many forwards without a backward, leave behind."""
    model = zero.shard(Stack(LossInAList), build_mesh(dp=-1), stage=3, options=OPTIONS)

    def step(backwards: int) -> int:
        for number in range(10):
            loss = model(batch(number))
            if backwards:
                loss.backward()
                model.zero_grad()
        del loss
        gc.collect()
        return len(gc.get_objects())

    step(1), step(0)  # what is kept for later steps is there now
    return [step(1) - step(1), step(0) - step(0)]


def test_forwards_leave_nothing_behind_with_a_backward_or_without(ranks):
    for left in ranks(2, count_objects):
        assert max(left) < 50  # a graph of one forward has more


def message_of(act: Callable[[], object]) -> str:
    try:
        act()
    except ZcoreError as error:
        return str(error)
    return ""


def give_a_fragment_to_a_function() -> str:
    model = Borrowing()
    model.as_view = False
    options = zero.ShardingOptions(small_numel=12, bucket_numel=500)  # up and down are apart
    zero.shard(model, build_mesh(dp=-1), stage=3, options=options)
    return message_of(lambda: model(batch(0)))


def use_inside_and_outside_of_a_checkpoint() -> str:
    model = zero.shard(Layer(), build_mesh(dp=-1), stage=3, options=OPTIONS)
    x = batch(0).requires_grad_()
    return message_of(lambda: (checkpoint(model, x, use_reentrant=True) + model(x)).sum().backward())


def edit_a_saved_tensor() -> str:
    class Editing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            result = torch.tanh(self.layer(x))
            result.detach().mul_(2)  # tanh saved its result
            return result.sum()

    model = zero.shard(Editing(), build_mesh(dp=-1), stage=3, options=OPTIONS)
    return message_of(lambda: model(batch(0)).backward())


def edit_a_weight_in_the_forward() -> str:
    class Clipping(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(input)

    model = zero.shard(nn.Sequential(Clipping(WIDTH, WIDTH)), build_mesh(dp=-1), stage=3, options=OPTIONS)
    return message_of(lambda: model(batch(0)))


def edit_a_weight_between_modules() -> str:
    class Clipping(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            result = super().forward(input)
            with torch.no_grad():
                self[0].weight.clamp_(-0.1, 0.1)
            return result

    model = zero.shard(Clipping(nn.Linear(WIDTH, WIDTH)), build_mesh(dp=-1), stage=3, options=OPTIONS)
    return message_of(lambda: model(batch(0)))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (give_a_fragment_to_a_function, ["down.weight", "autograd.Function", "view_as"]),
        (use_inside_and_outside_of_a_checkpoint, ["second gradient", "use_reentrant=False"]),
        (edit_a_saved_tensor, ["modified in place", "(4, 24)", "clone()"]),
        (
            edit_a_weight_in_the_forward,
            ["0.weight", "edited in place", "GatheredParameters", "0, 1 or 2 in fp32"],
        ),
        (
            edit_a_weight_between_modules,
            ["0.weight", "edited in place", "GatheredParameters", "0, 1 or 2 in fp32"],
        ),
    ],
)
def test_what_would_give_wrong_gradients_is_refused(ranks, act, words):
    for message in ranks(2, act):
        assert [word for word in words if word not in message] == [], message


class Filled(nn.Module):
    """A layer that fills its weight in its first forward, as actnorm does from its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.is_filled = False

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_filled:
            self.is_filled = True
            with torch.no_grad():
                self.weight.fill_(3.0)
        return self.first(input) * self.weight


def fill_a_weight_in_the_first_forward(stage: int, precision: dict[str, object]) -> tuple[str, float]:
    """What the first forward says, and what the weight is after a step."""
    torch.manual_seed(0)
    config = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "SGD", "params": {"lr": 1e-6}}, **precision}
    engine = zero.initialize(Filled(), config=config)
    said = message_of(lambda: engine(batch(0)))
    for _ in range(2):
        engine.backward(engine(batch(0)).float().square().mean())
        engine.step()
    with zero.GatheredParameters([engine.module.weight]) as (weight,):
        return said, weight.float().mean().item()


@pytest.mark.parametrize("stage", range(4))
def test_an_edit_in_the_forward_is_kept_or_refused(ranks, stage):
    for precision in ({}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}):
        for said, weight in ranks(2, fill_a_weight_in_the_first_forward, stage, precision):
            assert (said, round(weight, 3)) == ("", 3.0)
    for name in ("bf16", "fp16"):
        for said, weight in ranks(2, fill_a_weight_in_the_first_forward, stage, {name: {"enabled": True}}):
            assert "weight was edited in place inside the model's forward" in said
            assert round(weight, 3) == 1.0  # its masters go on without the edit
