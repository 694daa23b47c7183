"""Whatever backward of autograd's gradients come from, they count in the step as those of `engine.backward(loss)`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, batch, digest, listen, refusal, settings, train_step
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import StateError
from zcore.core.mesh import build_mesh
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
Backward = Callable[[zero.Engine, Tensor], object]
STAGES = (0, 1, 2, 3)
STEPS = range(6)
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 1024.0}, "gradient_accumulation_steps": 2}


def of_a_tensor_that_is_no_loss(engine: zero.Engine, loss: Tensor) -> None:
    (loss * torch.tensor([0.25, 0.5])).backward(torch.tensor([1.0, 1.5]))  # by 0.25 + 0.75


def of_halves_that_share_a_graph(engine: zero.Engine, loss: Tensor) -> None:
    torch.autograd.backward([0.5 * loss, 0.5 * loss])


BACKWARDS: dict[str, Backward] = {
    "engine.backward": lambda engine, loss: engine.backward(loss),
    "loss.backward": lambda engine, loss: loss.backward(),
    "a tensor": of_a_tensor_that_is_no_loss,
    "two losses": of_halves_that_share_a_graph,
    "engine.scale": lambda engine, loss: engine.scale(loss).backward(),
}


def train_by(backward: Backward, config: dict[str, Any], forward: Callable[..., Tensor] | None = None) -> str:
    engine = zero.initialize(TinyModel(), config)
    for step in STEPS:
        loss = engine(**batch(step)) if forward is None else forward(engine, **batch(step))
        backward(engine, loss)
        engine.step()
    assert engine.global_steps == len(STEPS) // int(engine.config.gradient_accumulation_steps or 1)
    return digest(engine)


def compare_backwards(config: dict[str, Any]) -> dict[str, str]:
    return {name: train_by(backward, config) for name, backward in BACKWARDS.items()}


@pytest.mark.parametrize("changes", [{}, BF16, {"gradient_accumulation_steps": 2}], ids=["fp32", "bf16", "accumulated"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_backward_trains_as_the_engines_own_to_the_bit(ranks: Ranks, stage: int, changes: dict[str, Any]) -> None:
    digests = ranks(2, compare_backwards, settings(stage, **changes))[0]
    assert {name: each == digests["engine.backward"] for name, each in digests.items()} == dict.fromkeys(digests, True)


def by_its_parts(engine: zero.Engine, tokens: Tensor, targets: Tensor) -> Tensor:
    """The forward of the model, each submodule called by itself."""
    model = engine.module
    model.num_forwards += 1
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x)
    return nn.functional.cross_entropy(model.head(x).flatten(0, 1), targets.flatten())


def call_parts(stage: int) -> tuple[str, str]:
    config = settings(stage, gradient_accumulation_steps=2)
    own = train_by(BACKWARDS["engine.backward"], config)
    return own, train_by(BACKWARDS["loss.backward"], config, forward=by_its_parts)


@pytest.mark.parametrize("stage", STAGES)
def test_submodules_called_by_themselves_count_as_the_model(ranks: Ranks, stage: int) -> None:
    for own, in_parts in ranks(2, call_parts, stage):
        assert own == in_parts


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.outer(torch.tanh(self.inner(x))))


def unroll(stage: int) -> list[dict[str, Tensor]]:
    """A loss over outputs that were fed back into the model, as an RNN's."""
    weights = []
    for backward in (BACKWARDS["engine.backward"], BACKWARDS["loss.backward"]):
        engine = zero.initialize(Cell(), settings(stage, gradient_accumulation_steps=2))
        for step in STEPS:
            x = torch.randn(2, 12, generator=torch.Generator().manual_seed(step))
            first = engine(x)
            second = engine(first)
            backward(engine, (first + second).square().mean())
            engine.step()
        weights.append(engine.consolidated_state_dict(rank=None))
    return weights


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_that_are_fed_back_are_not_scaled_twice(ranks: Ranks, stage: int) -> None:
    for own, plain in ranks(2, unroll, stage):
        assert {name: torch.equal(own[name], plain[name]) for name in own} == dict.fromkeys(own, True)


def train_two(stage: int, by: str) -> tuple[str, str]:
    """One loss of two engines, of which the second accumulates twice as long."""
    first = zero.initialize(TinyModel(), settings(stage, gradient_accumulation_steps=2))
    second = zero.initialize(TinyModel(seed=1), settings(stage, gradient_accumulation_steps=4))
    for step in range(4):
        losses = first(**batch(step)), second(**batch(step))
        if by == "apart":
            first.backward(losses[0])
            second.backward(losses[1])
        elif by == "loss.backward":
            (losses[0] + losses[1]).backward()
        else:
            first.backward(losses[0] + losses[1])
        first.step()
        second.step()
    return digest(first), digest(second)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_of_two_engines_counts_in_each_as_its_own_settings_say(ranks: Ranks, stage: int) -> None:
    apart, plain, of_first = (ranks(2, train_two, stage, by)[0] for by in ("apart", "loss.backward", "first.backward"))
    assert plain == apart
    assert of_first == apart


class Inner(torch.autograd.Function):
    """Runs a part of the model under autograd in its forward, and a backward through that in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: nn.Module) -> Tensor:
        ctx.x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.result = part(ctx.x)
        return ctx.result.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        torch.autograd.backward(ctx.result, grads[0])
        return ctx.x.grad, None


class Nested(nn.Module):
    def __init__(self, is_nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.is_nested = nn.Linear(12, 12), is_nested

    def forward(self, x: Tensor) -> Tensor:
        return (Inner.apply(x, self.part) if self.is_nested else self.part(x)).square().mean()


def meet_nested_backwards(stage: int) -> list[float]:
    norms = []
    for is_nested in (False, True):
        engine = zero.initialize(Nested(is_nested), settings(stage, gradient_accumulation_steps=4, fp16=FP16["fp16"]))
        for step in range(4):
            x = torch.randn(2, 12, generator=torch.Generator().manual_seed(step)).half().requires_grad_()
            engine.backward(engine(x))
            engine.step()
        norms.append(engine.get_global_grad_norm() or 0.0)
    return norms


@pytest.mark.parametrize("stage", [1, 3])
def test_a_backward_inside_a_backward_has_the_factor_of_its_loss(ranks: Ranks, stage: int) -> None:
    for plain, nested in ranks(1, meet_nested_backwards, stage):
        assert nested == pytest.approx(plain, rel=1e-3)


def add_scaled_losses() -> str:
    engines = [
        zero.initialize(TinyModel(), settings(1, gradient_accumulation_steps=accumulation)) for accumulation in (2, 4)
    ]
    first, second = (engine.scale(engine(**batch(0))) for engine in engines)
    return refusal((first + second).backward)


def test_a_sum_of_losses_that_two_engines_scaled_in_two_ways_is_refused(ranks: Ranks) -> None:
    assert "losses scaled by 0.5 and by 0.25" in ranks(1, add_scaled_losses)[0] or (
        "losses scaled by 0.25 and by 0.5" in ranks(1, add_scaled_losses)[0]
    )


class Trap(nn.Module):
    """Passes values and gradients on; raises once in a backward when it is set."""

    is_set = False

    def forward(self, x: Tensor) -> Tensor:
        result = x.clone()
        if self.is_set:
            result.register_hook(self._raise)
        return result

    def _raise(self, grad: Tensor) -> None:
        self.is_set = False
        raise KeyError("a trap")


def meet_an_exception(stage: int, tries: str) -> None:
    """In the second micro-batch of the second step: that step begins anew."""
    digests = []
    for meets_one in (False, True):
        engine = zero.initialize(TinyModel(), settings(stage, gradient_accumulation_steps=2))
        trap = engine.module.blocks[1].dropout = Trap()
        for step in (0, 1):
            engine(**batch(step)).backward()
            engine.step()
        if meets_one:
            engine(**batch(2)).backward()
            engine.step()
            trap.is_set = True
            with pytest.raises(KeyError, match="a trap"):
                engine(**batch(3)).backward()
            if tries == "step":
                assert "called without a backward()" in refusal(engine.step)
            engine.module.num_forwards -= 2
        for step in (2, 3):
            engine(**batch(step)).backward()
            engine.step()
        assert (engine.global_steps, engine.micro_steps) == (2, 4)
        digests.append(digest(engine))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("tries", ["step", "forward"])
@pytest.mark.parametrize("stage", STAGES)
def test_after_a_plain_backward_that_raised_the_step_begins_anew(ranks: Ranks, stage: int, tries: str) -> None:
    ranks(2, meet_an_exception, stage, tries)


def misuse(stage: int) -> dict[str, str]:
    records, engine = listen(), zero.initialize(TinyModel(), settings(stage, gradient_accumulation_steps=2))
    said = {"no backward": refusal(engine.step)}
    weight = next(engine.module.parameters())
    said["by a fragment"] = refusal(lambda: engine(**batch(0)).backward(inputs=[weight]))
    with engine.no_sync():
        engine(**batch(0)).backward()
    said["held back, not last"] = refusal(engine.step)
    with engine.no_sync():
        engine(**batch(1)).backward()
    said["held back, last"] = refusal(engine.step)
    engine.zero_grad()
    said["dropped"] = refusal(engine.step)
    for step, is_boundary in ((1, False), (2, True)):  # it begins anew
        assert engine.is_gradient_accumulation_boundary() == is_boundary
        train_step(engine, step)
        assert engine.was_step_applied() == is_boundary
    assert (engine.global_steps, engine.micro_steps) == (1, 3)  # what was dropped was done, too
    refusal(engine.step)
    assert not engine.was_step_applied()
    said["logged"] = " ".join(records.lines)
    return said


@pytest.mark.parametrize("stage", STAGES)
def test_plain_backwards_are_counted(ranks: Ranks, stage: int) -> None:
    for said in ranks(2, misuse, stage):
        assert "called without a backward()" in said["no backward"]
        assert said["held back, not last"] == "nothing was refused"
        assert "ran inside no_sync()" in said["held back, last"]
        assert "called without a backward()" in said["dropped"]
        assert "read `.grad`" in said["by a fragment"]
        assert "zero_grad() dropped 1 of the 2 micro-batches" in said["logged"]


def train_in_fp16(stage: int) -> dict[str, tuple[str, list[float], list[str]]]:
    """Of three backwards: what came of it, the norms of the gradients, and what was said of the loss scale."""
    records, seen = listen(), {}
    for name in ("engine.backward", "engine.scale", "loss.backward"):
        engine, norms = zero.initialize(TinyModel(), settings(stage, **FP16)), []
        for step in STEPS:
            BACKWARDS[name](engine, engine(**batch(step)))
            engine.step()
            norms.append(engine.get_global_grad_norm() or 0.0)
        seen[name] = digest(engine), norms, [line for line in records.lines if "without the loss scale" in line]
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_plain_backward_in_fp16_counts_in_full_and_says_that_it_lacks_the_loss_scale(
    ranks: Ranks, stage: int
) -> None:
    for seen in ranks(2, train_in_fp16, stage):
        assert seen["engine.backward"] == seen["engine.scale"]
        result, norms, said = seen["engine.backward"]
        assert said == []
        plain_result, plain_norms, said = seen["loss.backward"]
        assert plain_result != result  # what is below 6e-8 has vanished
        assert plain_norms == pytest.approx(norms, rel=2e-3)  # float16 has 11 bits
        assert len(said) == 1
        assert "engine.scale(loss).backward()" in said[0]


def tell(stage: int) -> list[str]:
    records = listen()
    train_by(BACKWARDS["loss.backward"], settings(stage, steps_per_print=2))
    return [line for line in records.lines if line.startswith("step ")]


def test_steps_are_told_without_a_loss_that_the_engine_has_not_seen(ranks: Ranks) -> None:
    lines, others = ranks(2, tell, 1)
    assert others == []
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    assert all(line.partition(": ")[2].startswith("gradient norm ") for line in lines)


class ThreeInARow(nn.Module):
    """Parts of one bucket, whose gradients come from the last one on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        hidden = self.b(torch.tanh(self.a(x)))
        hidden.register_hook(look)
        return self.c(torch.tanh(hidden)).square().mean()


def change_inside_a_backward(stage: int, small_numel: int, syncs: bool) -> str:
    torch.manual_seed(0)
    options = zero.ShardingOptions(small_numel=small_numel)
    model = zero.shard(ThreeInARow(), build_mesh(dp=-1), stage=stage, options=options)

    def look(grad: Tensor) -> None:
        for bucket in sharding_of(model).buckets:
            bucket.memory.master.mul_(2)

    with nullcontext() if syncs else zero.no_sync(model), pytest.raises(StateError) as refused:
        model(torch.ones(2, 8), look).backward()
    return str(refused.value)


@pytest.mark.parametrize("syncs", [True, False])
@pytest.mark.parametrize(("stage", "small_numel"), [(0, 0), (1, 0), (2, 0), (3, 5000)])
def test_parameters_that_change_between_gradients_of_a_bucket_are_refused(
    ranks: Ranks, stage: int, small_numel: int, syncs: bool
) -> None:
    for told in ranks(2, change_inside_a_backward, stage, small_numel, syncs):
        assert "were changed, by an optimizer or in place, between this backward and its forward" in told


def step_the_optimizer_by_itself() -> str:
    engine = zero.initialize(TinyModel(), settings(2))
    engine.backward(engine(**batch(0)))
    assert engine.optimizer is not None
    with pytest.raises(StateError) as refused:
        engine.optimizer.step()
    engine.step()  # goes on
    return str(refused.value)


def test_the_engines_optimizer_is_not_stepped_past_the_engine(ranks: Ranks) -> None:
    assert all("Call `engine.step()`" in told for told in ranks(2, step_the_optimizer_by_itself))
