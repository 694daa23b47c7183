"""hpZ: a second copy of the parameters trains the same bits, and after one gather a step none crosses its groups."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import Recipe, bits_that_differ, by_row, train_rows
from tiny_models import TinyModel, batch, digest, listen, refusal, settings, train_step, train_steps

from zcore import zero
from zcore.zero.placement import TABLE, state_bytes

Ranks = Callable[..., Any]
HPZ = {"stage": 3, "zero_hpz_partition_size": 2}


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_no_bit_changes(ranks: Ranks, compute: torch.dtype | None) -> None:
    recipe = Recipe("gpt", steps=3, accumulation=2, clip=0.5, compute=compute)
    plain, hpz = by_row(ranks(4, train_rows, [(recipe, {"stage": 3}), (recipe, HPZ)]))
    assert bits_that_differ(hpz, plain) == []


def count() -> tuple[dict[str, int], dict[str, int], int]:
    options = {**HPZ, "stage3_param_persistence_threshold": 16}
    engine = zero.initialize(TinyModel(), settings(3, gradient_accumulation_steps=2, zero_optimization=options))
    train_steps(engine, range(2))
    before = {name: each.calls["all_gather"] for name, each in engine.traffic().items()}
    seen = []
    for step in (2, 3):
        train_step(engine, step)
        after = {name: each.calls["all_gather"] for name, each in engine.traffic().items()}
        seen.append({name: after[name] - before[name] for name in ("gather", "inner")})
        before = after
    return seen[0], seen[1], sum(bucket.is_transient for bucket in engine.sharding.buckets)


def test_a_step_gathers_once_over_all_ranks_and_then_inside_the_groups(ranks: Ranks) -> None:
    first, second, num_transient = ranks(4, count)[0]
    assert first["gather"] == num_transient + 1  # and the small ones, which are kept whole
    assert first["inner"] > 0
    assert second["gather"] == 0
    assert second["inner"] >= num_transient


def edit_and_load(folder: str) -> None:
    """Whatever changes values makes the second copy be made anew."""
    engines = []
    for options in ({"stage": 3}, HPZ):
        options = {**options, "stage3_param_persistence_threshold": 16}
        engine = zero.initialize(TinyModel(), settings(3, zero_optimization=options))
        train_steps(engine, range(2))
        path = f"{folder}/{len(engines)}"
        engine.save_checkpoint(path)
        train_steps(engine, range(2, 4))
        engine.load_checkpoint(path)
        engine(**batch(9))
        with zero.GatheredParameters(engine.module.head.weight, modifier_rank=0) as (whole,), torch.no_grad():
            if engine.global_rank == 0:
                whole.mul_(1.5)
        train_steps(engine, range(4, 6))
        engines.append(engine)
    assert digest(engines[0]) == digest(engines[1])


def test_edits_and_checkpoints_reach_the_second_copy(ranks: Ranks, tmp_path: Any) -> None:
    ranks(4, edit_and_load, str(tmp_path))


def measure() -> tuple[int, int, int]:
    reports = []
    for options in ({"stage": 3}, HPZ):
        options = {**options, "stage3_param_persistence_threshold": 16}
        engine = zero.initialize(TinyModel(), settings(3, zero_optimization=options, bf16={"enabled": True}))
        train_step(engine, 0)
        reports.append(engine.memory_report().ranks[0].parameters_bytes)
    numel = sum(bucket.plan.layout.numel for bucket in engine.sharding.buckets if bucket.is_transient)
    return reports[0], reports[1], numel


def test_the_second_copy_is_counted(ranks: Ranks) -> None:
    plain, hpz, numel = ranks(4, measure)[0]
    assert hpz - plain == 2 * numel // 2
    sizes = {"numel": 1000, "shard_size": 4, "compute_bytes": 2, "master_bytes": 4, "optimizer_bytes": 8}
    assert state_bytes(TABLE[3], **sizes, secondary_size=2) - state_bytes(TABLE[3], **sizes) == 1000
    assert state_bytes(TABLE[2], **sizes, secondary_size=2) == state_bytes(TABLE[2], **sizes)


def misconfigure() -> tuple[str, list[str]]:
    message = refusal(
        lambda: zero.initialize(TinyModel(), settings(3, zero_optimization={"stage": 3, "zero_hpz_partition_size": 3}))
    )
    records = listen()
    for options in ({"stage": 2, "zero_hpz_partition_size": 2}, {"stage": 3, "zero_hpz_partition_size": 4}):
        engine = zero.initialize(TinyModel(), settings(3, zero_optimization=options))
        assert "inner" not in engine.traffic()
    return message, [line for line in records.lines if "no effect" in line]


def test_sizes_that_cannot_be_are_refused_and_those_without_effect_told(ranks: Ranks) -> None:
    (message, told), *others = ranks(4, misconfigure)
    assert "zero_hpz_partition_size is 3, which does not divide the 4 ranks" in message
    assert [each[0] for each in others] == [message] * 3
    assert ["below stage 3" in told[0], "all ranks that share" in told[1]] == [True, True]
    assert [each[1] for each in others] == [[]] * 3
