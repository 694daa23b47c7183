"""The loss scale follows overflows as fp16's keys say, and a step that overflowed on one rank is skipped on all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from parity import Recipe, config_of, part_of

from zcore import zero
from zcore.core.errors import ConfigError, NonFiniteError
from zcore.core.testing import RankFailed
from zcore.zero.loss_scale import LossScale, LossScaler

Ranks = Callable[..., Any]


def follow(policy: LossScale, steps: str) -> list[float]:
    """The scale after each step: `o` overflows, `.` is clean."""
    scaler = LossScaler(policy)
    scales = []
    for step in steps:
        if step == "o":
            scaler.note_overflow()
        else:
            scaler.note_clean_step()
        scales.append(scaler.scale)
    return scales


@pytest.mark.parametrize(
    ("policy", "steps", "scales"),
    [
        (LossScale(16, window=3, hysteresis=2), "oo.o...", [16, 8, 8, 4, 4, 4, 8]),
        (LossScale(16, window=3, hysteresis=2), "o...o", [16, 16, 16, 32, 32]),  # the window refills
        (LossScale(16, window=9, hysteresis=2), "o.o", [16, 16, 8]),
        (LossScale(16, window=9, hysteresis=2, refills_each_clean_step=True), "o.o", [16, 16, 16]),
        (LossScale(16, window=2, hysteresis=1), "......", [16, 32, 32, 64, 64, 128]),
        (LossScale(16, is_dynamic=False), "oo....", [16] * 6),
        (LossScale(5, minimum=3, hysteresis=1), "o", [3]),
    ],
)
def test_the_scale_follows_overflows_and_clean_windows(policy: LossScale, steps: str, scales: list[float]) -> None:
    assert follow(policy, steps) == scales


def test_a_scale_that_bottoms_out_ends_the_run_in_words() -> None:
    with pytest.raises(NonFiniteError, match=r"even at the smallest loss scale, 1,.*learning rate, or set bf16"):
        follow(LossScale(4, hysteresis=2), "ooooo")
    with pytest.raises(ConfigError, match="begins at 1, below its minimum of 2"):
        LossScale(1, minimum=2)


@hypothesis.given(st.text("o.", max_size=60), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 60))
def test_a_saved_scale_goes_on_as_if_never_saved(
    steps: str, window: int, hysteresis: int, refills: bool, cut: int
) -> None:
    policy = LossScale(2.0**70, window=window, hysteresis=hysteresis, refills_each_clean_step=refills)
    whole, first, second = LossScaler(policy), LossScaler(policy), LossScaler(policy)
    for index, step in enumerate(steps):
        if index == cut:
            second.load_state_dict(first.state_dict())
        for scaler in (whole, first if index < cut else second):
            scaler.note_overflow() if step == "o" else scaler.note_clean_step()
    if cut < len(steps):
        assert second.state_dict() == whole.state_dict()


FP16 = Recipe("mlp", compute=torch.float16)


def fp16_engine(stage: int, **keys: Any) -> zero.Engine:
    config = config_of(FP16, stage=stage)
    config["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 3, **keys}
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_min_lr": 1e-3}}
    return zero.initialize(FP16.build(), config)


def step_with(engine: zero.Engine, number: int, *, factor: float = 1.0) -> None:
    batch = part_of(FP16.batch(number, 0), part=engine.dp_rank, parts=engine.dp_size)
    loss = engine(**batch)
    engine.backward(loss * factor)
    engine.step()


def overflow_on_one_rank(stage: int, folder: str) -> dict[str, Any]:
    """Of the third step on one rank only; the loss itself stays finite."""
    engine = fp16_engine(stage)
    seen: dict[str, Any] = {"applied": [], "scales": [], "lr": []}
    for number in range(6):
        before = {name: value.clone() for name, value in engine.sharding.masters.items()}
        step_with(engine, number, factor=1e30 if number == 2 and engine.dp_rank == engine.dp_size - 1 else 1.0)
        changed = [name for name, value in engine.sharding.masters.items() if not torch.equal(value, before[name])]
        seen["applied"].append(engine.was_step_applied())
        seen["scales"].append(engine.loss_scale)
        seen["lr"].append(engine.get_lr()[0])
        assert bool(changed) == engine.was_step_applied()
        if number == 3:
            engine.save_checkpoint(folder)
    seen["counts"] = engine.global_steps, engine.skipped_steps, engine.micro_steps
    at_the_end = engine.consolidated_state_dict(rank=None)
    engine.load_checkpoint(folder)
    for number in (4, 5):
        step_with(engine, number)
    again = engine.consolidated_state_dict(rank=None)
    seen["resumed"] = engine.loss_scale, all(torch.equal(again[name], value) for name, value in at_the_end.items())
    return seen


@pytest.mark.parametrize("stage", range(4))
def test_an_overflow_on_one_rank_is_skipped_on_all_and_goes_on(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    first, second = ranks(2, overflow_on_one_rank, stage, str(tmp_path))
    assert first == second
    assert first["applied"] == [True, True, False, True, True, True]
    assert first["scales"] == [16, 16, 8, 8, 8, 16]
    assert first["lr"][1] == first["lr"][2] < first["lr"][3]  # a skipped step is none of the schedule's
    assert first["counts"] == (5, 1, 6)
    assert first["resumed"] == (16, True)


def gradients_seen(scale: float) -> list[torch.Tensor]:
    engine = fp16_engine(3, loss_scale=scale)
    batch = part_of(FP16.batch(0, 0), part=engine.dp_rank, parts=engine.dp_size)
    engine.backward(engine(**batch))
    return [fragment.grad.clone() for fragment in engine.sharding.fragments.values() if fragment.grad is not None]


def gradients_at_two_scales() -> bool:
    small, large = gradients_seen(256.0), gradients_seen(1024.0)
    return all(torch.allclose(one, other, rtol=2**-9, atol=2**-24) for one, other in zip(small, large, strict=True))


def test_gradients_are_handed_out_without_the_scale(ranks: Ranks) -> None:
    assert ranks(2, gradients_at_two_scales) == [True] * 2


def sink_to_the_bottom() -> None:
    engine = fp16_engine(2, min_loss_scale=4.0)
    for number in range(5):
        step_with(engine, number, factor=float("inf"))


def test_losses_that_are_never_finite_end_the_run_on_every_rank(ranks: Ranks) -> None:
    with pytest.raises(RankFailed) as caught:
        ranks(2, sink_to_the_bottom)
    for failure in caught.value.failures:
        assert failure.type_name == "NonFiniteError"
        assert "overflow fp16 even at the smallest loss scale, 4" in failure.message
    assert len(caught.value.failures) == 2


@pytest.mark.parametrize("other", ["fp16", "torch_autocast"])
def test_two_ways_of_16_bits_are_refused(other: str) -> None:
    config = {"bf16": {"enabled": True}, other: {"enabled": True}}
    with pytest.raises(ConfigError, match=f"bf16 and {other} are enabled"):
        zero.TrainingConfig.read(config).settle(dp_size=1)


def test_the_keys_are_deepspeeds() -> None:
    keys = {
        "enabled": "auto", "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 3,
        "consecutive_hysteresis": True, "min_loss_scale": 2,
    }  # fmt: skip
    settled = zero.TrainingConfig.read({"fp16": keys}).settle(dp_size=2)
    assert settled.fp16.enabled is False
    expected = LossScale(2.0**12, window=500, hysteresis=3, refills_each_clean_step=True, minimum=2)
    assert settled.fp16.loss_scaling == expected
    fixed = zero.TrainingConfig.read({"fp16": {"enabled": True, "loss_scale": 128}}).settle(dp_size=1)
    assert fixed.fp16.loss_scaling == replace(LossScale(), initial=128.0, is_dynamic=False)
