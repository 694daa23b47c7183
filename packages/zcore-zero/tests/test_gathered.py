"""Whole parameters outside the forward: read, edited by one rank for all, and left alone where nobody edits.

Every test runs in all rows of the table and for parameters that stay whole, since what "inside" and "after" mean must
not depend on where a parameter rests.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import SMALL_NUMEL, Recipe, build_engine
from torch import Tensor

from zcore import zero
from zcore.core.errors import StateError
from zcore.core.mesh import build_mesh

Ranks = Callable[..., Any]
NAMES = ("h.0.qkv.weight", "h.1.ln_1.bias", "wpe.weight", "wte.weight")  # sharded, small, frozen, tied


def parameter(model: torch.nn.Module, name: str) -> Tensor:
    """As the user writes it: through the module's attribute."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def whole(engine: zero.Engine) -> dict[str, Tensor]:
    return engine.consolidated_state_dict(rank=None)


def read(recipe: Recipe) -> list[str]:
    """By stage: names whose gathered value or attribute is not the parameter."""
    wrong = []
    expected = dict(recipe.build().named_parameters())
    for stage in range(4):
        engine = build_engine(recipe, stage=stage)
        for name in NAMES:
            with zero.GatheredParameters(parameter(engine.module, name)) as (full,):
                found = torch.equal(full, expected[name]) and full.shape == expected[name].shape
                if not found or not torch.equal(parameter(engine.module, name), expected[name]):
                    wrong.append(f"stage {stage} {name}")
        with zero.GatheredParameters(engine.module.parameters()) as everything:
            shapes = [tuple(each.shape) for each in everything]
        if shapes != [tuple(each.shape) for each in expected.values()]:
            wrong.append(f"stage {stage} shapes of all")
    return wrong


def test_inside_parameters_are_whole_with_the_values_of_the_model(ranks: Ranks) -> None:
    assert ranks(2, read, Recipe()) == [[], []]


def edit(recipe: Recipe, modifier_rank: int, shard_size: int) -> list[str]:
    """By stage: names where not exactly the modifier's edit is left, on any rank."""
    wrong = []
    for stage in range(4):
        engine = build_engine(recipe, stage=stage, shard_size=shard_size)
        before = whole(engine)
        params = [parameter(engine.module, name) for name in NAMES]
        with zero.GatheredParameters(params, modifier_rank=modifier_rank) as fulls, torch.no_grad():
            for full in fulls:
                full.mul_(2 + dist.get_rank())  # other ranks' edits are to go
        after = whole(engine)
        for name, value in before.items():
            edited = name in NAMES or name == "head.weight"
            if not torch.equal(after[name], value * (2 + modifier_rank) if edited else value):
                wrong.append(f"stage {stage} {name}")
        with torch.no_grad():
            loss = engine(**recipe.batch(0, 0)).item()
        plain = recipe.build()
        plain.load_state_dict(after)
        with torch.no_grad():
            if loss != plain(**recipe.batch(0, 0)).item():
                wrong.append(f"stage {stage} forward")
    return wrong


@pytest.mark.parametrize(("world_size", "modifier_rank", "shard_size"), [(2, 1, -1), (4, 2, 2)])
def test_what_the_modifier_writes_is_everywhere_afterwards(
    ranks: Ranks, world_size: int, modifier_rank: int, shard_size: int
) -> None:
    assert ranks(world_size, edit, Recipe(), modifier_rank, shard_size) == [[]] * world_size


def edit_in_vain(recipe: Recipe, how: str) -> list[str]:
    """By stage: names that an edit reached which was to be dropped."""
    wrong = []
    for stage in range(4):
        engine = build_engine(recipe, stage=stage)
        before = whole(engine)
        params = [parameter(engine.module, name) for name in NAMES]
        modifier_rank = None if how == "without a modifier" else 0
        try:
            with zero.GatheredParameters(params, modifier_rank=modifier_rank) as fulls, torch.no_grad():
                for full in fulls:
                    full.add_(1)
                if how == "an exception":
                    raise KeyError
        except KeyError:
            pass
        with torch.no_grad():
            engine(**recipe.batch(0, 0))  # a forward that would gather again from whatever there is
        wrong += [
            f"stage {stage} {name}" for name, value in whole(engine).items() if not torch.equal(value, before[name])
        ]
    return wrong


@pytest.mark.parametrize("how", ["without a modifier", "an exception"])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_edits_that_nobody_is_to_keep_are_dropped(ranks: Ranks, how: str, is_bf16: bool) -> None:
    assert ranks(2, edit_in_vain, Recipe(compute=torch.bfloat16 if is_bf16 else None), how) == [[], []]


def differentiate_late(recipe: Recipe) -> list[str]:
    """By stage: what is said where a loss read edits that were dropped before its backward."""
    told = []
    for stage in range(4):
        engine = build_engine(recipe, stage=stage)
        weight = parameter(engine.module, NAMES[0])
        with zero.GatheredParameters(weight) as (full,):
            with torch.no_grad():
                full.add_(0.5)
            loss = engine(**recipe.batch(0, 0))
        with pytest.raises((RuntimeError, StateError), match="modified") as raised:
            engine.backward(loss)
        told.append(type(raised.value).__name__)
    return told


def test_a_loss_that_has_read_dropped_edits_has_no_backward(ranks: Ranks) -> None:
    assert ranks(2, differentiate_late, Recipe()) == [["RuntimeError"] * 3 + ["StateError"]] * 2


def look_while_evaluating(recipe: Recipe) -> list[bool]:
    """Whether gathered weights keep their values while evaluations have no room to keep any, by limit."""
    kept = []
    for limit in (1, 10**9):
        engine = build_engine(recipe, stage=3, stage3_max_live_parameters=limit)
        engine.eval()
        expected = dict(recipe.build().named_parameters())
        with zero.GatheredParameters([parameter(engine.module, name) for name in NAMES]) as fulls, torch.no_grad():
            for _ in range(2):
                engine(**recipe.batch(0, 0))
            kept.append(all(torch.equal(full, expected[name]) for full, name in zip(fulls, NAMES, strict=True)))
    return kept


def test_an_evaluation_leaves_alone_what_is_gathered(ranks: Ranks) -> None:
    assert ranks(2, look_while_evaluating, Recipe()) == [[True, True]] * 2


def edit_one_row_in_bf16(recipe: Recipe) -> list[str]:
    wrong = []
    for stage in range(4):
        engine = build_engine(recipe, stage=stage)
        before = whole(engine)["h.0.up.weight"]
        with zero.GatheredParameters(parameter(engine.module, "h.0.up.weight"), modifier_rank=0) as (full,):
            assert full.dtype is torch.bfloat16
            with torch.no_grad():
                full[3].fill_(1 / 3)
        after = whole(engine)["h.0.up.weight"]
        assert not torch.equal(before, before.bfloat16().float())  # the master holds more than the copy shows
        expected = before.clone()
        expected[3] = torch.tensor(1 / 3).bfloat16().float()
        if not torch.equal(after, expected):
            wrong.append(f"stage {stage}")
    return wrong


def test_the_fp32_master_of_elements_that_were_not_edited_keeps_every_bit(ranks: Ranks) -> None:
    assert ranks(2, edit_one_row_in_bf16, Recipe(compute=torch.bfloat16)) == [[], []]


def train_after_edit(recipe: Recipe, stage: int) -> dict[str, Tensor]:
    engine = build_engine(recipe, stage=stage)
    for step in range(2):
        engine.backward(engine(**recipe.batch(step, 0)))
        engine.step()
        with zero.GatheredParameters(parameter(engine.module, NAMES[0]), modifier_rank=0) as (full,), torch.no_grad():
            full.clamp_(-0.05, 0.05)
    return whole(engine)


def train_all_after_edit(recipe: Recipe) -> list[dict[str, Tensor]]:
    return [train_after_edit(recipe, stage) for stage in range(4)]


def test_edits_between_steps_train_equally_in_every_stage(ranks: Ranks) -> None:
    first, *others = ranks(2, train_all_after_edit, Recipe())[0]
    assert float(first[NAMES[0]].abs().max()) == pytest.approx(0.05)
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


def nest(recipe: Recipe) -> str:
    engine = build_engine(recipe, stage=3)
    weight = parameter(engine.module, "h.0.qkv.weight")
    bias = parameter(engine.module, "h.0.proj.weight")  # of the same bucket
    with zero.GatheredParameters([weight]) as (outer,):
        with zero.GatheredParameters([bias]), torch.no_grad():
            engine(**recipe.batch(0, 0))
        assert torch.equal(outer, parameter(engine.module, "h.0.qkv.weight"))
        assert outer.untyped_storage().nbytes() > 0
    assert outer.untyped_storage().nbytes() == 0
    with zero.GatheredParameters([weight], enabled=False) as (same,):
        assert same is weight
    plain = torch.nn.Parameter(torch.ones(2))
    with zero.GatheredParameters([plain], modifier_rank=0) as (same,):
        assert same is plain
    return "done"


def test_blocks_may_be_nested_around_a_forward_and_pass_through_what_is_not_sharded(ranks: Ranks) -> None:
    assert ranks(2, nest, Recipe()) == ["done", "done"]


def edit_in_an_inner_block(recipe: Recipe) -> list[str]:
    """By stage: names that have not the outer block's edit alone, in it and after it."""
    wrong = []
    for stage in range(4):
        engine = build_engine(recipe, stage=stage)
        params = [parameter(engine.module, name) for name in NAMES]
        with zero.GatheredParameters(params, modifier_rank=0) as outer, torch.no_grad():
            for full in outer:
                full.fill_(0.5)
            with zero.GatheredParameters(params) as inner:
                for full in inner:
                    full.fill_(7.0)
            wrong += [f"stage {stage} {name}" for name, full in zip(NAMES, outer, strict=True) if (full != 0.5).any()]
        after = whole(engine)
        wrong += [f"after stage {stage} {name}" for name in NAMES if (after[name] != 0.5).any()]
    return wrong


@pytest.mark.parametrize("is_bf16", [False, True])
def test_an_inner_block_without_a_modifier_drops_its_own_edits_and_no_others(ranks: Ranks, is_bf16: bool) -> None:
    assert ranks(2, edit_in_an_inner_block, Recipe(compute=torch.bfloat16 if is_bf16 else None)) == [[], []]


def gather_of_the_dead(recipe: Recipe) -> str:
    model = zero.shard(recipe.build(), build_mesh(dp=-1), options=zero.ShardingOptions(small_numel=SMALL_NUMEL))
    weight = model.h[0].qkv.weight
    del model
    with pytest.raises(StateError, match=r"h\.0\.qkv\.weight belongs to is gone"), zero.GatheredParameters(weight):
        pass
    with zero.Init():
        deferred = recipe.build()
    with pytest.raises(StateError, match="has no values before"), zero.GatheredParameters(deferred.h[0].qkv.weight):
        pass
    return "done"


def test_what_cannot_be_gathered_is_refused_with_the_reason(ranks: Ranks) -> None:
    assert ranks(2, gather_of_the_dead, Recipe()) == ["done", "done"]


def consolidate_at_odd_times(recipe: Recipe) -> list[str]:
    """Situations in which the whole weights are not what they are."""
    wrong = []
    expected = recipe.build().state_dict()
    for stage in range(4):
        engine = build_engine(recipe, stage=stage)

        def look(when: str, engine: zero.Engine = engine, stage: int = stage) -> None:
            try:
                found = whole(engine)
            except Exception as error:  # noqa: BLE001 - told to the test
                wrong.append(f"stage {stage} {when}: {type(error).__name__}")
                return
            if found.keys() != expected.keys() or any(not torch.equal(found[key], expected[key]) for key in found):
                wrong.append(f"stage {stage} {when}")

        look("at rest")
        with zero.GatheredParameters(engine.module.parameters()):
            look("inside GatheredParameters")
        loss = engine(**recipe.batch(0, 0))
        look("between forward and backward")
        engine.backward(loss)
        look("between backward and step")
    return wrong


def test_the_whole_weights_can_be_had_at_any_time(ranks: Ranks) -> None:
    assert ranks(2, consolidate_at_odd_times, Recipe()) == [[], []]


def names_of_a_shared_module() -> tuple[list[str], list[str]]:
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, torch.nn.Tanh(), shared)
    expected = sorted(model.state_dict())
    zero.shard(model, build_mesh(dp=-1))
    return sorted(zero.consolidated_state_dict(model, rank=None)), expected


def test_the_whole_weights_have_every_name_that_torch_gives_them(ranks: Ranks) -> None:
    """A module in two places has two names in torch's state_dict(), and loading into such a model asks for both."""
    for found, expected in ranks(2, names_of_a_shared_module):
        assert found == expected


def who_gets_them(recipe: Recipe) -> list[int]:
    engine = build_engine(recipe, stage=3)
    return [len(engine.consolidated_state_dict(rank=rank)) for rank in (0, 1, None)]


def test_only_the_rank_that_asks_gets_the_whole_weights(ranks: Ranks) -> None:
    count = len(Recipe().build().state_dict())
    assert ranks(2, who_gets_them, Recipe()) == [[count, 0, count], [0, count, count]]
