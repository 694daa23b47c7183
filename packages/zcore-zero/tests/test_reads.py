"""Weights read between modules, by themselves or several at once, in recomputed parts and beside other hooks.

Each model trains under stages 1 and 3 as the same model does in one process on the same rows.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
WIDTH = 16
OPTIONS = zero.ShardingOptions(small_numel=12, bucket_numel=500)  # about one linear layer a bucket


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Two weights that `read` may use as it likes, around blocks that are gathered and released."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def through_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.through_blocks(x)


class Product(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.through_blocks(functional.linear(x, self.a.weight @ self.b.weight))


class Difference(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.through_blocks(self.b(self.a(x)))
        return x + 0.01 * (self.a.weight - self.b.weight).square().sum()


class AllAtOnce(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.through_blocks(self.b(self.a(x)))
        return x + 0.01 * torch.cat([param.reshape(-1) for param in self.parameters()]).square().sum()


class ViewTakenEarly(Model):
    def forward(self, x: Tensor) -> Tensor:
        weight, (upper, lower) = self.a.weight.t(), self.b.weight.chunk(2)
        constant = self.b.weight.detach()
        x = self.through_blocks(self.a(x)) @ weight
        return torch.cat([x @ upper.t(), x @ lower.t()], -1) @ constant


class Region(Model):
    """Several modules are recomputed as one, and a weight is read between them."""

    use_reentrant = False

    def region(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        penalty = 0.1 * self.a.weight.square().sum()
        return self.b(self.blocks[0](functional.linear(x, self.a.weight))) + penalty

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        x = checkpoint(self.region, x, use_reentrant=self.use_reentrant) if x.requires_grad else self.region(x)
        return self.blocks[2](self.blocks[1](x))


class ReentrantRegion(Region):
    use_reentrant = True


class LossInChunks(Model):
    """The head is tied to the first layer, and its part of the loss is recomputed chunk by chunk."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.through_blocks(self.a(x))

        def loss_of(chunk: Tensor) -> Tensor:
            return functional.linear(chunk, self.a.weight).square().mean()

        if not torch.is_grad_enabled():
            return loss_of(x)
        chunks = [checkpoint(loss_of, chunk, use_reentrant=self.use_reentrant) for chunk in x.chunk(4)]
        return torch.stack(chunks).mean().sqrt()


class ReentrantLossInChunks(LossInChunks):
    use_reentrant = True


class ViewInAClosure(Model):
    """What is computed again reads a view that was taken outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight.t()
        x = checkpoint(lambda part: torch.tanh(part @ weight) @ weight, self.b(x), use_reentrant=False)
        return self.through_blocks(x)


class ViewOfAViewInAClosure(Model):
    def forward(self, x: Tensor) -> Tensor:
        row = self.a.weight.view(2, -1, WIDTH)[1, 0]
        return self.through_blocks(
            checkpoint(lambda part: torch.tanh(part * row) * row, self.b(x), use_reentrant=False)
        )


class ConstantViewInAClosure(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            row = self.a.weight.view(2, -1, WIDTH)[1, 0]
        return self.through_blocks(checkpoint(lambda part: torch.tanh(part * row), self.b(x), use_reentrant=False))


class ConstantViewInARegion(Model):
    def region(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.a.weight.t()
        return self.blocks[1](self.blocks[0](torch.tanh(x) @ weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[2](checkpoint(self.region, self.b(x), use_reentrant=False))


class RecomputedInVain(torch.autograd.Function):
    """Computes a block again in its backward, and differentiates nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.block = block
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            ctx.block(x.detach().requires_grad_())
        return grad, None


class InVain(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.through_blocks(RecomputedInVain.apply(self.b(self.a(x)), self.blocks[1]))


class ReadInTheMiddle(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.a(x)))
        return self.blocks[2](torch.tanh(functional.linear(x, self.a.weight)))


class BackwardOfItsOwn(torch.autograd.Function):
    """Holds what it has unpacked while it runs a backward through blocks, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, blocks: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.blocks = blocks
        with torch.no_grad():
            return blocks(x) @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            outer = ctx.blocks(inner)
        outer.backward(grad @ weight)
        return inner.grad, grad.t() @ outer.detach(), None


class Reversible(Model):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight.view_as(self.b.weight)
        return BackwardOfItsOwn.apply(self.a(x), weight, self.through_blocks)


Loss = Callable[[nn.Module, Tensor], Tensor]


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def of_an_input_with_gradient(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.requires_grad_()).square().mean()


def recomputed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False).square().mean()


def recomputed_reentrantly(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.requires_grad_(), use_reentrant=True).square().mean()


def beside_a_forward_without_gradient(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    with torch.no_grad():
        target = model(x + 1)
    return (result - target).square().mean()


def beside_hooks_of_the_users(model: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return model(x).square().mean()


CASES: dict[str, tuple[type[Model], Loss]] = {
    "a product of weights": (Product, plainly),
    "a difference of weights": (Difference, plainly),
    "all weights at once": (AllAtOnce, plainly),
    "views taken early": (ViewTakenEarly, plainly),
    "a region recomputed": (Region, of_an_input_with_gradient),
    "a region recomputed reentrantly": (ReentrantRegion, of_an_input_with_gradient),
    "a loss in chunks": (LossInChunks, plainly),
    "a loss in chunks, reentrantly": (ReentrantLossInChunks, plainly),
    "a view in a closure": (ViewInAClosure, plainly),
    "a view of a view in a closure": (ViewOfAViewInAClosure, plainly),
    "a view in a closure, and a forward without gradient": (ViewInAClosure, beside_a_forward_without_gradient),
    "a constant view in a closure": (ConstantViewInAClosure, plainly),
    "a constant view in a region": (ConstantViewInARegion, plainly),
    "a block computed again in vain": (InVain, plainly),
    "the whole recomputed": (ReadInTheMiddle, recomputed),
    "the whole recomputed reentrantly": (ReadInTheMiddle, recomputed_reentrantly),
    "hooks of the user's": (ReadInTheMiddle, beside_hooks_of_the_users),
    "views and hooks of the user's": (ViewTakenEarly, beside_hooks_of_the_users),
    "a backward inside a function's": (Reversible, plainly),
}


def batch(step: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, loss_of: Loss) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(4):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(batch(9)).square().mean().item())
    return losses


def build(kind: type[Model]) -> Model:
    torch.manual_seed(0)
    return kind()


def run_all(stage: int) -> dict[str, tuple[list[float], int]]:
    """Losses, and bytes of gathered buckets that are left."""
    found = {}
    for name, (kind, loss_of) in CASES.items():
        model = zero.shard(build(kind), build_mesh(dp=-1), stage=stage, options=OPTIONS)
        losses = train(model, loss_of)
        loss_of(model, batch(0)).backward()  # an evaluation, as that before it, leaves what it has read by views
        found[name] = losses, sharding_of(model).ledger.live_bytes
    return found


@pytest.fixture(scope="module", params=[1, 3], ids="stage {}".format)
def found(request: pytest.FixtureRequest, ranks: Ranks) -> list[dict[str, tuple[list[float], int]]]:
    results: list[dict[str, tuple[list[float], int]]] = ranks(2, run_all, request.param)
    return results


@pytest.mark.parametrize("name", CASES)
def test_weights_read_between_modules_train_as_in_one_process(
    found: list[dict[str, tuple[list[float], int]]], name: str
) -> None:
    kind, loss_of = CASES[name]
    expected = train(build(kind), loss_of)
    for by_name in found:
        losses, left_bytes = by_name[name]
        assert losses == pytest.approx(expected, rel=1e-6)  # gradients of one weight are added in another order
        assert left_bytes == 0


class Inner(nn.Module):
    """Holds a sharded model that is no part of it, and calls it in its own forward."""

    def __init__(self, inner: Model) -> None:
        super().__init__()
        self.own, self.inner = Model(), [inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](self.own(x))


def train_one_inside_another(stage: int) -> list[list[float]]:
    torch.manual_seed(0)
    plain = Inner(ReadInTheMiddle())
    model = Inner(copy.deepcopy(plain.inner[0]))
    model.own = copy.deepcopy(plain.own)
    for each in (model.inner[0], model):
        zero.shard(each, build_mesh(dp=-1), stage=stage, options=OPTIONS)
    losses = []
    for each in (plain, model):
        optimizer = torch.optim.SGD([*each.parameters(), *each.inner[0].parameters()], lr=0.02)
        losses.append([])
        for step in range(3):
            loss = plainly(each, batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [1, 3])
def test_a_sharded_model_may_run_inside_anothers_forward(ranks: Ranks, stage: int) -> None:
    for plain, sharded in ranks(2, train_one_inside_another, stage):
        assert sharded == plain


class PassingOn(Model):
    """Each block hands the input on, beside its result."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x, first = block(x, first)
        return x


class LayerWithInput(Layer):
    def forward(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x) + first, first


def count_gathers_of_an_optimised_input() -> list[int]:
    torch.manual_seed(0)
    model = PassingOn()
    model.blocks = nn.ModuleList(LayerWithInput() for _ in range(3))
    zero.shard(model, build_mesh(dp=-1), stage=3, options=OPTIONS)
    x = batch(0).requires_grad_()
    counts = []
    for _ in range(6):
        traffic = sharding_of(model).groups.gather.traffic
        traffic.clear()
        model(x).square().mean().backward()
        model.zero_grad()
        counts.append(traffic.calls["all_gather"])
    return [*counts, len(x._backward_hooks or {})]


def test_a_tensor_that_passes_through_modules_costs_no_gather_and_collects_no_hooks(ranks: Ranks) -> None:
    for *counts, hooks in ranks(2, count_gathers_of_an_optimised_input):
        assert hooks == 0
        assert len(set(counts[2:])) == 1
        assert counts[-1] <= counts[0]


class FailingOnce(nn.Module):
    """Raises in the middle of its second call, which is a recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = Layer(), 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.calls += 1
        if self.calls == 2:
            raise MemoryError
        return x


class Retrying(Model):
    def __init__(self) -> None:
        super().__init__()
        self.failing = FailingOnce()

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.failing, torch.tanh(self.a(x)), use_reentrant=True) if x.requires_grad else self.failing(x)
        return self.through_blocks(x)


def train_again_what_failed(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for step in (0, 0, 1):
        try:
            loss = of_an_input_with_gradient(model, batch(step))
            loss.backward()
        except MemoryError:
            model.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_sharded_again_what_failed(stage: int) -> list[float]:
    return train_again_what_failed(zero.shard(build(Retrying), build_mesh(dp=-1), stage=stage, options=OPTIONS))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_batch_whose_recomputation_failed_may_be_tried_again(ranks: Ranks, stage: int) -> None:
    expected = train_again_what_failed(build(Retrying))
    assert len(expected) == 2
    for losses in ranks(2, train_sharded_again_what_failed, stage):
        assert losses == pytest.approx(expected, rel=1e-6)


def count_gathered_at_once(num_blocks: int) -> int:
    """In a backward through reentrant regions of two blocks, of which one gets no gradient."""
    torch.manual_seed(0)
    model = Model()
    model.blocks = nn.ModuleList(Layer() for _ in range(num_blocks))

    def forward(x: Tensor) -> Tensor:
        for first, second in zip(model.blocks[::2], model.blocks[1::2], strict=True):

            def region(x: Tensor, first: nn.Module = first, second: nn.Module = second) -> Tensor:
                with torch.no_grad():
                    constant = first(x)
                return second(x) + constant

            x = checkpoint(region, x, use_reentrant=True)
        return x

    model.forward = forward  # type: ignore[method-assign]
    options = zero.ShardingOptions(small_numel=12, bucket_numel=1_200)  # a block a bucket
    sharding = sharding_of(zero.shard(model, build_mesh(dp=-1), stage=3, options=options))
    counts: list[int] = []

    def count(*_: object) -> None:
        counts.append(
            sum(
                bucket.is_transient and bucket.memory.gathered.untyped_storage().nbytes() > 0
                for bucket in sharding.buckets
            )
        )

    for block in model.blocks:
        block.register_forward_hook(count)
    of_an_input_with_gradient(model, batch(0)).backward()
    return max(counts)


def test_what_recomputations_gather_does_not_add_up_over_the_model(ranks: Ranks) -> None:
    (few, _), (many, _) = ranks(2, count_gathered_at_once, 6), ranks(2, count_gathered_at_once, 18)
    assert many == few


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self) -> Tensor:
        return self.weight


class WithWeight(Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = Weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.through_blocks(x @ self.first())


def sums_of_a_returned_weight(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(batch(0)).square().mean().backward()
    sums = []
    for _ in range(2):
        with torch.no_grad():
            sums.append(model.first().sum().item())
        optimizer.step()
    return sums


def call_a_submodule_alone() -> list[float]:
    return sums_of_a_returned_weight(zero.shard(build(WithWeight), build_mesh(dp=-1), stage=3, options=OPTIONS))


def test_a_weight_returned_by_a_submodule_alone_is_the_one_of_now(ranks: Ranks) -> None:
    expected = sums_of_a_returned_weight(build(WithWeight))
    assert expected[0] != expected[1]
    assert ranks(2, call_a_submodule_alone) == [expected] * 2


def use_returned_weights(model: nn.Module) -> list[float]:
    results = []
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            weight = model.first()
            x = model.blocks[0](batch(0) @ weight)
            again = model.first().t()
            results.append((model.blocks[1](x) @ again + weight.sum()).square().mean().item())
    return results


def use_returned_weights_sharded() -> list[float]:
    return use_returned_weights(zero.shard(build(WithWeight), build_mesh(dp=-1), stage=3, options=OPTIONS))


def test_weights_returned_by_submodules_alone_outlast_the_next_calls(ranks: Ranks) -> None:
    expected = use_returned_weights(build(WithWeight))
    for found in ranks(2, use_returned_weights_sharded):
        assert found == pytest.approx(expected, rel=1e-6)


class WithWeightInResult(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.through_blocks(self.a(x)), self.a.weight.view(-1)


def look_at_all_after_a_returned_weight() -> list[str]:
    model = zero.shard(build(WithWeightInResult), build_mesh(dp=-1), stage=3, options=OPTIONS)
    with torch.no_grad():
        result = model(batch(0))
    with zero.GatheredParameters(model.parameters()):
        pass
    del result
    return sorted({type(param).__name__ for param in model.parameters()})


def test_parameters_are_fragments_again_after_a_look_at_all_of_them(ranks: Ranks) -> None:
    assert ranks(2, look_at_all_after_a_returned_weight) == [["ShardedParameter"]] * 2


class Rows(Weight):
    def forward(self) -> Tensor:
        return self.weight[:WIDTH]


class WithRows(WithWeight):
    def __init__(self) -> None:
        super().__init__()
        self.first = Rows()


def gather_while_one_rank_holds_what_modules_return() -> list[float]:
    model = zero.shard(build(WithRows), build_mesh(dp=-1), stage=3, options=OPTIONS)
    held: list[Tensor] = []
    if torch.distributed.get_rank() == 0:  # as a log of activations on one rank
        model.first.register_forward_hook(lambda module, args, result: held.append(result))
    return train(model, plainly)


def test_what_one_rank_holds_on_to_changes_no_collective(ranks: Ranks) -> None:
    expected = train(build(WithRows), plainly)
    for losses in ranks(2, gather_while_one_rank_holds_what_modules_return):
        assert losses == pytest.approx(expected, rel=1e-6)
