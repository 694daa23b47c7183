"""A bucket makes every legal move and no other, its state says what memory lives, and all of it ends with the model."""

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from parity import SMALL_NUMEL, Recipe, build_engine
from torch import nn

from zcore import zero
from zcore.core.errors import StateError
from zcore.core.mesh import build_mesh
from zcore.core.testing import simulated_world
from zcore.zero.bucket import MOVES, Bucket, ParamState
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
UNINITIALIZED, SHARDED = ParamState.UNINITIALIZED, ParamState.SHARDED
INFLIGHT, AVAILABLE = ParamState.INFLIGHT, ParamState.AVAILABLE

# What leads where, by the method that does it.
REQUESTS: dict[str, tuple[ParamState, Callable[[Bucket], None]]] = {
    "seal": (SHARDED, Bucket.seal),
    "gather": (INFLIGHT, Bucket.gather),
    "wait": (AVAILABLE, Bucket.wait),
    "reshard": (SHARDED, Bucket.reshard),
}
LEGAL = [("seal", UNINITIALIZED), ("gather", SHARDED), ("wait", INFLIGHT), ("reshard", AVAILABLE)]
ILLEGAL = [(name, state) for name, state in product(REQUESTS, ParamState) if REQUESTS[name][0] not in MOVES[state]]


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A GPT, sharded as rank 0 of 2."""
    with simulated_world(2):
        yield zero.shard(Recipe().build(), build_mesh(dp=-1), options=zero.ShardingOptions(small_numel=SMALL_NUMEL))


@pytest.fixture
def bucket(model: nn.Module) -> Bucket:
    """The first block's bucket, SHARDED."""
    return next(each for each in sharding_of(model).buckets if each.plan.name == "h.0")


def bring(bucket: Bucket, state: ParamState) -> None:
    """Lead a SHARDED bucket to `state` by its own methods."""
    if state is UNINITIALIZED:
        bucket.state = UNINITIALIZED  # as before its first `seal`
    if state in (INFLIGHT, AVAILABLE):
        bucket.gather()
    if state is AVAILABLE:
        bucket.wait()


@pytest.mark.parametrize(("request_name", "state"), LEGAL)
def test_every_legal_move_works(bucket: Bucket, request_name: str, state: ParamState) -> None:
    bring(bucket, state)
    target, act = REQUESTS[request_name]
    assert target in MOVES[state]
    act(bucket)
    assert bucket.state is target


@pytest.mark.parametrize(("request_name", "state"), ILLEGAL)
def test_every_other_move_is_refused_by_name_and_changes_nothing(
    bucket: Bucket, request_name: str, state: ParamState
) -> None:
    bring(bucket, state)
    with pytest.raises(StateError, match=rf"'h\.0' is {state.name} and cannot become [A-Z]+; .* it can only become"):
        REQUESTS[request_name][1](bucket)
    assert bucket.state is state


def test_a_bucket_whose_copy_is_current_is_available_without_a_gather() -> None:
    with simulated_world(2):
        model = zero.shard(Recipe().build(), build_mesh(dp=-1), stage=2)
        bucket = sharding_of(model).buckets[0]
        bucket.gather()
        bucket.wait()
        bucket.reshard()
        traffic = sharding_of(model).groups.gather.traffic
        traffic.clear()
        bucket.gather()
        assert bucket.state is AVAILABLE
        assert traffic.calls["all_gather"] == 0


def test_no_state_is_a_dead_end_and_none_leads_back_to_the_beginning() -> None:
    assert set(MOVES) == set(ParamState)
    assert all(MOVES.values())
    assert all(UNINITIALIZED not in targets for targets in MOVES.values())


def test_the_state_says_what_is_registered_and_what_memory_lives(model: nn.Module, bucket: Bucket) -> None:
    linear = model.h[0].down  # the last one of the bucket: rank 0 holds less than all of it
    whole_bytes, shard_bytes = bucket.plan.layout.numel * 4, bucket.plan.layout.slice_numel * 4

    def look() -> tuple[bool, int, int]:
        is_shard = isinstance(linear.weight, ShardedParameter)
        return (
            is_shard,
            bucket.memory.gathered.untyped_storage().nbytes(),
            bucket.memory.master.untyped_storage().nbytes(),
        )

    assert look() == (True, 0, shard_bytes)
    bucket.gather()
    assert look() == (True, whole_bytes, shard_bytes)
    bucket.wait()
    assert look() == (True, whole_bytes, shard_bytes)
    bucket.show_whole()
    assert look() == (False, whole_bytes, shard_bytes)
    assert linear.weight.shape == (24, 96)
    bucket.reshard()
    assert look() == (True, 0, shard_bytes)
    assert linear.weight.detach().numel() < 24 * 96 == linear.weight.numel()


def test_tied_parameters_change_together(model: nn.Module) -> None:
    bucket = next(each for each in sharding_of(model).buckets if any(p.shard.fqn == "wte.weight" for p in each.params))
    assert model.wte.weight is model.head.weight
    shard = model.wte.weight
    bucket.gather()
    bucket.wait()
    bucket.show_whole()
    assert model.wte.weight is model.head.weight
    assert model.wte.weight is not shard
    bucket.reshard()
    assert model.wte.weight is model.head.weight
    assert model.wte.weight is shard


def states_in_a_step(recipe: Recipe) -> list[str]:
    """Where a step of stage 3 leaves buckets that it should not."""
    engine = build_engine(recipe, stage=3)
    transient = [bucket for bucket in engine.sharding.buckets if bucket.is_transient]
    assert len(transient) == 4  # two blocks; token embeddings, and positions, which are frozen
    wrong = []

    def expect_rest(when: str) -> None:
        awake = [bucket for bucket in engine.sharding.buckets if bucket.state is not SHARDED]
        wrong.extend(f"{bucket.plan.name} is {bucket.state.name} {when}" for bucket in awake)
        if engine.sharding.ledger.live_bytes:
            wrong.append(f"{engine.sharding.ledger.live_bytes} bytes live {when}")

    for step in range(2):
        expect_rest("at the start")
        loss = engine(**recipe.batch(step, 0))
        live = [bucket.plan.name for bucket in transient if bucket.state is AVAILABLE]
        if len(live) == len(transient):
            wrong.append("all blocks live after the forward")
        engine.backward(loss)
        expect_rest("after the backward")
        engine.step()
        with torch.no_grad():
            engine(**recipe.batch(step, 0))
        expect_rest("after a forward without gradient")
    return wrong


def test_after_a_step_nothing_is_gathered(ranks: Ranks) -> None:
    assert ranks(2, states_in_a_step, Recipe(num_groups=1)) == [[], []]


def end_of(recipe: Recipe, stage: int, trains: bool) -> list[str]:
    """Flat tensors that outlive their model, without help of the garbage collector."""
    engine = build_engine(recipe, stage=stage)
    if trains:
        for step in range(2):
            engine.backward(engine(**recipe.batch(step, 0)))
            engine.step()
        blocks = engine.module.get_submodule("h")
        assert isinstance(blocks, nn.ModuleList)
        blocks[0](torch.ones(1, 4, blocks[0].get_submodule("ln_1").weight.numel()))  # by itself, without a backward
        del blocks
    flats: dict[str, weakref.ref[torch.Tensor]] = {}
    for bucket in engine.sharding.buckets:
        flats[f"{bucket.plan.name} gathered"] = weakref.ref(bucket.memory.gathered)
        flats[f"{bucket.plan.name} master"] = weakref.ref(bucket.memory.master)
        if bucket.gradients is not None and bucket.gradients.reduced is not None:
            flats[f"{bucket.plan.name} reduced"] = weakref.ref(bucket.gradients.reduced)
    assert all(flat() is not None for flat in flats.values())
    del engine, bucket
    return [name for name, flat in flats.items() if flat() is not None]


def ends_of_all(recipe: Recipe) -> dict[str, list[str]]:
    gc.collect()
    gc.disable()
    return {
        f"stage {stage}{' trained' if trains else ''}": end_of(recipe, stage, trains)
        for stage in range(4)
        for trains in (False, True)
    }


def test_all_memory_is_free_when_engine_and_model_are_gone_without_the_garbage_collector(ranks: Ranks) -> None:
    for found in ranks(2, ends_of_all, Recipe()):
        assert found == {label: [] for label in found}
