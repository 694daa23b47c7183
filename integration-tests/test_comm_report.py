"""A config with comms_logger records every collective of a run, where zcore-zero and zcore-comm are both installed."""

import gc
import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.skipif(
    any(find_spec(f"zcore.{name}") is None for name in ("zero", "comm")), reason="needs zcore-zero and zcore-comm"
)

CONFIG = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 16},
    "comms_logger": {"enabled": True},
}


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def train(engine, num_steps):
    for _ in range(num_steps):
        engine.backward(engine(torch.ones(2, 8)).square().mean())
        engine.step()


def record_a_run(config, folder):
    from zcore import zero

    engine = zero.initialize(a_model(), config)
    traffic = {name: sum(each.calls.values()) for name, each in engine.traffic().items()}
    start = engine.comm_report().to_dict()
    engine.recording.clear()
    train(engine, 3)
    traffic = {name: sum(each.calls.values()) - traffic[name] for name, each in engine.traffic().items()}
    report = engine.comm_report()
    engine.recording.save_trace(folder)
    return start, report.to_dict(), str(report), traffic


def test_every_collective_of_a_run_is_in_the_report_of_every_rank(ranks, tmp_path):
    told = ranks(2, record_a_run, CONFIG, str(tmp_path))
    assert told[0] == told[1]
    start, steps, text, traffic = told[0]
    assert {row["group"] for row in start["ops"]} >= {"world", "dp reduce"}  # from the first collective on
    num_calls = dict.fromkeys(("dp gather", "dp reduce"), 0)
    for row in steps["ops"]:
        num_calls[row["group"]] += row["num_calls"]
    assert num_calls == {"dp gather": traffic["gather"], "dp reduce": traffic["reduce"]}
    assert {row["op"] for row in steps["ops"]} >= {"all_gather", "reduce_scatter", "all_reduce"}
    assert all(row["num_open"] == 0 for row in steps["ops"])
    assert [rank["global_rank"] for rank in steps["ranks"]] == [0, 1]
    assert "dp gather: 2 ranks" in text
    for rank in range(2):
        assert json.loads((tmp_path / f"comms.rank{rank}.json").read_text())["traceEvents"]


def test_only_the_ops_named_are_recorded(ranks, tmp_path):
    logger = {"enabled": True, "prof_ops": ["reduce_scatter_tensor"], "debug": True}
    _, steps, _, _ = ranks(2, record_a_run, {**CONFIG, "comms_logger": logger}, str(tmp_path))[0]
    assert {row["op"] for row in steps["ops"]} == {"reduce_scatter"}
    assert all("BucketGradients." in row["label"] for row in steps["labels"])


def stop_in_every_way():
    from zcore import zero
    from zcore.comm.recording.recorded import LISTENERS
    from zcore.core.errors import ConfigError

    engine = zero.initialize(a_model(), CONFIG)
    assert len(LISTENERS) == 1
    engine.close()
    assert not LISTENERS
    assert engine.comm_report().to_dict()["ops"]  # what was recorded stays
    with pytest.raises(ConfigError, match="mics_shard_size"):
        zero.initialize(a_model(), {**CONFIG, "zero_optimization": {"mics_shard_size": 3}})
    assert not LISTENERS
    engine = zero.initialize(a_model(), CONFIG)
    del engine
    gc.collect()
    return len(LISTENERS)


def test_recording_ends_with_the_engine_or_with_an_initialize_that_raised(ranks):
    assert ranks(2, stop_in_every_way) == [0, 0]
