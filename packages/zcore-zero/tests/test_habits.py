"""What programs in plain torch do to a model and its parameters: it works here as there, or it is refused by name."""

import io
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from tiny_models import is_paragraph
from torch import nn

from zcore import zero
from zcore.core.errors import ZcoreError
from zcore.core.mesh import build_mesh

STAGES = (0, 1, 2, 3)
OPTIONS = zero.ShardingOptions(small_numel=12)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)) for _ in range(3))
        self.main, self.aux = nn.Linear(12, 1), nn.Linear(12, 1)
        self.register_buffer("offset", torch.randn(12))
        self.skipped = -1

    def forward(self, x, head="main"):
        for index, block in enumerate(self.blocks):
            if index != self.skipped:
                x = x + block(x)
        return (self.main if head == "main" else self.aux)(x + self.offset).square().mean()


def rows_of(step):
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(step))


def sharded(*, stage=3, kind=Blocks, seed=0, **mesh_sizes):
    torch.manual_seed(seed)
    return zero.shard(kind(), build_mesh(**(mesh_sizes or {"dp": -1})), stage=stage, options=OPTIONS)


def refusal(act):
    try:
        act()
    except ZcoreError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# Start values


def train_from_own_seeds(mesh_sizes):
    rank = dist.get_rank()
    losses = []
    for stage in STAGES:
        model = sharded(stage=stage, seed=rank, **mesh_sizes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            model(rows_of(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(model(rows_of(9)).item())
    return losses


@pytest.mark.parametrize(("world_size", "mesh_sizes"), [(2, {}), (4, {"dp_replicate": 2, "dp_shard": 2})])
def test_ranks_that_were_seeded_apart_start_from_the_values_of_rank_0(ranks, world_size, mesh_sizes):
    torch.manual_seed(0)
    plain = Blocks()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        plain(rows_of(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = plain(rows_of(9)).item()
    for losses in ranks(world_size, train_from_own_seeds, mesh_sizes):
        assert losses == pytest.approx([expected] * len(STAGES), rel=1e-5)


# Calls and edits


def by_submodules(model, optimizer, batch):
    def loss_of(x):
        for block in model.blocks:
            x = x + block(x)
        return model.main(x).square().mean()

    loss_of(batch).backward()
    loss_of(batch)  # a metric, without no_grad
    optimizer.step()
    optimizer.zero_grad()


def with_edits_of_data(model, optimizer, batch):
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(batch)
    for param in model.parameters():
        param.data.mul_(0.9)


def with_two_heads_and_no_sync(model, optimizer, batch):
    model(batch).backward()
    if type(next(model.parameters())) is not nn.Parameter:
        with zero.no_sync(model):
            model(batch, head="aux").backward()
    else:
        model(batch, head="aux").backward()
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_masked_gradients(model, optimizer, batch):
    handle = model.main.weight.register_hook(lambda grad: grad * 0.5)
    model(batch).backward()
    handle.remove()
    optimizer.step()
    optimizer.zero_grad()


def discard(model, optimizer, batch, *, set_to_none):
    if type(next(model.parameters())) is not nn.Parameter:
        with zero.no_sync(model):
            (7 * model(batch)).backward()
    else:
        (7 * model(batch)).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_a_discarded_batch(model, optimizer, batch):
    discard(model, optimizer, batch, set_to_none=True)


def with_a_batch_set_to_zero(model, optimizer, batch):
    discard(model, optimizer, batch, set_to_none=False)


def with_a_batch_set_to_zero_by_hand(model, optimizer, batch):
    if type(next(model.parameters())) is not nn.Parameter:
        with zero.no_sync(model):
            (7 * model(batch)).backward()
    else:
        (7 * model(batch)).backward()
    for index, param in enumerate(model.parameters()):
        if param.grad is not None and index % 3 == 0:
            param.grad.detach_().zero_()
        elif param.grad is not None and index % 3 == 1:
            param.grad.data.fill_(0)
        elif param.grad is not None:
            param.grad = torch.zeros_like(param.grad)
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_a_look_before_the_backward(model, optimizer, batch):
    loss = model(batch)
    with zero.GatheredParameters(list(model.parameters())) as whole:
        assert all(param.isfinite().all() for param in whole)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def with_assigned_gradients_and_more(model, optimizer, batch):
    model(batch).backward()
    for param in model.parameters():
        if param.grad is not None:
            param.grad = param.grad * 0.1
    model(2 * batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def clip(model, max_norm):
    if type(next(model.parameters())) is nn.Parameter:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    else:
        zero.clip_grad_norm_(model, max_norm)


def with_merged_gradients(model, optimizer, batch):
    kept = []
    for head in ("main", "aux"):
        optimizer.zero_grad()
        model(batch, head=head).backward()
        kept.append([param.grad if param.grad is None else param.grad.clone() for param in model.parameters()])
    optimizer.zero_grad()
    for param, one, other in zip(model.parameters(), *kept, strict=True):
        param.grad = one if other is None else other if one is None else one + other
    clip(model, 1e-2)
    optimizer.step()
    optimizer.zero_grad()


def with_some_gradients_dropped(model, optimizer, batch):
    model(batch).backward()
    for name, param in model.named_parameters():
        if name.startswith("main"):
            param.grad = None
    clip(model, 1e-2)
    optimizer.step()
    optimizer.zero_grad()


def with_gradients_kept_over_a_zero_grad(model, optimizer, batch):
    kept = []
    for scale in (1, 2):
        model(scale * batch).backward()
        kept.append([param.grad for param in model.parameters()])
        optimizer.zero_grad()
    for param, one, other in zip(model.parameters(), *kept, strict=True):
        if one is not None:
            param.grad = one - 0.5 * other
    optimizer.step()
    optimizer.zero_grad()


def with_gradients_from_elsewhere(model, optimizer, batch):
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    clip(model, 1e-2)
    optimizer.step()
    optimizer.zero_grad()


def with_a_backward_onto_assigned_gradients(model, optimizer, batch):
    for param in model.parameters():
        param.grad = 0.01 * torch.ones_like(param)
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_gradients_exchanged(model, optimizer, batch):
    model(batch).backward()
    weights = [block[2].weight for block in model.blocks]
    grads = [weight.grad for weight in weights]
    for weight, grad in zip(weights, [*grads[1:], grads[0]], strict=True):
        weight.grad = grad
    clip(model, 1e-2)
    model(2 * batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_other_memory_for_gradients(model, optimizer, batch):
    model(batch).backward()
    for index, param in enumerate(model.parameters()):
        if param.grad is not None and index % 2:
            param.grad.data = param.grad.data * 2
        elif param.grad is not None:
            param.grad.set_(param.grad * 3)
    model(2 * batch).backward()
    clip(model, 1e-1)
    optimizer.step()
    optimizer.zero_grad()


PROGRAMS = (
    by_submodules,
    with_other_memory_for_gradients,
    with_gradients_exchanged,
    with_merged_gradients,
    with_some_gradients_dropped,
    with_gradients_kept_over_a_zero_grad,
    with_gradients_from_elsewhere,
    with_a_backward_onto_assigned_gradients,
    with_edits_of_data,
    with_two_heads_and_no_sync,
    with_masked_gradients,
    with_a_discarded_batch,
    with_a_batch_set_to_zero,
    with_a_batch_set_to_zero_by_hand,
    with_a_look_before_the_backward,
    with_assigned_gradients_and_more,
)


def losses_of(program, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(4):
        program(model, optimizer, rows_of(step))
        with torch.no_grad():
            losses.append(model(rows_of(9)).item())
    return losses


def run_programs():
    return [[losses_of(program, sharded(stage=stage)) for stage in STAGES] for program in PROGRAMS]


def test_habits_of_training_loops_train_as_in_plain_torch(ranks):
    for by_rank in ranks(2, run_programs):
        for program, by_stage in zip(PROGRAMS, by_rank, strict=True):
            torch.manual_seed(0)
            expected = losses_of(program, Blocks())
            for stage, losses in zip(STAGES, by_stage, strict=True):
                assert losses == pytest.approx(expected, rel=1e-5), (program.__name__, stage)


def look_at_shapes():
    model = sharded()
    plain = Blocks()
    return [
        (
            (param.shape, param.dim(), param.ndim, param.numel(), len(param))
            == (p.shape, p.dim(), p.ndim, p.numel(), len(p))
        )
        for param, p in zip(model.parameters(), plain.parameters(), strict=True)
    ]


def test_a_parameter_answers_the_shape_of_the_whole_between_steps(ranks):
    assert all(all(same) for same in ranks(2, look_at_shapes))


def clip_what_was_assigned():
    model = sharded()
    model(rows_of(0)).backward()
    before = zero.clip_grad_norm_(model, 1e9)
    for param in model.parameters():
        if param.grad is not None:
            param.grad = param.grad * 1000
    return before, zero.clip_grad_norm_(model, 1.0), zero.clip_grad_norm_(model, 1e9)


def test_clipping_sees_a_gradient_that_was_assigned(ranks):
    for before, assigned, clipped in ranks(2, clip_what_was_assigned):
        assert assigned == pytest.approx(1000 * before, rel=1e-5)
        assert clipped == pytest.approx(1.0, rel=1e-5)


@dataclass
class Result:
    hidden: torch.Tensor
    note: str = ""


class Scaled(nn.Module):
    """Owns a parameter, and returns a plain object and keeps a loss on itself, as routers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.ones(24, 12))

    def forward(self, x):
        self.loss = (x @ self.scale.T).square().mean() / 100
        return Result(self.linear(x) * self.scale.mean(0))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).hidden
        return x.square().mean() + sum(layer.loss for layer in self.layers)


def train_wrapped():
    return losses_of(by_root, sharded(kind=Wrapped))


def by_root(model, optimizer, batch):
    model(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_outputs_in_plain_objects_and_losses_kept_on_modules_reach_their_parameters(ranks):
    torch.manual_seed(0)
    expected = losses_of(by_root, Wrapped())
    for losses in ranks(2, train_wrapped):
        assert losses == pytest.approx(expected, rel=1e-4)


def take_ways_of_replicas():
    model = sharded(dp_replicate=2, dp_shard=2)
    model.skipped = dist.get_rank() // 2
    loss = model(rows_of(0))
    loss.backward()
    torch.manual_seed(0)
    plain = Blocks()
    plain.skipped = model.skipped
    return abs(loss.item() - plain(rows_of(0)).item())


def test_replicas_may_go_ways_of_their_own(ranks):
    assert max(ranks(4, take_ways_of_replicas)) < 1e-6


def count_gathers_of_mixed_blocks():
    torch.manual_seed(0)
    model = Blocks()
    for block in model.blocks:
        block[0].requires_grad_(False)
    engine = zero.initialize(
        model,
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 12, "stage3_prefetch_bucket_size": 0}},
        optimizer=torch.optim.SGD,
    )
    before = engine.traffic()["gather"].calls["all_gather"]
    with torch.no_grad():
        engine(rows_of(0))
    transient = [bucket for bucket in engine.sharding.buckets if bucket.is_transient]
    whole = [bucket for bucket in engine.sharding.buckets if not bucket.is_transient]
    return engine.traffic()["gather"].calls["all_gather"] - before, len(transient), len(whole)


def test_a_block_with_frozen_and_trainable_parts_is_gathered_once(ranks):
    for gathers, transient, whole in ranks(2, count_gathers_of_mixed_blocks):
        assert transient > 3
        assert gathers <= transient + whole


def resume_with_another_accumulation(folder):
    def start(steps):
        torch.manual_seed(0)
        config = {"gradient_accumulation_steps": steps, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        return zero.initialize(Blocks(), config)

    first = start(3)
    for _ in range(3):
        first.backward(first(rows_of(0)))
        first.step()
    first.save_checkpoint(folder)
    second = start(2)
    second.load_checkpoint(folder)
    seen = []
    for _ in range(4):
        second.backward(second(rows_of(0)))
        second.step()
        seen.append(second.global_steps)
    return seen


def test_a_run_with_another_accumulation_begins_with_a_whole_step(ranks, tmp_path):
    assert ranks(2, resume_with_another_accumulation, tmp_path) == [[1, 2, 2, 3]] * 2


def read_on_one_rank(stage):
    model = sharded(stage=stage)
    losses = []
    for step in range(3):
        with torch.no_grad():
            losses.append(model(rows_of(step)).item())
        if dist.get_rank() == 0:
            assert all(param.data.isfinite().all() for param in model.parameters())
    return losses


@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_may_look_at_its_values_alone(ranks, stage):
    first, second = ranks(2, read_on_one_rank, stage, group_timeout_s=5.0)
    assert first == second


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("bad loss")


def engine_of(model, **config):
    return zero.initialize(model, {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **config})


def fail_in_the_second_micro_batch(stage):
    norms = []
    for fails in (True, False):
        torch.manual_seed(0)
        config = {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": stage}}
        engine = engine_of(Blocks(), **config)
        if fails:
            engine.backward(engine(rows_of(0)))
            engine.step()
            with pytest.raises(ValueError, match="bad loss"):
                engine.backward(Bad.apply(engine(rows_of(1)) * float("nan")))
        for step in range(2):
            engine.backward(engine(rows_of(step)))
            engine.step()
        norms.append((engine.get_global_grad_norm(), engine.global_steps))
    return norms


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_backward_that_raises_drops_the_step_that_begins_anew(ranks, stage):
    for after_failure, without in ranks(2, fail_in_the_second_micro_batch, stage):
        assert after_failure == without


def fight(engines):
    """The loop of a GAN: the generator's loss runs through the discriminator, whose gradients of it are dropped."""
    make, judge = engines
    for step in range(3):
        judge.zero_grad()
        for loss in (judge(rows_of(step)), -judge(make(rows_of(step)).detach())):
            judge.backward(loss)
        judge.step()
        make.zero_grad()
        make.backward(judge(make(rows_of(step))))
        make.step()
    return engines


class Plain:
    """The same calls on plain torch."""

    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.1)

    def __call__(self, x):
        return self.model(x)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()


class Maker(nn.Linear):
    def __init__(self):
        super().__init__(12, 12)


def fight_with_engines(stage):
    torch.manual_seed(0)
    make, judge = fight([engine_of(model, zero_optimization={"stage": stage}) for model in (Maker(), Blocks())])
    return judge(make(rows_of(9))).item()


@pytest.mark.parametrize("stage", [0, 3])
def test_two_engines_train_against_each_other(ranks, stage):
    torch.manual_seed(0)
    make, judge = fight([Plain(model) for model in (Maker(), Blocks())])
    expected = judge(make(rows_of(9))).item()
    assert ranks(2, fight_with_engines, stage) == [pytest.approx(expected, rel=1e-5)] * 2


def take_two_losses():
    torch.manual_seed(0)
    engine = engine_of(Blocks())
    loss = engine(rows_of(0))
    engine.backward(loss, retain_graph=True)
    engine.backward(loss.square())
    engine.step()
    return engine(rows_of(9)).item()


def test_two_losses_of_one_forward_count_both(ranks):
    torch.manual_seed(0)
    plain = Plain(Blocks())
    loss = plain(rows_of(0))
    (loss + loss.square()).backward()
    plain.step()
    expected = plain(rows_of(9)).item()
    assert ranks(2, take_two_losses) == [pytest.approx(expected, rel=1e-5)] * 2


def initialize_again():
    lazy = nn.Sequential(nn.Linear(12, 12), nn.LazyLinear(1))
    optimizer = torch.optim.SGD(lazy.parameters(), lr=0.1)
    first = refusal(lambda: zero.initialize(lazy, {}, optimizer=optimizer))
    lazy(rows_of(0))
    engine = zero.initialize(lazy, {}, optimizer=optimizer)
    before = engine(rows_of(0)).square().mean()
    engine.backward(before)
    engine.step()
    model, schedule = Blocks(), {"type": "WarmupLR", "params": {"warmup_steps": 3}}
    second = refusal(lambda: engine_of(model, scheduler=schedule))
    third = refusal(lambda: engine_of(model, optimizer={"type": "SGD", "params": {"lr": -1.0}}))
    engine_of(model)
    return first, second, third, engine(rows_of(0)).square().mean().item() < before.item()


def test_after_a_refusal_of_initialize_the_same_objects_work(ranks):
    for first, second, third, has_trained in ranks(2, initialize_again):
        assert "1.weight has no shape" in first
        assert "warmup_num_steps" in second
        assert "optimizer.params" in third
        assert has_trained


# What is refused


def build_early():
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero.shard(model, build_mesh(dp=-1))
    model(rows_of(0)).backward()
    optimizer.step()


class Listed(Blocks):
    """Uses a parameter by a reference of its own."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.ones(12))
        self.listed = [self.extra]

    def forward(self, x):
        return super().forward(x * self.listed[0])


def step_between_forward_and_backward(stage):
    model = sharded(stage=stage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = model(rows_of(0)), model(rows_of(1))
    first.backward()
    optimizer.step()
    second.backward()


def step_and_evaluate_between():
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = model(rows_of(0)), model(rows_of(1))
    first.backward()
    optimizer.step()
    with torch.no_grad():
        model(rows_of(2))
    second.backward()


def assign_before_the_reduction(model, optimizer):
    for param in model.parameters():
        if param.grad is not None:
            param.grad = torch.ones_like(param.grad)
    model(rows_of(0)).backward()


def go_on_after_a_backward_that_raised():
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="bad loss"):
        (model(rows_of(0)) + Bad.apply(model.blocks[0](rows_of(0))).sum()).backward()
    shapes = [param.detach().shape for param in model.parameters()]
    norm = zero.clip_grad_norm_(model, 1.0)
    optimizer.step()
    same = all(torch.equal(param.detach(), was) for param, was in zip(model.parameters(), before, strict=True))
    return shapes == [was.shape for was in before], norm, same


def test_after_a_backward_that_raised_there_is_no_gradient_to_step_with(ranks):
    assert ranks(2, go_on_after_a_backward_that_raised) == [(True, 0.0, True)] * 2


def take_a_loss_across_a_step(stage):
    model = sharded(stage=stage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(rows_of(0)).backward()
    first = model(rows_of(1))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"modified|were changed"):
        (first + model(rows_of(2))).backward()
    return True


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_loss_over_forwards_before_and_after_a_step_is_refused(ranks, stage):
    assert ranks(2, take_a_loss_across_a_step, stage) == [True, True]


def act_inside_no_sync(act):
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zero.no_sync(model):
        model(rows_of(0)).backward()
    act(model, optimizer)


def norm_by_hand():
    model = sharded()
    model(rows_of(0)).backward()
    sum(param.grad.detach().norm(2) for param in model.parameters() if param.grad is not None)


def with_model(act):
    model = sharded()
    act(model)


def tie_late():
    model = sharded()
    model.aux.weight = model.main.weight
    model(rows_of(0))


def replace_late():
    model = sharded()
    model.main.weight = nn.Parameter(torch.zeros(1, 12))
    model(rows_of(0))


def edit_inside_reading():
    model = sharded(stage=1)
    with zero.GatheredParameters(model.main.weight), zero.GatheredParameters(model.main.weight, modifier_rank=0):
        pass


def step_inside_reading():
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(rows_of(0)).backward()
    with zero.GatheredParameters(list(model.parameters())):
        optimizer.step()


def copy_the_whole():
    model = sharded()
    with torch.no_grad():
        model.blocks[0][0].weight.copy_(torch.zeros(12, 12))


def pass_a_spent_optimizer():
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero.initialize(model, {}, optimizer=optimizer)
    optimizer.param_groups[0]["params"].clear()
    zero.initialize(Blocks(), {}, optimizer=optimizer)


class Casting(nn.Module):
    """Computes in fp64 by casting a layer, and not only what goes in."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(12, 4), nn.Linear(4, 12, bias=False)

    def forward(self, x):
        self.up = self.up.double()
        return self.up(self.down(x).double()).to(x.dtype)


def cast_in_the_forward(stage):
    model = sharded(stage=stage, kind=lambda: nn.Sequential(Casting(), Casting()))
    for step in range(2):
        model(rows_of(step)).sum().backward()


def load_after_init():
    with zero.Init():
        model = Blocks()
    model.load_state_dict(Blocks().state_dict())


def differ_in_options():
    options = zero.ShardingOptions(small_numel=12, prefetch_numel=dist.get_rank())
    zero.shard(Blocks(), build_mesh(dp=-1), options=options)


def pass_two_groupings():
    zero.initialize(Blocks(), {"zero_optimization": {"mics_shard_size": 1}}, mesh=build_mesh(dp=-1))


def unpack_four():
    engine, _optimizer, _loader, _schedule = zero.initialize(Blocks(), {})
    return engine


def shard_complex():
    model = Blocks()
    model.twist = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    zero.shard(model, build_mesh(dp=-1))


def step_inside_the_backward():
    model = Blocks()
    model.main.weight.register_post_accumulate_grad_hook(lambda param: None)
    zero.shard(model, build_mesh(dp=-1))


def clip_infinity():
    model = sharded()
    (model(rows_of(0)) * float("inf")).backward()
    zero.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


REFUSED = {
    "an optimizer built too early": (
        build_early,
        ["StateError", "SGD", "before it was sharded", "taken before", "after"],
    ),
    "a parameter in a list": (
        lambda: sharded(kind=Listed)(rows_of(0)).backward(),
        ["StateError", "extra", "another reference", "nn.ParameterList"],
    ),
    "a step between forward and backward": (
        lambda: step_between_forward_and_backward(3),
        ["StateError", "changed", "forward again"],
    ),
    "the same at stage 0": (lambda: step_between_forward_and_backward(0), ["StateError", "changed"]),
    "the same with an evaluation between": (step_and_evaluate_between, ["StateError", "changed"]),
    "a step before the reduction": (
        lambda: act_inside_no_sync(lambda model, optimizer: optimizer.step()),
        ["StateError", "not reduced", "outside no_sync()"],
    ),
    "clipping before the reduction": (
        lambda: act_inside_no_sync(lambda model, optimizer: zero.clip_grad_norm_(model, 1.0)),
        ["StateError", "not reduced", "outside no_sync()"],
    ),
    "assigning before the reduction": (
        lambda: act_inside_no_sync(assign_before_the_reduction),
        ["StateError", "assigned before it was reduced", "outside no_sync()"],
    ),
    "a norm by hand": (norm_by_hand, ["StateError", "clip_grad_norm_"]),
    "an initialiser after sharding": (
        lambda: with_model(lambda model: nn.init.xavier_uniform_(model.main.weight)),
        ["StateError", "main.weight", "GatheredParameters"],
    ),
    "an initialiser of .data": (
        lambda: with_model(lambda model: model.main.weight.data.normal_()),
        ["StateError", "normal_", "GatheredParameters"],
    ),
    "a weight tied late": (tie_late, ["StateError", "aux.weight", "before it is sharded"]),
    "a weight replaced late": (replace_late, ["StateError", "main.weight", "before it is sharded"]),
    "a layer cast in a forward": (
        lambda: cast_in_the_forward(3),
        ["StateError", "0.up.weight", "other memory", "torch_autocast"],
    ),
    "the same whole": (lambda: cast_in_the_forward(0), ["StateError", "0.up.weight", "other memory"]),
    "an edit inside a block that reads": (edit_inside_reading, ["StateError", "modifier_rank", "outermost"]),
    "a step inside a block that reads": (step_inside_reading, ["StateError", "SGD", "outside the block"]),
    "copying the whole into a fragment": (copy_the_whole, ["StateError", "(12, 12)", "GatheredParameters"]),
    "an optimizer without parameters": (pass_a_spent_optimizer, ["ConfigError", "no parameters", "new one"]),
    "saving parameters": (
        lambda: torch.save(list(sharded().parameters()), io.BytesIO()),
        ["StateError", "consolidated_state_dict"],
    ),
    "loading after Init": (load_after_init, ["StateError", "load_state_dict()", "inside the block"]),
    "options that differ": (differ_in_options, ["MismatchError", "options.prefetch_numel", "[1]"]),
    "two groupings": (pass_two_groupings, ["ConfigError", "mics_shard_size is 1", "over 2 ranks"]),
    "four results": (unpack_four, ["StateError", "one engine", "engine.optimizer"]),
    "a complex parameter": (shard_complex, ["LayoutError", "twist", "complex64"]),
    "a lazy parameter": (
        lambda: zero.shard(nn.Sequential(nn.LazyLinear(2)), build_mesh(dp=-1)),
        ["LayoutError", "0.weight", "one batch"],
    ),
    "a hook before sharding": (step_inside_the_backward, ["StateError", "main.weight", "backward"]),
    "a hook after sharding": (
        lambda: sharded().main.weight.register_post_accumulate_grad_hook(lambda param: None),
        ["StateError", "main.weight", "register_hook"],
    ),
    "clipping infinity": (clip_infinity, ["NonFiniteError", "zero_grad()"]),
}


def collect_refusals():
    return {name: refusal(act) for name, (act, _) in REFUSED.items()}


@pytest.fixture(scope="module")
def refusals(ranks):
    return ranks(2, collect_refusals, group_timeout_s=5.0)


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name_on_every_rank(refusals, case):
    for by_case in refusals:
        assert [word for word in REFUSED[case][1] if word not in by_case[case]] == [], by_case[case]
        assert is_paragraph(by_case[case]), by_case[case]


def test_a_mesh_without_a_process_group_says_what_to_call():
    with pytest.raises(ZcoreError, match=r"init_process_group first"):
        build_mesh(dp=-1)
