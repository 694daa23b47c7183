"""The schedules' numbers, step by step, and what their arguments refuse."""

import json
import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

from zcore.core.errors import ConfigError
from zcore.zero.schedules.building import build_scheduler
from zcore.zero.schedules.cycles import LRRangeTest, OneCycle
from zcore.zero.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

LOG2, LOG3 = math.log(2) / math.log(4), math.log(3) / math.log(4)  # ln(i + 1) / ln(n) for n = 4
COS1, COS2, COS3 = ((1 + math.cos(math.pi * p)) / 2 for p in (0.25, 0.5, 0.75))  # p = (i - n + 1) / (T - n)

# (class, parameters besides n = 4, ratios of the way up from the minimum that optimizer steps 1, 2, 3... use)
CURVES = [
    (WarmupLR, {"warmup_type": "log"}, [0, 0, LOG2, LOG3, 1, 1, 1]),
    (WarmupLR, {"warmup_type": "linear"}, [0, 0, 0.25, 0.5, 0.75, 1, 1]),
    (WarmupDecayLR, {"total_num_steps": 8, "warmup_type": "log"}, [0, 0, LOG2, LOG3, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
    (WarmupDecayLR, {"total_num_steps": 6, "warmup_type": "linear"}, [0, 0, 0.25, 0.5, 0.75, 1, 0.5, 0, 0]),
    (WarmupCosineLR, {"total_num_steps": 8, "warmup_type": "log"}, [0, 0, LOG2, LOG3, 1, COS1, COS2, COS3, 0, 0]),
    (WarmupCosineLR, {"total_num_steps": 8, "warmup_type": "linear"}, [0, 0, 0.25, 0.5, 0.75, COS1, COS2, COS3, 0]),
]


def sgd(*lrs: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in lrs])


def lrs_used(scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """What each of the next optimizer steps uses, per group."""
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(("cls", "params", "ratios"), CURVES)
def test_each_optimizer_step_uses_the_lr_of_the_formula(cls, params, ratios):
    limits = {"cos_min_ratio": 0.0} if cls is WarmupCosineLR else {"warmup_min_lr": 0.02, "warmup_max_lr": [0.1, 0.5]}
    scheduler = cls(sgd(0.1, 0.5), warmup_num_steps=4, **params, **limits)
    low = 0.0 if cls is WarmupCosineLR else 0.02
    expected = [[low + (0.1 - low) * ratio, low + (0.5 - low) * ratio] for ratio in ratios]
    for used, wanted in zip(lrs_used(scheduler, len(ratios)), expected, strict=True):
        assert used == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_cosine_starts_at_zero_then_warms_from_its_ratio_and_ends_at_its_floor():
    scheduler = WarmupCosineLR(
        sgd(2.0), 8, warmup_min_ratio=0.2, warmup_num_steps=4, cos_min_ratio=0.1, warmup_type="linear"
    )
    expected = [0, 0.2, 0.4, 0.6, 0.8, 0.1 + 0.9 * COS1, 0.1 + 0.9 * COS2, 0.1 + 0.9 * COS3, 0.1, 0.1]
    assert [lr for (lr,) in lrs_used(scheduler, 10)] == pytest.approx([2.0 * ratio for ratio in expected], rel=1e-12)


def test_warmup_without_a_maximum_returns_each_group_to_its_own_lr():
    assert lrs_used(WarmupLR(sgd(0.1, 0.5), warmup_num_steps=2), 4)[-1] == [0.1, 0.5]


def test_a_warmup_of_one_step_counts_as_two():
    assert lrs_used(WarmupLR(sgd(1.0), warmup_num_steps=1), 4) == lrs_used(WarmupLR(sgd(1.0), warmup_num_steps=2), 4)


@pytest.mark.parametrize(("cls", "params", "ratios"), CURVES)
def test_state_survives_json_and_continues_the_curve(cls, params, ratios):
    whole = lrs_used(cls(sgd(0.1), warmup_num_steps=4, **params), 9)
    first = cls(sgd(0.1), warmup_num_steps=4, **params)
    lrs_used(first, 3)
    second = cls(sgd(0.1), warmup_num_steps=4, **params)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert lrs_used(second, 6) == whole[3:]


def test_last_batch_iteration_resumes_the_curve_there():
    whole = lrs_used(WarmupLR(sgd(1.0), warmup_num_steps=8), 12)
    resumed = build_scheduler("WarmupLR", {"warmup_num_steps": 8, "last_batch_iteration": 3}, sgd(1.0))
    assert lrs_used(resumed, 8) == whole[4:]  # iteration 3 is the fifth optimizer step's


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps is 0"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, "warmup_num_steps is 2.5"),
        ("WarmupLR", {"warmup_type": "cubic"}, "warmup_type is 'cubic'"),
        ("WarmupLR", {"warmup_max_lr": [0.1, 0.2]}, "warmup_max_lr holds 2 values"),
        ("WarmupLR", {"warmup_max_lr": "1e-3"}, "warmup_max_lr is '1e-3'"),
        ("WarmupLR", {"warmup_min_lr": -0.1}, "warmup_min_lr is -0.1"),
        ("WarmupLR", {"warm_up_num_steps": 10}, "Did you mean warmup_num_steps?"),
        ("WarmupDecayLR", {}, "total_num_steps"),
        ("WarmupDecayLR", {"total_num_steps": 0}, "total_num_steps is 0"),
        ("WarmupCosineLR", {"total_num_steps": 9999, "cos_min_ratio": 1.5}, "cos_min_ratio is 1.5"),
        ("WarmupCosLR", {}, "Did you mean WarmupCosineLR?"),
        ("steplr", {"step_size": 1}, "Did you mean StepLR?"),
        ("Optimizer", {}, "'Optimizer', which is no known schedule"),
    ],
)
def test_bad_arguments_are_refused_by_name(name, params, says):
    with pytest.raises(ConfigError) as refused:
        build_scheduler(name, params, sgd(0.1))
    assert says in str(refused.value)


def test_a_run_shorter_than_its_warmup_warns():
    with pytest.warns(UserWarning, match="less than warmup_num_steps"):
        WarmupDecayLR(sgd(0.1), total_num_steps=5, warmup_num_steps=10)


@pytest.mark.parametrize(
    ("name", "params", "cls"),
    [
        ("WarmupDecayLR", {"total_num_steps": 10, "warmup_num_steps": 2}, WarmupDecayLR),
        ("StepLR", {"step_size": 3}, StepLR),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 10}, OneCycleLR),
    ],
)
def test_a_schedule_is_built_by_name(name, params, cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(build_scheduler(name, params, sgd(0.1))) is cls


HALVES = {"cycle_min_lr": 1.0, "cycle_max_lr": 5.0, "cycle_first_step_size": 4, "cycle_second_step_size": 2}
CYCLES = [
    ({}, [1, 2, 3, 4, 5, 3, 1, 1, 1]),
    ({"cycle_first_stair_count": 2, "cycle_second_stair_count": 1}, [1, 1, 3, 3, 5, 1, 1, 1]),
    ({"cycle_first_stair_count": 4}, [1, 2, 3, 4, 5, 3, 1, 1]),  # the second half has as many
    ({"decay_step_size": 2, "decay_lr_rate": 1.0}, [1, 2, 3, 4, 5, 3, 1, 1 / 1.5, 1 / 2, 1 / 2.5]),
    ({"decay_lr_rate": 1.0}, [1, 2, 3, 4, 5, 3, 1, 1]),  # no step size, no decay
]


@pytest.mark.parametrize(("params", "lrs"), CYCLES)
def test_one_cycle_goes_up_down_and_decays(params, lrs):
    scheduler = OneCycle(sgd(0.1), **HALVES, **params)
    assert [lr for (lr,) in lrs_used(scheduler, len(lrs))] == pytest.approx(lrs, rel=1e-12)


def test_momentum_cycles_the_other_way_and_other_betas_stay():
    params = {"cycle_min_mom": 0.7, "cycle_max_mom": 0.9, "decay_step_size": 1, "decay_mom_rate": -0.1}
    optimizer = torch.optim.AdamW([torch.zeros(1)], betas=(0.5, 0.95))
    scheduler = OneCycle(optimizer, **HALVES, **params)
    used = []
    for _ in range(8):
        used.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        scheduler.step()
    assert [first for first, _ in used] == pytest.approx([0.9, 0.85, 0.8, 0.75, 0.7, 0.8, 0.9, 0.81], rel=1e-12)
    assert {second for _, second in used} == {0.95}
    kept = torch.optim.AdamW([torch.zeros(1)], betas=(0.5, 0.95))
    OneCycle(kept, **HALVES, cycle_momentum=False)
    assert kept.param_groups[0]["betas"] == (0.5, 0.95)


@pytest.mark.parametrize(
    ("staircase", "ratios"), [(False, [1, 1.25, 1.5, 1.75, 2, 2.25]), (True, [1, 1, 1.5, 1.5, 2, 2])]
)
def test_a_range_test_raises_every_group(staircase, ratios):
    scheduler = LRRangeTest(
        sgd(0.1, 0.5),
        lr_range_test_min_lr=[0.01, 0.02],
        lr_range_test_step_size=2,
        lr_range_test_step_rate=0.5,
        lr_range_test_staircase=staircase,
    )
    for used, ratio in zip(lrs_used(scheduler, len(ratios)), ratios, strict=True):
        assert used == pytest.approx([0.01 * ratio, 0.02 * ratio], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "params"),
    [("OneCycle", {**HALVES, "decay_step_size": 2, "decay_lr_rate": 0.5}), ("LRRangeTest", {})],
)
def test_cycles_are_built_by_name_and_continue_from_a_saved_state(name, params):
    whole = lrs_used(build_scheduler(name, params, sgd(0.1)), 9)
    first, second = (build_scheduler(name, params, sgd(0.1)) for _ in range(2))
    lrs_used(first, 5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert lrs_used(second, 4) == whole[5:]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("OneCycle", {"cycle_min_lr": 1.0}, "lacks cycle_max_lr, which OneCycle needs"),
        ("WarmupCosineLR", {"warmup_num_steps": 5}, "lacks total_num_steps, which WarmupCosineLR needs"),
        (
            "CyclicLR",
            {"base_lr": 0.1, "max_lr": 1.0, "mode": "odd"},
            "do not fit CyclicLR: mode is invalid.* It takes: base_lr",
        ),
        ("LambdaLR", {}, "takes functions .* pass `lr_scheduler=lambda optimizer: LambdaLR"),
        ("OneCycle", {**HALVES, "cycle_first_step_size": 0}, "cycle_first_step_size is 0; expected .* above 0"),
        ("OneCycle", {**HALVES, "decay_step_size": -1}, "decay_step_size is -1; expected a number of 0 or more"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size is 0"),
        ("LRRangeTest", {"lr_range_test_step": 1}, "Did you mean lr_range_test_step_"),
    ],
)
def test_schedules_that_cannot_be_are_refused_by_name(name, params, message):
    with pytest.raises(ConfigError, match=message):
        build_scheduler(name, params, sgd(0.1))
