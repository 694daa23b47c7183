"""Runs the benchmarks of a step at test size, and judges figures that are made up."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a program of tools/bench, or of one of its rooms; what that does to the paths ends with the test."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])

    def imported(name: str) -> ModuleType:
        return import_module(name)

    return imported


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.1, "high": median + 0.1}


def row(*, peak_bytes: int, formula_bytes: int, times_ddp: float, times_fsdp2: float) -> dict[str, object]:
    memory = {"peak_bytes": peak_bytes, "formula_bytes": formula_bytes}
    return {"memory": memory, "times_ddp": spread(times_ddp), "times_fsdp2": spread(times_fsdp2)}


def test_each_target_names_what_was_found_and_whether_it_holds(load) -> None:
    contenders = {
        "zcore 2": row(peak_bytes=1300, formula_bytes=1000, times_ddp=1.01, times_fsdp2=0.5),
        "zcore 3": row(peak_bytes=1140, formula_bytes=800, times_ddp=1.0, times_fsdp2=0.7),
        "FSDP2": row(peak_bytes=1200, formula_bytes=800, times_ddp=2.0, times_fsdp2=1.0),
    }
    judged = {target.name + target.unit: target for target in load("steps.targets").judge(contenders)}
    assert {name: (target.wanted, target.found, target.is_met) for name, target in judged.items()} == {
        "step of zcore 2x DDP": (1.0, 1.01, False),
        "step of zcore 3x DDP": (1.0, 1.0, True),
        "step of zcore 3x FSDP2": (0.65, 0.7, False),
        "peak memory of zcore 3x FSDP2": (0.95, 0.95, True),
        "fall of peak memory from zcore 2 to zcore 3x the formula's": (0.9, 0.8, False),
    }


@pytest.mark.parametrize(
    ("room_bytes", "expected"),
    [
        (100, [["ddp", "a", "b", "c"]]),
        (8, [["ddp", "a", "b"], ["ddp", "c"]]),
        (0, [["ddp", "a"], ["ddp", "b"], ["ddp", "c"]]),  # too little for any: each is tried all the same
    ],
)
def test_lineups_hold_what_there_is_memory_for(load, room_bytes: int, expected: list[list[str]]) -> None:
    sizes = {"a": 2, "b": 2, "c": 3, "ddp": 4}
    found = load("steps.lineups").plan_lineups(
        ["a", "b", "ddp", "c"], held_bytes=sizes, references=["ddp"], room_bytes=room_bytes
    )
    assert found == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_is_weighed_timed_judged_and_drawn(load, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "step.json"
    command = ["--quick", "--contenders", "zcore 3", "--rounds", "2", "--out", str(file)]
    load("zero_step").main(command)
    report = json.loads(file.read_text())
    model = report["models"]["tiny"]
    contenders = model["contenders"]
    assert (report["is_benchmark"], model["micro_batch"]) == (False, 1)
    assert list(contenders) == ["zcore 3", "DDP", "FSDP2", "no communication"]
    weighed = contenders["zcore 3"]
    assert weighed["memory"]["states_bytes"] == pytest.approx(weighed["memory"]["formula_bytes"], rel=0.05)
    assert weighed["memory"]["samples"] > 0
    # An all-reduce of every gradient; and two gathers and a sum, of all but the small parameters and the last block.
    assert contenders["DDP"]["sent"]["in_parameters"] == pytest.approx(2.0, rel=0.01)
    assert 2.0 < weighed["sent"]["in_parameters"] <= 3.1
    # What DDP's two ranks exchange is all its gradients, over sockets; pages that ranks share cross none.
    assert contenders["DDP"]["sent"]["loopback_bytes"] > contenders["DDP"]["sent"]["least_bytes"]
    assert {target["name"] for target in model["targets"]} == {"step of zcore 3", "peak memory of zcore 3"}
    assert file.with_suffix(".png").stat().st_size > 0


def test_the_overhead_of_a_step_is_measured_over_modules_layers_and_buckets(load, tmp_path: Path) -> None:
    file = tmp_path / "overhead.json"
    load("overhead").main(["--quick", "--stages", "3", "--rounds", "2", "--out", str(file)])
    rows = json.loads(file.read_text())["rows"]
    found = [(row["sweep"], row["modules"], row["buckets"], row["growth"] is None) for row in rows]
    assert found == [
        ("modules", 20, 10, True),
        ("modules", 40, 10, False),
        ("layers", 20, 10, True),
        ("layers", 40, 10, False),
        ("buckets", 40, 20, True),
        ("buckets", 80, 40, False),
    ]


def test_ops_are_measured_judged_and_drawn(load, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("zcore.kernels")
    file = tmp_path / "kernels.json"
    command = ["--quick", "--pieces", "3", "--threads", "1", "--ops", "sgd_step", "--rounds", "2", "--out", str(file)]
    load("kernels_cpu").main(command)
    report = json.loads(file.read_text())
    (step,) = report["steps"]
    assert {name: each["bytes_an_element"] for name, each in step["states"].items() if name != "DeepSpeedCPUAdam"} == {
        "zcore": 28.0,
        "zcore, bf16 states": 20.0,
        "zcore, 8-bit states": 16.0625,
        "torch fused": 28.0,
    }
    assert {each["bytes_an_element"] for each in step["update"].values()} == {28.0}
    assert step["states"]["zcore"]["times_first"] == step["states"]["zcore"]["of_allowed_gain"]  # 1 by definition
    timed = [(row["dtype"], row["contender"]) for row in report["ops"]]
    assert timed == [
        *(("float32", name) for name in ("zcore cpp", "torch", "memory")),
        *(("bfloat16", name) for name in ("zcore cpp", "torch (reference)", "memory")),
    ]
    wanted = [(target["name"].split(",")[0], target["wanted"]) for target in report["targets"]]
    assert wanted == [
        ("AdamW", 0.97),
        ("gain of zcore", 0.85),
        ("gain of zcore", 0.85),
        ("update in one pass", 1.5),
    ]
    assert file.with_suffix(".png").stat().st_size > 0


def test_the_fastest_peer_and_every_implementation_are_judged(load) -> None:
    def of(median: float) -> dict[str, object]:
        return dict.fromkeys(("of_memory", "times_first", "of_allowed_gain"), spread(median))

    step = {"numel": 10**7, "pieces": 1, "threads": 2, "states": {"zcore": of(0.98), "torch fused": of(1.2)}}
    update = {"zcore, one pass": of(1.0), "torch in calls": of(1.9), "DeepSpeedCPUAdam in calls": of(1.4)}
    op = {"op": "rms_norm", "dtype": "bfloat16"}
    ops = [
        {**op, "contender": "zcore cpp", "of_limit": spread(0.7), "speedup": spread(1.0)},
        {**op, "contender": "torch.compile", "of_limit": spread(0.7), "speedup": spread(1.1)},
        {**op, "contender": "memory", "of_limit": spread(1.0), "speedup": None},
    ]
    judged = load("kernels.targets").judge([{**step, "update": update}], ops)
    assert [(target.name, target.found, target.is_met) for target in judged] == [
        ("AdamW, 10 M in 1, threads 2", 0.98, True),
        ("update in one pass, 10 M in 1, threads 2", 1.4, False),
        ("rms_norm, bfloat16", 0.7, False),
        ("rms_norm, bfloat16, beside torch.compile", 1.1, True),
    ]


def test_a_contender_that_does_not_exist_is_refused(load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("zero_step").main(["--contenders", "zcore 4"])
    assert "unknown: zcore 4; there are zcore 0, " in capsys.readouterr().err
