"""Every row of the table trains what one process trains in plain torch, and what every other row trains.

Three comparisons, from the loosest to the sharpest:

against the plain loop on the whole batch    1e-6 of each tensor's largest value in fp32; see below
against torch that adds the same parts       every bit of losses and parameters: the ranks do nothing else
rows among each other                        every bit, norms included

AdamW divides each gradient by its own size, so where a gradient is zero but for rounding (the key biases of attention,
always) it turns rounding into steps of full length: with eps 1e-8 two correct fp32 runs differ by 1e-2 there. An eps of
1e-3 lets such a gradient stay as small as it is, and 1e-6 can be asked of every parameter without exception. That the
eps hides nothing is shown in fp64, where torch's own eps is used and the same comparison comes to 1e-9.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import (
    SMALL_NUMEL,
    Recipe,
    Run,
    beyond,
    bits_that_differ,
    build_engine,
    by_row,
    part_of,
    relative,
    train_plain,
    train_rows,
)
from torch import nn

from zcore import zero
from zcore.core.mesh import build_mesh

Ranks = Callable[..., Any]
STAGES = tuple({"stage": stage} for stage in range(4))
HPZ = {"stage": 3, "zero_hpz_partition_size": 2}
HYBRIDS = tuple({"stage": stage, "shard_size": 2} for stage in (1, 2, 3))  # two replicas of two shards
WHOLE = Recipe(accumulation=2, clip=0.5, num_groups=2)  # clips in every step of every model
MIXED = [(torch.bfloat16, 1.0), (torch.float16, 1024.0)]  # what is computed in, and the loss scale
PRECISIONS = [(None, 1.0), *(pytest.param(*each, marks=pytest.mark.thorough) for each in MIXED)]
on_both = pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.thorough)])
FP64 = (("lr", 1e-2), ("weight_decay", 0.1))  # and torch's eps


def rows_on(world_size: int) -> list[dict[str, Any]]:
    return [*STAGES, HPZ, *HYBRIDS] if world_size == 4 else [*STAGES]


def labels(rows: list[dict[str, Any]]) -> list[str]:
    return [" ".join(f"{key} {value}" for key, value in row.items()) for row in rows]


# 20 steps with accumulation, clipping, two parameter groups, tied and frozen parameters.


@pytest.fixture(scope="module", params=[("gpt", 2), ("gpt", 4), ("odd", 2)], ids=str)
def training(request: pytest.FixtureRequest, ranks: Ranks) -> tuple[Recipe, dict[str, Run]]:
    """A recipe, and what came of it in each row of the table."""
    model, world_size = request.param
    recipe = replace(WHOLE, model=model)
    rows = rows_on(world_size)
    runs = by_row(ranks(world_size, train_rows, [(recipe, row) for row in rows]))
    return recipe, dict(zip(labels(rows), runs, strict=True))


def test_every_stage_and_hybrid_trains_as_one_process_does(training: tuple[Recipe, dict[str, Run]]) -> None:
    recipe, runs = training
    plain = train_plain(recipe)
    assert min(plain.norms) > 0 and max(plain.norms) > recipe.clip
    assert plain.losses[-1] < plain.losses[0]
    assert {label: beyond(run, plain, rtol=1e-6) for label, run in runs.items()} == {label: {} for label in runs}


def test_rows_that_reduce_equally_often_are_equal_to_the_bit(training: tuple[Recipe, dict[str, Run]]) -> None:
    """Stages 0 and 1 reduce once per step, 2 and 3 in each backward, so their sums associate differently."""
    _, runs = training
    for label, run in runs.items():
        once_per_step = label.startswith(("stage 0", "stage 1"))
        assert bits_that_differ(run, runs["stage 0" if once_per_step else "stage 3"]) == [], label


@pytest.mark.parametrize("model", ["mlp", "attention", "encoder"])
def test_models_without_blocks_or_with_borrowed_weights_train_as_in_one_process(ranks: Ranks, model: str) -> None:
    recipe = replace(WHOLE, model=model, steps=8)
    plain = train_plain(recipe)
    for run in by_row(ranks(2, train_rows, [(recipe, {"stage": 1}), (recipe, {"stage": 3})])):
        assert beyond(run, plain, rtol=1e-6) == {}


def test_in_fp64_the_same_holds_to_1e_9_with_the_usual_eps(ranks: Ranks) -> None:
    recipes = [replace(WHOLE, model=model, dtype=torch.float64, hyper=FP64, steps=8) for model in ("gpt", "odd")]
    runs = by_row(ranks(2, train_rows, [(recipe, {"stage": 3}) for recipe in recipes]))
    for recipe, run in zip(recipes, runs, strict=True):
        assert beyond(run, train_plain(recipe), rtol=1e-9) == {}


# Bit by bit.


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_torch_adding_the_same_parts_to_the_bit(ranks: Ranks, world_size: int) -> None:
    """Without clipping, since torch adds up a norm in another order; the fused AdamW on both sides."""
    recipes = [Recipe(model, accumulation=2, num_groups=2, steps=4) for model in ("gpt", "odd")]
    rows = [{**row, "holds_back": True} for row in ({"stage": 0}, rows_on(world_size)[-1])]
    runs = by_row(ranks(world_size, train_rows, [(recipe, row) for recipe in recipes for row in rows]))
    for index, recipe in enumerate(recipes):
        in_parts = train_plain(recipe, parts=world_size)
        for run in runs[2 * index : 2 * index + 2]:
            assert bits_that_differ(replace(run, norms=in_parts.norms), in_parts) == []
            assert beyond(run, in_parts, rtol=2e-7) == {}  # the norms


def train_ddp(recipe: Recipe) -> list[float]:
    """A rank's losses under torch's own data parallelism."""
    model = nn.parallel.DistributedDataParallel(recipe.build())
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, **dict(recipe.hyper), fused=True)
    losses = []
    for step in range(recipe.steps):
        optimizer.zero_grad()
        batch = part_of(recipe.batch(step, 0), part=dist.get_rank(), parts=dist.get_world_size())
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_two_ranks_have_the_losses_of_ddp_to_the_bit(ranks: Ranks) -> None:
    """With one micro-batch and no clipping; a sum of two has one order, so that DDP's is zcore's."""
    recipe = Recipe(steps=10)
    of_ddp = ranks(2, train_ddp, recipe)
    mean_of_ddp = [sum(each) / len(each) for each in zip(*of_ddp, strict=True)]
    for label, run in zip(
        labels([*STAGES]), by_row(ranks(2, train_rows, [(recipe, row) for row in STAGES])), strict=True
    ):
        assert run.losses == mean_of_ddp, label


@on_both
def test_all_rows_are_equal_to_the_bit_when_no_sync_leaves_one_reduction_per_step(
    ranks: Ranks, world_size: int
) -> None:
    recipe = replace(WHOLE, steps=3)
    rows = [{**row, "holds_back": True} for row in rows_on(world_size)]
    first, *others = by_row(ranks(world_size, train_rows, [(recipe, row) for row in rows]))
    for label, run in zip(labels(rows[1:]), others, strict=True):
        assert bits_that_differ(run, first) == [], label


@on_both
@pytest.mark.parametrize(("compute", "loss_scale"), MIXED)
def test_mixed_precision_equals_torch_with_fp32_masters_to_the_bit(
    ranks: Ranks, compute: torch.dtype, loss_scale: float, world_size: int
) -> None:
    gpt = Recipe(compute=compute, loss_scale=loss_scale, accumulation=2, num_groups=2, steps=3)
    odd = replace(gpt, model="odd", model_options=(("second_dtype", compute),))
    rows = [{**row, "holds_back": True} for row in rows_on(world_size)]
    runs = by_row(ranks(world_size, train_rows, [(recipe, row) for recipe in (gpt, odd) for row in rows]))
    for index, recipe in enumerate((gpt, odd)):
        in_parts = train_plain(recipe, parts=world_size)
        for run in runs[len(rows) * index : len(rows) * (index + 1)]:
            assert bits_that_differ(replace(run, norms=in_parts.norms), in_parts) == []


@pytest.mark.thorough
@pytest.mark.parametrize(("compute", "loss_scale"), MIXED)
@pytest.mark.parametrize("model", ["mlp", "attention", "encoder"])
def test_models_without_blocks_or_with_borrowed_weights_do_so_in_16_bits(
    ranks: Ranks, model: str, compute: torch.dtype, loss_scale: float
) -> None:
    recipe = Recipe(model, compute=compute, loss_scale=loss_scale, accumulation=2, num_groups=2, steps=3)
    rows = [{**row, "holds_back": True} for row in STAGES]
    in_parts = train_plain(recipe, parts=2)
    for run in by_row(ranks(2, train_rows, [(recipe, row) for row in rows])):
        assert bits_that_differ(replace(run, norms=in_parts.norms), in_parts) == []


@pytest.mark.thorough
@pytest.mark.parametrize(("compute", "loss_scale"), MIXED)
def test_mixed_precision_trains_as_fp32_does_to_its_own_precision(
    ranks: Ranks, compute: torch.dtype, loss_scale: float
) -> None:
    recipe = replace(WHOLE, compute=compute, loss_scale=loss_scale, steps=10)
    mixed, full = train_plain(recipe), train_plain(replace(recipe, compute=None, loss_scale=1.0))
    for run in by_row(ranks(2, train_rows, [(recipe, row) for row in STAGES])):
        for reference in (mixed, full):
            loss_and_norm = Run(reference.losses, reference.norms, {})
            rtol = torch.finfo(compute).eps / 2
            assert beyond(Run(run.losses, run.norms, {}), loss_and_norm, rtol=rtol) == {}


LOW: dict[str, Recipe] = {
    "bf16 all the way": Recipe(compute=torch.bfloat16, accumulate="bf16", communicate="bf16"),
    "bf16 sent in fp32": Recipe(compute=torch.bfloat16, accumulate="bf16", communicate="fp32"),
    "fp32 sent in bf16": Recipe(communicate="bf16"),
    "fp16, divided first": Recipe(compute=torch.float16, loss_scale=256.0, communicate="fp16", predivides=True),
    "fp16, divided by 3 first": Recipe(
        compute=torch.float16, loss_scale=256.0, communicate="fp16", predivide_factor=3.0
    ),
    "fp16 all the way": Recipe(compute=torch.float16, loss_scale=256.0, accumulate="fp16", communicate="fp16"),
}


@on_both
@pytest.mark.parametrize("way", LOW)
def test_gradients_accumulate_and_travel_in_the_dtypes_that_are_asked_for(
    ranks: Ranks, way: str, world_size: int
) -> None:
    recipe = replace(LOW[way], accumulation=2, num_groups=2, steps=3)
    rows = [{**row, "holds_back": True} for row in rows_on(world_size)]
    in_parts = train_plain(recipe, parts=world_size)
    for run in by_row(ranks(world_size, train_rows, [(recipe, row) for row in rows])):
        assert bits_that_differ(replace(run, norms=in_parts.norms), in_parts) == []


@on_both
@pytest.mark.parametrize(("dtype", "loss_scale"), [("bfloat16", 1.0), ("float16", 512.0)])
def test_autocast_equals_torchs_to_the_bit(ranks: Ranks, dtype: str, loss_scale: float, world_size: int) -> None:
    recipe = Recipe(autocast=dtype, loss_scale=loss_scale, accumulation=2, num_groups=2, steps=3)
    rows = [{**row, "holds_back": True} for row in rows_on(world_size)]
    in_parts = train_plain(recipe, parts=world_size)
    assert in_parts.losses != train_plain(replace(recipe, autocast=None), parts=world_size).losses
    for run in by_row(ranks(world_size, train_rows, [(recipe, row) for row in rows])):
        assert bits_that_differ(replace(run, norms=in_parts.norms), in_parts) == []


# Ways of use that must not change a bit.


def train_by_hand(recipe: Recipe, *, stage: int) -> Run:
    """The loop anyone writes, on a sharded model: `zero.shard`, a torch optimizer, `zero.clip_grad_norm_`."""
    options = zero.ShardingOptions(small_numel=SMALL_NUMEL, precision=zero.Precision(recipe.compute))
    model = zero.shard(recipe.build(), build_mesh(dp=-1), stage=stage, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), **dict(recipe.hyper), fused=True)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses, norms = [], []
    for step in range(recipe.steps):
        optimizer.zero_grad()
        for micro in range(recipe.accumulation):
            loss = model(**part_of(recipe.batch(step, micro), part=rank, parts=size))
            (loss / recipe.accumulation).backward()
            losses.append(loss.item())
        norms.append(zero.clip_grad_norm_(model, recipe.clip))
        optimizer.step()
    return Run(losses, norms, zero.consolidated_state_dict(model, rank=None))


def hand_written_loops(recipe: Recipe) -> list[Run]:
    return [train_by_hand(recipe, stage=stage) for stage in range(4)]


@pytest.mark.parametrize(
    "compute",
    [None, *(pytest.param(each, marks=pytest.mark.thorough) for each in (torch.bfloat16, torch.float16))],
    ids=str,
)
def test_a_hand_written_loop_equals_the_engine(ranks: Ranks, compute: torch.dtype | None) -> None:
    """Without the engine nobody says which micro-batch is the last one, so every backward reduces in every stage.

    Nor does anybody scale the losses of fp16.
    """
    recipe = replace(WHOLE, steps=3, num_groups=1, compute=compute)
    engines = by_row(ranks(2, train_rows, [(recipe, {"stage": 2}), (recipe, {"stage": 3})]))
    assert bits_that_differ(engines[0], engines[1]) == []
    for run in by_row(ranks(2, hand_written_loops, recipe)):
        assert bits_that_differ(run, engines[0]) == []


SHORT = replace(WHOLE, steps=3)
UNCLIPPED = replace(SHORT, clip=0.0)
WAYS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "stage 3": (SHORT, {}),
    "recomputed": (replace(SHORT, model_options=(("recomputes", True),)), {}),
    "no overlap": (SHORT, {"overlap_comm": False}),
    "no prefetch": (SHORT, {"stage3_prefetch_bucket_size": 0}),
    "much prefetch": (SHORT, {"stage3_prefetch_bucket_size": 10**9}),
    "little live": (SHORT, {"stage3_max_live_parameters": 0}),
    "no reuse": (SHORT, {"stage3_max_reuse_distance": 0}),
    "deferred": (SHORT, {"is_deferred": True}),
    "unclipped": (UNCLIPPED, {}),
    "small buckets": (UNCLIPPED, {"reduce_bucket_size": 1000}),
    "all sharded": (UNCLIPPED, {"stage3_param_persistence_threshold": 0}),
    "none sharded": (UNCLIPPED, {"stage3_param_persistence_threshold": 10**6}),
}


@pytest.fixture(
    scope="module",
    params=[(None, 1.0), *(pytest.param(each, marks=pytest.mark.thorough) for each in MIXED)],
    ids=str,
)
def ways(request: pytest.FixtureRequest, ranks: Ranks) -> dict[str, Run]:
    compute, loss_scale = request.param
    precision = {"compute": compute, "loss_scale": loss_scale}
    trainings = [(replace(recipe, **precision), {"stage": 3, **arguments}) for recipe, arguments in WAYS.values()]
    return dict(zip(WAYS, by_row(ranks(2, train_rows, trainings)), strict=True))


@pytest.mark.parametrize(
    "way", ["recomputed", "no overlap", "no prefetch", "much prefetch", "little live", "no reuse", "deferred"]
)
def test_how_a_model_is_built_recomputed_and_gathered_changes_no_bit(ways: dict[str, Run], way: str) -> None:
    assert bits_that_differ(ways[way], ways["stage 3"]) == []


@pytest.mark.parametrize("way", ["small buckets", "all sharded", "none sharded"])
def test_where_a_model_is_cut_changes_no_bit_but_in_the_norm(ways: dict[str, Run], way: str) -> None:
    """The norm is a sum over buckets, in fp32; without clipping nothing depends on it."""
    assert beyond(ways[way], ways["unclipped"], rtol=5e-7) == {}
    assert bits_that_differ(replace(ways[way], norms=ways["unclipped"].norms), ways["unclipped"]) == []


def orders_by_rank(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Ranks leave different modules out: rank r skips its branch in steps where the sum of both is odd."""
    engine = build_engine(recipe, stage=3)
    for step in range(recipe.steps):
        batch = part_of(recipe.batch(step, 0), part=engine.dp_rank, parts=engine.dp_size)
        engine.backward(engine(**{**batch, "step": step + engine.dp_rank}))
        engine.step()
    return engine.consolidated_state_dict(rank=None)


def test_ranks_that_skip_different_modules_agree_and_neither_hang_nor_lose_a_gradient(ranks: Ranks) -> None:
    recipe = Recipe("odd", steps=4)
    first, second = ranks(2, orders_by_rank, recipe)
    model = recipe.build()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if not torch.equal(first[name], second[name])] == []
    optimizer = torch.optim.AdamW(model.parameters(), **dict(recipe.hyper), fused=True)
    for step in range(recipe.steps):
        optimizer.zero_grad()
        for part in range(2):
            batch = part_of(recipe.batch(step, 0), part=part, parts=2)
            (model(**{**batch, "step": step + part}) / 2).backward()
        optimizer.step()
    expected = model.state_dict()
    assert {name: value for name in names if (value := relative(first[name], expected[name])) > 1e-6} == {}


def losses_in_eval(recipe: Recipe) -> list[float]:
    engine = build_engine(recipe, stage=3)
    losses = []
    for step in range(recipe.steps):
        batch = part_of(recipe.batch(step, 0), part=engine.dp_rank, parts=engine.dp_size)
        engine.eval()
        with torch.no_grad():
            losses.append(engine(**batch).item())
        engine.train()
        loss = engine(**batch)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


@pytest.mark.parametrize(("compute", "loss_scale"), PRECISIONS)
def test_evaluation_between_steps_sees_the_weights_of_that_step_and_disturbs_nothing(
    ranks: Ranks, compute: torch.dtype | None, loss_scale: float
) -> None:
    recipe = Recipe(steps=3, compute=compute, loss_scale=loss_scale)
    of_ranks = ranks(2, losses_in_eval, recipe)
    for losses in of_ranks:
        assert losses[0::2] == losses[1::2]
    trained = [sum(losses) / 2 for losses in zip(*(losses[1::2] for losses in of_ranks), strict=True)]
    assert trained == pytest.approx(train_plain(recipe, parts=2).losses, rel=1e-6)


def test_the_models_of_these_tests_have_what_they_claim() -> None:
    gpt, odd = Recipe().build(), Recipe("odd").build()
    assert gpt.head.weight is gpt.wte.weight
    assert {param.dtype for param in odd.parameters()} == {torch.float32, torch.float64}
    assert {param.numel() for param in odd.parameters()} >= {0, 1}
    assert any(not param.requires_grad for param in odd.parameters())
    assert isinstance(Recipe("attention").build().attention, nn.MultiheadAttention)
