"""How often and with how many bytes each row of the table communicates in a step: counted, and equal to the papers.

Psi is the model's size in bytes (arXiv 1910.02054, section 7). Per optimizer step, per rank: stage 0 all-reduces Psi,
stages 1 and 2 reduce-scatter Psi and all-gather Psi, stage 3 all-gathers Psi twice and reduce-scatters Psi. Beside that
go two small all-reduces: which parameters had a gradient, and the norm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from parity import Recipe, build_engine, part_of
from torch import Tensor, nn

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.zero.bucket import ParamState
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
Counts = dict[str, dict[str, tuple[int, int]]]  # group, collective: calls and bytes
BLOCKS = ("num_blocks", 4)  # more than may be gathered at once
TIED = Recipe(model_options=(BLOCKS,))
UNTIED = Recipe(model_options=(BLOCKS, ("is_tied", False)))


@dataclass(frozen=True)
class Measured:
    """One step, by half; and what the plan says about it."""

    forward: Counts
    backward: Counts
    step: Counts
    num_buckets: dict[str, int]  # of a kind: gathered, trainable ...
    bucket_bytes: dict[str, int]


def take(engine: zero.Engine) -> Counts:
    """What was sent since the last call."""
    taken: Counts = {}
    for group, traffic in engine.traffic().items():
        taken[group] = {op: (calls, traffic.payload_bytes[op]) for op, calls in traffic.calls.items()}
        traffic.clear()
    return taken


def kinds(engine: zero.Engine) -> dict[str, list[Any]]:
    buckets = engine.sharding.buckets
    return {
        "all": list(buckets),
        "gathered": [each for each in buckets if each.is_transient],
        "whole": [each for each in buckets if not each.is_transient],
        "trainable": [each for each in buckets if each.plan.trainable],
        "trainable whole": [each for each in buckets if each.plan.trainable and not each.is_transient],
    }


def run_step(engine: zero.Engine, recipe: Recipe, step: int, *, held_back: int = 0) -> Measured:
    """The first `held_back` micro-batches inside no_sync(); halves are added up over micro-batches."""
    take(engine)
    forward: Counts = {}
    backward: Counts = {}
    stepping: Counts = {}
    for micro in range(recipe.accumulation):
        batch = part_of(recipe.batch(step, micro), part=engine.dp_rank, parts=engine.dp_size)
        if micro < held_back:
            with engine.no_sync():
                loss = engine(**batch)
                add(forward, take(engine))
                engine.backward(loss)
        else:
            loss = engine(**batch)
            add(forward, take(engine))
            engine.backward(loss)
        add(backward, take(engine))
        engine.step()
        add(stepping, take(engine))
    by_kind = kinds(engine)
    return Measured(
        forward,
        backward,
        stepping,
        {kind: len(buckets) for kind, buckets in by_kind.items()},
        {kind: sum(each.memory.gathered_bytes for each in buckets) for kind, buckets in by_kind.items()},
    )


def add(total: Counts, more: Counts) -> None:
    for group, ops in more.items():
        for op, (calls, num_bytes) in ops.items():
            before = total.setdefault(group, {}).get(op, (0, 0))
            total[group][op] = before[0] + calls, before[1] + num_bytes


def run_steps(recipe: Recipe, arguments: dict[str, Any], num_steps: int, held_back: int) -> list[Measured]:
    engine = build_engine(recipe, **arguments)
    return [run_step(engine, recipe, step, held_back=held_back) for step in range(num_steps)]


def run_rows(rows: list[tuple[Recipe, dict[str, Any]]], num_steps: int = 3, held_back: int = 0) -> list[list[Measured]]:
    return [run_steps(recipe, arguments, num_steps, held_back) for recipe, arguments in rows]


def run_with_and_without_no_sync(rows: list[tuple[Recipe, dict[str, Any]]]) -> list[list[list[Measured]]]:
    return [run_rows(rows, num_steps=2, held_back=held_back) for held_back in (0, 2)]


def of(counts: Counts, group: str, op: str) -> tuple[int, int]:
    return counts.get(group, {}).get(op, (0, 0))


def calls(counts: Counts) -> dict[str, int]:
    """Number of calls per collective, over all groups."""
    total: dict[str, int] = {}
    for ops in counts.values():
        for op, (number, _) in ops.items():
            total[op] = total.get(op, 0) + number
    return {op: number for op, number in total.items() if number}


@pytest.fixture(scope="module")
def stages(ranks: Ranks) -> list[list[Measured]]:
    """Three steps of each stage on 2 ranks, the same on both."""
    first, second = ranks(2, run_rows, [(TIED, {"stage": stage}) for stage in range(4)])
    assert first == second
    found: list[list[Measured]] = first
    return found


def test_stage_0_reduces_the_whole_gradient_once_and_gathers_nothing(stages: list[list[Measured]]) -> None:
    for step in stages[0][1:]:
        num, num_bytes = of(step.backward, "reduce", "all_reduce")
        assert num == step.num_buckets["trainable"] + 1  # and which parameters had a gradient
        assert num_bytes == pytest.approx(step.bucket_bytes["trainable"], rel=0.02)
        assert calls(step.forward) == {}
        assert calls(step.step) == {"all_reduce": 1}  # the norm
        assert calls(step.backward) == {"all_reduce": num}


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_scatter_psi_and_gather_psi(stages: list[list[Measured]], stage: int) -> None:
    for step in stages[stage][1:]:
        psi = step.num_buckets["trainable"], step.bucket_bytes["trainable"]
        assert of(step.backward, "reduce", "reduce_scatter") == psi
        assert of(step.forward, "gather", "all_gather") == psi  # what the last step changed: not the frozen
        assert calls(step.forward) == {"all_gather": psi[0]}
        assert calls(step.backward) == {"reduce_scatter": psi[0], "all_reduce": 1}
        assert calls(step.step) == {"all_reduce": 1}


def test_stage_3_gathers_each_bucket_once_forward_at_most_once_backward_and_scatters_once(
    stages: list[list[Measured]],
) -> None:
    for step in stages[3][1:]:
        buckets = kinds_with_bytes(step)
        forward, again = of(step.forward, "gather", "all_gather"), of(step.backward, "gather", "all_gather")
        small = buckets["trainable whole"]  # refreshed in each forward, like all parameters of stages 1 and 2
        assert forward[0] + again[0] <= 2 * buckets["gathered"][0] + small[0]
        assert forward[0] >= buckets["gathered"][0] + small[0]
        # What the backward begins with may be on its way, or still there, at the end of the forward.
        assert forward[0] <= buckets["gathered"][0] + small[0] + 1
        assert 1 <= again[0] <= buckets["gathered"][0]
        assert again[1] <= buckets["gathered"][1]
        assert of(step.backward, "reduce", "reduce_scatter") == buckets["trainable"]
        assert calls(step.step) == {"all_reduce": 1}


def kinds_with_bytes(step: Measured) -> dict[str, tuple[int, int]]:
    return {kind: (number, step.bucket_bytes[kind]) for kind, number in step.num_buckets.items()}


def test_later_steps_are_equal_and_the_first_one_agrees_on_an_order(stages: list[list[Measured]]) -> None:
    for first, second, third in stages:
        assert second == third
        assert first.step == second.step
        assert of(first.backward, "reduce", "broadcast")[0] == 1
        assert of(second.backward, "reduce", "broadcast")[0] == 0
        for op in ("reduce_scatter", "all_reduce"):
            assert of(first.backward, "reduce", op) == of(second.backward, "reduce", op)


def test_volumes_of_the_stages_are_in_the_proportions_of_the_paper(stages: list[list[Measured]]) -> None:
    """An all-reduce is a reduce-scatter and an all-gather: 2 Psi in stages 0 to 2, 3 Psi in stage 3.

    Less what the backward finds still there from the forward: here the head and one block of four.
    """
    psi = stages[0][1].bucket_bytes["trainable"]
    volumes = []
    for stage in range(4):
        step = stages[stage][1]
        volume = 0
        for counts in (step.forward, step.backward):
            for group in counts:
                for op, (_, num_bytes) in counts[group].items():
                    volume += num_bytes * (2 if op == "all_reduce" else 1)
        volumes.append(volume / psi)
    assert volumes[:3] == [pytest.approx(2, rel=0.03)] * 3
    frozen = 2 * (stages[3][1].bucket_bytes["all"] - psi) / psi
    assert 2.4 < volumes[3] <= 3 + frozen + 0.03


def test_hybrid_reduces_each_shard_once_along_the_replicas(ranks: Ranks) -> None:
    rows = [(Recipe(), {"stage": stage, "shard_size": 2}) for stage in (1, 3)]
    for of_rank in ranks(4, run_rows, rows):
        for steps in of_rank:
            step = steps[-1]
            num, num_bytes = of(step.backward, "replicate", "all_reduce")
            assert num == step.num_buckets["trainable"] + 1
            assert num_bytes == pytest.approx(step.bucket_bytes["trainable"] / 2, rel=0.02)  # shards, not whole buckets
            assert of(step.backward, "reduce", "reduce_scatter")[0] == step.num_buckets["trainable"]
            assert calls(step.step) == {"all_reduce": 2}  # the norm, along both axes
            assert of(step.forward, "replicate", "all_gather") == (0, 0)  # gathers stay inside a shard group


def test_no_sync_leaves_one_reduction_for_all_micro_batches(ranks: Ranks) -> None:
    rows = [(Recipe(accumulation=3), {"stage": stage}) for stage in range(4)]
    always, held = ranks(2, run_with_and_without_no_sync, rows)[0]
    for stage in range(4):
        trainable = always[stage][1].num_buckets["trainable"]
        op = "all_reduce" if stage == 0 else "reduce_scatter"
        notes = 1 if stage == 0 else 0
        every_backward = 3 if stage >= 2 else 1
        assert of(always[stage][1].backward, "reduce", op)[0] == every_backward * trainable + notes
        assert of(held[stage][1].backward, "reduce", op)[0] == trainable + notes
        assert of(held[stage][1].step, "reduce", "all_reduce")[0] == 1
        gathers = [of(each[stage][1].forward, "gather", "all_gather") for each in (always, held)]
        assert gathers[0] == gathers[1]


def test_stages_0_to_2_gather_once_per_optimizer_step_however_many_micro_batches(ranks: Ranks) -> None:
    rows = [(Recipe(accumulation=accumulation), {"stage": 2}) for accumulation in (1, 3)]
    once, thrice = ranks(2, run_rows, rows)[0]
    assert once[2].forward == thrice[2].forward


WAYS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "tied": (TIED, {}),
    "untied": (UNTIED, {}),
    "bf16": (replace(TIED, compute=torch.bfloat16), {}),
    "no overlap": (TIED, {"overlap_comm": False}),
    "much prefetch": (TIED, {"stage3_prefetch_bucket_size": 10**9}),
}


@pytest.fixture(scope="module")
def ways(ranks: Ranks) -> dict[str, Measured]:
    """The third step of stage 3."""
    rows = [(recipe, {"stage": 3, **arguments}) for recipe, arguments in WAYS.values()]
    return {way: steps[2] for way, steps in zip(WAYS, ranks(2, run_rows, rows)[0], strict=True)}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_overlap_gathers_or_reduces_a_bucket_too_often(ways: dict[str, Measured], way: str) -> None:
    step = ways[way]
    assert of(step.backward, "reduce", "reduce_scatter")[0] == step.num_buckets["trainable"]
    gathers = of(step.forward, "gather", "all_gather")[0] + of(step.backward, "gather", "all_gather")[0]
    assert gathers <= 2 * step.num_buckets["gathered"] + step.num_buckets["trainable whole"]


def test_a_tied_weight_is_reduced_once(ways: dict[str, Measured]) -> None:
    """Its gradient has two parts, one from each end of the model; the reduction waits for both."""
    head_bytes = ways["untied"].bucket_bytes["trainable"] - ways["tied"].bucket_bytes["trainable"]
    assert head_bytes == pytest.approx(61 * 24 * 4, rel=0.05)
    reduced = [of(ways[way].backward, "reduce", "reduce_scatter")[1] for way in ("untied", "tied")]
    assert reduced[0] - reduced[1] == head_bytes


def test_a_frozen_bucket_is_never_reduced(ways: dict[str, Measured]) -> None:
    step = ways["tied"]
    assert step.num_buckets["all"] > step.num_buckets["trainable"]
    assert of(step.backward, "reduce", "reduce_scatter")[1] == step.bucket_bytes["trainable"]


def test_bf16_gathers_half_the_bytes_and_reduces_in_fp32(ways: dict[str, Measured]) -> None:
    full, mixed = ways["tied"], ways["bf16"]
    assert of(mixed.forward, "gather", "all_gather")[1] * 2 == of(full.forward, "gather", "all_gather")[1]
    assert of(mixed.backward, "reduce", "reduce_scatter") == of(full.backward, "reduce", "reduce_scatter")


def test_what_returns_soon_is_kept_unless_the_limits_forbid(ranks: Ranks) -> None:
    """A block called twice in a row of others is gathered once if it fits, and again if it must go in between."""
    recipe = Recipe("odd")
    rows = [(recipe, {"stage": 3}), (recipe, {"stage": 3, "stage3_max_reuse_distance": 0})]
    kept, let_go = ranks(2, run_rows, rows)[0]
    count = of(kept[2].forward, "gather", "all_gather")[0]
    assert count == kept[2].num_buckets["gathered"] + kept[2].num_buckets["trainable whole"]
    assert of(let_go[2].forward, "gather", "all_gather")[0] >= count


Seen = list[tuple[str, str, str]]


def watch_prefetch(recipe: Recipe, zero_options: dict[str, Any]) -> Seen:
    """(pass, block that runs, state of the next block's bucket) as the second step goes."""
    engine = build_engine(recipe, stage=3, **zero_options)
    model = engine.module
    by_name = {bucket.plan.name: bucket for bucket in engine.sharding.buckets}
    seen: Seen = []

    def watch(name: str, following: str, half: str) -> Callable[..., None]:
        def look(*_: object) -> None:
            seen.append((half, name, by_name[following].state.name))

        return look

    num_blocks = len(model.h)
    for step in range(2):
        if step == 1:
            for index in range(num_blocks - 1):
                model.h[index].register_forward_pre_hook(watch(f"h.{index}", f"h.{index + 1}", "forward"))
            for index in range(1, num_blocks):
                # Among the hooks of the node that made a block's output, this one runs after the one that gathers.
                def hook(_: nn.Module, __: object, out: Tensor, index: int = index) -> None:
                    assert out.grad_fn is not None
                    out.grad_fn.register_prehook(watch(f"h.{index}", f"h.{index - 1}", "backward"))

                model.h[index].register_forward_hook(hook)
        engine.backward(engine(**part_of(recipe.batch(step, 0), part=engine.dp_rank, parts=engine.dp_size)))
        engine.step()
    return seen


@pytest.fixture(scope="module")
def watched(ranks: Ranks) -> list[Seen]:
    """Of each rank, with the default options."""
    found: list[Seen] = ranks(2, watch_prefetch, TIED, {})
    return found


def test_the_next_block_is_on_its_way_before_it_is_used(watched: list[Seen]) -> None:
    for seen in watched:
        forward = [(name, state) for half, name, state in seen if half == "forward"]
        assert forward == [(f"h.{index}", ParamState.INFLIGHT.name) for index in range(3)]


def test_the_next_block_of_the_backward_is_on_its_way_or_still_there(watched: list[Seen]) -> None:
    for seen in watched:
        backward = [(name, state) for half, name, state in seen if half == "backward"]
        assert [name for name, _ in backward] == ["h.3", "h.2", "h.1"]
        assert [(name, state) for name, state in backward if state == ParamState.SHARDED.name] == []


@pytest.mark.parametrize("options", [{"overlap_comm": False}, {"stage3_prefetch_bucket_size": 0}])
def test_without_overlap_or_budget_nothing_is_started_ahead(ranks: Ranks, options: dict[str, Any]) -> None:
    for seen in ranks(2, watch_prefetch, TIED, options):
        assert {state for half, _, state in seen if half == "forward"} == {ParamState.SHARDED.name}


class Skipping(nn.Module):
    """Blocks in an order that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(4))

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for index in order:
            x = self.blocks[index](x)
        return x.square().mean()


def gathers_of_orders(orders: list[list[int]]) -> list[tuple[int, int]]:
    """By step: all-gathers of the forward and of the backward."""
    options = zero.ShardingOptions(small_numel=0)
    torch.manual_seed(0)
    model = zero.shard(Skipping(), build_mesh(dp=-1), options=options)
    traffic = sharding_of(model).groups.gather.traffic
    counts = []
    for order in orders:
        traffic.clear()
        loss = model(torch.ones(2, 16), order)
        forward = traffic.calls["all_gather"]
        loss.backward()
        counts.append((forward, traffic.calls["all_gather"] - forward))
    return counts


def test_another_order_gathers_what_it_uses_and_the_one_after_is_planned_again(ranks: Ranks) -> None:
    usual, other, short = [0, 1, 2, 3], [0, 2, 1, 3], [0, 3]
    orders = [usual, usual, other, other, short, short, usual, usual]
    for counts in ranks(2, gathers_of_orders, orders):
        totals = [forward + backward for forward, backward in counts]
        most = [7, 7, 7, 7, 3, 3, 7, 7]  # each block twice, but for the last one, which is still there
        again = (1, 3, 5, 7)  # steps in the order of the one before
        assert all(totals[index] <= most[index] for index in (0, *again))
        assert all(totals[index] >= len(set(used)) for index, used in enumerate(orders))
        # A step that leaves the recorded order may have started one bucket that it does not use.
        assert all(totals[index] <= most[index] + 1 for index in (2, 4, 6))


def test_replaced_recipes_are_what_they_claim() -> None:
    assert replace(UNTIED, model_options=(BLOCKS,)) == TIED
    assert UNTIED.build().head.weight is not UNTIED.build().wte.weight
