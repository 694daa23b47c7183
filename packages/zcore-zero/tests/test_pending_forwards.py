"""Forwards that wait for their backward: many, older ones, beside one that raised; and losses made beside a forward.

Each program is one of plain torch, in every row of the table, in a loop of one's own.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core import compat
from zcore.core.errors import StateError
from zcore.core.mesh import build_mesh
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
WIDTH, STEPS = 12, 3
ROWS = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 10_000)]  # stage, and below how many elements parameters stay whole


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head, self.other_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, other: bool = False) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return (self.other_head if other else self.head)(x).square().mean()


def inputs(seed: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def raises(grad: Tensor) -> None:
    raise ArithmeticError


def one_that_raises(model: Net, x: Tensor) -> Tensor:
    def arm(module: nn.Module, args: object, result: Tensor) -> None:
        result.register_hook(raises)

    with model.layers[1].register_forward_hook(arm):
        return model(x)


def many(model: Net, step: int) -> None:
    sum(model(inputs(10 * step + each)) for each in range(10)).backward()


def an_older_one(model: Net, step: int) -> None:
    older = model(inputs(3 * step))
    model(inputs(3 * step + 1)).backward()
    (older + model(inputs(3 * step + 2))).backward()


def an_older_one_with_another_head(model: Net, step: int) -> None:
    older = model(inputs(3 * step))
    model(inputs(3 * step + 1)).backward()
    (older + model(inputs(3 * step + 2), other=True)).backward()


def one_beside_another_that_raised(model: Net, step: int) -> None:
    waiting = model(inputs(2 * step))
    with suppress(ArithmeticError):
        one_that_raises(model, inputs(2 * step + 1)).backward()
    model.zero_grad()  # in plain torch some have gradients by now
    waiting.backward()


def a_penalty_on_gathered_weights(model: Net, step: int) -> None:
    loss = model(inputs(step))
    with zero.GatheredParameters([model.layers[0].up.weight, model.head.weight]) as weights:
        loss = loss + sum(0.1 * weight.pow(2).sum() for weight in weights)
    loss.backward()


def a_penalty_differentiated_where_it_is_made(model: Net, step: int) -> None:
    with zero.GatheredParameters(model.layers[0].up.weight) as (weight,):
        (model(inputs(step)) + 0.1 * weight.pow(2).sum()).backward()


def penalty(model: Net) -> Tensor:
    with zero.GatheredParameters([model.layers[0].up.weight, model.other_head.weight]) as weights:
        made = sum((0.1 * weight.pow(2).sum() for weight in weights), torch.zeros(()))
    assert compat.packs_saved_tensors() is None
    return made


def a_penalty_before_the_forward(model: Net, step: int) -> None:
    made = penalty(model)  # of a head that the forward does not read, too
    (model(inputs(step)) + made).backward()


def a_penalty_with_a_backward_of_its_own(model: Net, step: int) -> None:
    penalty(model).backward()
    model(inputs(step)).backward()


def a_penalty_by_itself(model: Net, step: int) -> None:
    (penalty(model) if step % 2 else model(inputs(step))).backward()


def a_forward_where_weights_are_gathered(model: Net, step: int) -> None:
    with zero.GatheredParameters(model.layers[0].up.weight) as (weight,):
        loss = model(inputs(step))
        with torch.no_grad():
            model(inputs(step + 1))
        loss = loss + 0.1 * weight.pow(2).sum()
    loss.backward()


def a_penalty_under_hooks_of_others(model: Net, step: int) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        made = penalty_under_hooks(model)
    (model(inputs(step)) + made).backward()


def penalty_under_hooks(model: Net) -> Tensor:
    with zero.GatheredParameters(model.head.weight) as (weight,):
        return 0.1 * weight.pow(2).sum()


def a_penalty_that_is_computed_again(model: Net, step: int) -> None:
    made = checkpoint(lambda scale: scale * penalty_under_hooks(model), torch.ones(()), use_reentrant=False)
    (model(inputs(step)) + made).backward()


def a_penalty_with_autograd_switched_on_late(model: Net, step: int) -> None:
    loss = model(inputs(step))
    with torch.no_grad(), zero.GatheredParameters(model.head.weight) as (weight,), torch.enable_grad():
        made = 0.1 * weight.pow(2).sum()
    (loss + made).backward()


def a_layer_frozen_after_its_forward(model: Net, step: int) -> None:
    loss = model(inputs(step))
    for frozen in (model.layers[0].up.weight, model.head.bias):
        frozen.requires_grad_(False)
    loss.backward()
    for frozen in (model.layers[0].up.weight, model.head.bias):
        frozen.requires_grad_(True)


def a_layer_frozen_for_the_second_of_two_forwards(model: Net, step: int) -> None:
    first = model(inputs(2 * step))
    model.layers[1].requires_grad_(False)
    second = model(inputs(2 * step + 1))
    (first + second).backward()
    model.layers[1].requires_grad_(True)


def a_layer_frozen_while_another_loss_goes_through_it(model: Net, step: int) -> None:
    waiting = model(inputs(2 * step))
    model.layers[1].requires_grad_(False)
    model(inputs(2 * step + 1)).backward()
    model.layers[1].requires_grad_(True)
    waiting.backward()


def a_model_frozen_for_a_look_at_its_input(model: Net, step: int) -> None:
    waiting = model(inputs(2 * step))
    model.requires_grad_(False)
    model(inputs(2 * step + 1).requires_grad_()).backward()
    for param in model.parameters():
        param.requires_grad = True
    waiting.backward()


def a_layer_thawed_before_it_is_computed_again(model: Net, step: int) -> None:
    layer = model.layers[1]
    layer.requires_grad_(False)
    forward = layer.forward
    layer.forward = lambda x: checkpoint(forward, x, use_reentrant=True)
    loss = model(inputs(step))
    layer.requires_grad_(True)
    loss.backward()
    del layer.forward


def a_derivative_in_the_forward_that_raises(model: Net, step: int) -> None:
    def arm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        point = args[0].detach().requires_grad_()
        inner = torch.tanh(point * 1)
        inner.register_hook(raises)
        made = torch.tanh(inner @ model.layers[0].up.weight.t())
        with suppress(ArithmeticError):
            torch.autograd.grad(made.sum(), point)

    model(inputs(2 * step)).backward()
    with model.layers[0].register_forward_pre_hook(arm):
        model(inputs(2 * step + 1)).backward()


def a_derivative_of_a_submodule_by_itself_that_raises(model: Net, step: int) -> None:
    def arm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        point = args[0].detach().requires_grad_()
        inner = torch.tanh(point * 1)
        inner.register_hook(raises)
        with suppress(ArithmeticError):
            torch.autograd.grad((inner @ module.weight.t()).sum(), point)

    model(inputs(2 * step)).backward()
    with model.layers[0].up.register_forward_pre_hook(arm), torch.no_grad(), torch.enable_grad():
        model.layers[0](inputs(0))
    model(inputs(2 * step + 1)).backward()


def a_derivative_in_an_evaluation(model: Net, step: int) -> None:
    slopes = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.enable_grad():
            point = args[0].detach().requires_grad_()
            made = torch.tanh(point * model.layers[2].down.bias) * model.head.bias
            slopes.extend(torch.autograd.grad(made.sum(), point))

    with torch.no_grad(), model.layers[0].register_forward_pre_hook(look):
        model(inputs(2 * step))
    model(inputs(2 * step + 1) + slopes[0]).backward()


def a_penalty_that_waits_through_another_backward(model: Net, step: int) -> None:
    made = penalty(model)
    model(inputs(2 * step)).backward()
    (model(inputs(2 * step + 1)) + made).backward()


PROGRAMS: dict[str, Callable[[Net, int], None]] = {
    each.__name__.replace("_", " "): each
    for each in (
        many,
        an_older_one,
        an_older_one_with_another_head,
        one_beside_another_that_raised,
        a_penalty_on_gathered_weights,
        a_penalty_differentiated_where_it_is_made,
        a_penalty_before_the_forward,
        a_penalty_with_a_backward_of_its_own,
        a_penalty_by_itself,
        a_forward_where_weights_are_gathered,
        a_penalty_under_hooks_of_others,
        a_penalty_that_is_computed_again,
        a_penalty_with_autograd_switched_on_late,
        a_layer_frozen_after_its_forward,
        a_layer_frozen_for_the_second_of_two_forwards,
        a_layer_frozen_while_another_loss_goes_through_it,
        a_model_frozen_for_a_look_at_its_input,
        a_layer_thawed_before_it_is_computed_again,
        a_derivative_in_the_forward_that_raises,
        a_derivative_of_a_submodule_by_itself_that_raises,
        a_derivative_in_an_evaluation,
        a_penalty_that_waits_through_another_backward,
    )
}


def sharded(row: tuple[int, int]) -> Net:
    torch.manual_seed(0)
    model, (stage, small_numel) = Net(), row
    zero.shard(model, build_mesh(dp=-1), stage=stage, options=zero.ShardingOptions(small_numel=small_numel))
    return model


def train(name: str, row: tuple[int, int] | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net() if row is None else sharded(row)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        PROGRAMS[name](model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict() if row is None else zero.consolidated_state_dict(model, rank=None)


def train_all(name: str) -> list[dict[str, Tensor]]:
    return [train(name, row) for row in ROWS]


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_trains_as_plain_torch(ranks: Ranks, name: str) -> None:
    expected = train(name, None)
    for of_rank in ranks(2, train_all, name):
        for row, found in zip(ROWS, of_rank, strict=True):
            for key, value in expected.items():
                assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), (row, key)


def differentiate_twice() -> str:
    model = sharded((3, 0))
    with zero.GatheredParameters(model.head.weight) as (weight,):
        x = torch.ones(2, WIDTH, requires_grad=True)
        loss = torch.tanh(x @ weight).sum()
    try:
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.square().sum().backward()
    except StateError as error:
        return str(error)
    return "it ran"


def test_a_second_derivative_of_what_was_gathered_is_refused(ranks: Ranks) -> None:
    assert all("create_graph=True" in told for told in ranks(2, differentiate_twice))


def count_reductions_in_flight() -> int:
    """At most, in a backward after norms of all weights were looked at with autograd."""
    model, most = sharded((3, 0)), 0
    reducer = sharding_of(model).reducer

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, len(reducer._inflight))

    for layer in model.layers:
        layer.register_full_backward_hook(look)
    for step in range(3):
        with zero.GatheredParameters(model.parameters()) as weights:
            sum(weight.norm() for weight in weights).item()
        x = inputs(step).requires_grad_()
        model(x).backward()
        model.zero_grad()
    return most


def test_weights_that_are_only_looked_at_hold_no_reduction_back(ranks: Ranks) -> None:
    assert max(ranks(2, count_reductions_in_flight)) <= 1


class Late(nn.Module):
    """Switches autograd on for one of its layers, and keeps what that saved for later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.kept = torch.tanh(self.first(x))
        return self.second(x)


def slopes_of_what_was_kept(row: tuple[int, int] | None) -> list[Tensor]:
    torch.manual_seed(0)
    model, found = nn.Sequential(Late(), Late()), []
    if row is not None:
        options = zero.ShardingOptions(small_numel=row[1])
        zero.shard(model, build_mesh(dp=-1), stage=row[0], options=options)
    for seed in range(2):
        x = inputs(seed).requires_grad_()
        with torch.no_grad():
            model(x)
        found += torch.autograd.grad(model[0].kept.sum(), x)
    return found


def slopes_in_all_rows() -> list[list[Tensor]]:
    return [slopes_of_what_was_kept(row) for row in ROWS]


def test_what_a_layer_saves_with_autograd_switched_on_in_its_block_is_there_later(ranks: Ranks) -> None:
    expected = slopes_of_what_was_kept(None)
    for of_rank in ranks(2, slopes_in_all_rows):
        for row, found in zip(ROWS, of_rank, strict=True):
            assert all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True)), row


def count_hooks() -> list[int]:
    """Hooks at the ends of modules at stage 1, after each thing that a training does."""
    model, counts = sharded((1, 0)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def count() -> None:
        counts.append(sum(len(module._forward_hooks) for module in model.modules()))

    count()
    with torch.no_grad():
        model(inputs(0))
    count()
    for step in range(2):
        model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(inputs(step))
        count()
    model.layers[0].up(inputs(0))
    count()
    return counts


def test_a_layer_gets_a_hook_at_its_end_only_when_it_is_called_without_its_block(ranks: Ranks) -> None:
    before, *during, after = ranks(2, count_hooks)[0]
    assert during == [before] * len(during)
    assert after == before + 1
