"""The keys of the engine's JSON: what is accepted, how the batch triple and "auto" are settled, what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore import zero
from zcore.core.errors import ConfigError, ZcoreError
from zcore.core.recording import OPS
from zcore.zero.config import BatchSizes, CommsLogger, TrainingConfig, plan_batch

# Every key that is served, with the value that the field's documentation gives as its default or its usual value.
SERVED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500}},
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "comms_logger": {
        "enabled": False,
        "verbose": False,
        "prof_all": False,
        "prof_ops": ["all_reduce", "all_gather_into_tensor"],
        "debug": False,
    },
    "zero_optimization": {
        "stage": 3,
        "mics_shard_size": -1,
        "zero_hpz_partition_size": 1,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_model_persistence_threshold": 9223372036854775807,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "round_robin_gradients": False,
        "sub_group_size": 1e12,
        "stage3_gather_16bit_weights_on_model_save": False,
        "leaf_module": {"classes": ["Experts"], "names": [], "name_suffixes": ["mlp"]},
    },
    "activation_checkpointing": {
        "every": 1,
        "save": ["matmul"],
        "partition_activations": False,
        "contiguous_memory_optimization": False,
        "number_checkpoints": None,
        "synchronize_checkpoint_boundary": False,
        "profile": False,
    },
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "wall_clock_breakdown": True,
}

# What the field's trainers write where a program is to fill in.
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}

# Switched off, these ask for nothing, and configurations carry them along.
OFF = [
    {"fp16": {"enabled": False, "loss_scale": 0}},
    {"wall_clock_breakdown": False},
    {"activation_checkpointing": {"cpu_checkpointing": False}},
    {"sparse_gradients": False},
    {"zero_optimization": {"cpu_offload": False}},
    {"zero_optimization": {"offload_optimizer": None}},
    {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
    {"zero_optimization": {"offload_param": {"device": "none", "pin_memory": True}}},
    {"flops_profiler": {"enabled": False, "profile_step": 1}},
    {"zero_optimization": {"ignore_unused_parameters": True, "load_from_fp32_weights": True}},
    {"bf16": {"immediate_grad_update": True, "check_grad_overflow": True}},
]


def test_every_served_key_is_accepted_and_kept():
    kept = TrainingConfig.read(SERVED).to_dict()
    for key, value in SERVED.items():
        assert kept[key] == value, key


def test_what_was_read_reads_back_the_same():
    config = TrainingConfig.read(SERVED)
    assert TrainingConfig.read(config.to_dict()) == config
    assert TrainingConfig.read(json.loads(json.dumps(config.to_dict()))).digest() == config.digest()


@pytest.mark.parametrize("raw", OFF, ids=str)
def test_what_is_switched_off_asks_for_nothing(raw):
    assert TrainingConfig.read(raw) == TrainingConfig.read({key: {} for key in raw if key == "zero_optimization"})


def test_an_empty_config_trains_unsharded_one_sequence_at_a_time():
    config = TrainingConfig.read({}).settle(dp_size=2)
    assert (config.zero_optimization.stage, config.bf16.enabled, config.gradient_clipping) == (0, False, 0.0)
    assert config.train_batch_size == 2
    assert config.optimizer is None


def test_auto_is_settled_where_the_engine_knows():
    raw = {key: value for key, value in AUTO.items() if key not in ("optimizer", "scheduler")}
    config = TrainingConfig.read(raw).settle(dp_size=4)
    assert config.auto_keys() == {}
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (4, 1)
    assert config.zero_optimization == zero.TrainingConfig.read({"zero_optimization": {"stage": 3}}).zero_optimization
    assert (config.bf16.enabled, config.gradient_clipping) == (False, 0.0)


def test_auto_that_nobody_knows_names_every_such_key():
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.read(AUTO).settle(dp_size=1)
    for key in ("optimizer.params.lr", "optimizer.params.weight_decay", "scheduler.params.warmup_num_steps"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("given_sizes", "dp_size", "expected"),
    [
        ((32, 4, 2), 4, (32, 4, 2)),
        ((32, 4, None), 2, (32, 4, 4)),
        ((32, None, 2), 2, (32, 8, 2)),
        ((32, None, None), 4, (32, 8, 1)),
        ((None, 4, 2), 3, (24, 4, 2)),
        ((None, 4, None), 3, (12, 4, 1)),
        ((None, None, 5), 3, (15, 1, 5)),
        ((None, None, None), 7, (7, 1, 1)),
        ((1, None, None), 1, (1, 1, 1)),
    ],
)
def test_the_batch_triple_is_completed(given_sizes, dp_size, expected):
    train, micro, steps = given_sizes
    planned = plan_batch(train_batch_size=train, micro_batch_size=micro, accumulation_steps=steps, dp_size=dp_size)
    assert planned == BatchSizes(*expected)


sizes = st.none() | st.integers(1, 200)


@given(train=sizes, micro=sizes, steps=sizes, dp_size=st.integers(1, 64))
def test_a_completed_triple_multiplies_and_keeps_what_was_given(train, micro, steps, dp_size):
    try:
        plan = plan_batch(train_batch_size=train, micro_batch_size=micro, accumulation_steps=steps, dp_size=dp_size)
    except ConfigError:
        assert train is not None
        possible = [
            (m, s)
            for m in ([micro] if micro else range(1, train + 1))
            for s in ([steps] if steps else range(1, train + 1))
            if m * s * dp_size == train
        ]
        assert not possible  # it is refused only where no whole numbers fit
        return
    assert plan.train_batch_size == plan.micro_batch_size * plan.accumulation_steps * dp_size
    assert plan.train_batch_size == (train or plan.train_batch_size)
    assert plan.micro_batch_size == (micro or plan.micro_batch_size) >= 1
    assert plan.accumulation_steps == (steps or plan.accumulation_steps) >= 1


@pytest.mark.parametrize(
    ("raw", "ops"),
    [
        ({}, OPS),
        ({"prof_all": True}, OPS),
        ({"prof_all": True, "prof_ops": ["all_reduce"]}, OPS),  # as DeepSpeed has it
        ({"prof_ops": ["all_reduce"]}, ["all_reduce"]),
        ({"prof_all": False, "prof_ops": ["all_gather", "all_gather_into_tensor"]}, ["all_gather"]),
        ({"prof_ops": ["reduce_scatter_tensor", "all_to_all_single"]}, ["reduce_scatter", "all_to_all"]),
        ({"prof_ops": ["isend", "irecv", "inference_all_reduce"]}, ["send", "recv", "all_reduce"]),
    ],
    ids=str,
)
def test_prof_ops_are_recorded_under_their_names_here(raw, ops):
    assert CommsLogger.read({"enabled": True, **raw}).ops == set(ops)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"train_batch_sise": 4}, ["train_batch_sise", "did you mean `train_batch_size`"]),
        ({"train_micro_batch_size": 4}, ["train_micro_batch_size", "`train_micro_batch_size_per_gpu`"]),
        ({"zero_optimization": {"stage3_param_persistence": 1}}, ["`stage3_param_persistence_threshold`"]),
        ({"zero_optimization": {"prefetch_bucket_size": 1}}, ["`stage3_prefetch_bucket_size`"]),
        ({"zero_optimization": True}, ["zero_optimization is true", "section"]),
        ({"zero_optimization": {"stage": "3"}}, ["stage", '"3"', "without quotes"]),
        ({"train_batch_size": 0}, ["train_batch_size is 0", "more than 0"]),
        ({"train_batch_size": 2.5}, ["train_batch_size is 2.5", "an integer"]),
        ({"gradient_clipping": -1}, ["gradient_clipping is -1", "at least 0"]),
        ({"gradient_clipping": float("nan")}, ["gradient_clipping"]),
        ({"bf16": True}, ["bf16 is true", "section"]),
        ({"bf16": {"enable": True}}, ["bf16.enable", "did you mean `enabled`"]),
        ({"optimizer": "AdamW"}, ["optimizer", "section"]),
        ({"optimizer": {"params": {"lr": 1}}}, ["optimizer.type is missing"]),
        ({"optimizer": {"type": "AdamW", "lr": 0.1}}, ["optimizer.lr", "params"]),
        ({"zero_optimization": {"mics_shard_size": 0}}, ["mics_shard_size is 0"]),
        ({"comms_logger": True}, ["comms_logger is true", "section"]),
        ({"comms_logger": {"enable": True}}, ["comms_logger.enable", "did you mean `enabled`"]),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, ["comms_logger.prof_ops"]),
        ({"comms_logger": {"prof_ops": ["barrier"]}}, ['"barrier"', "expected some of all_gather, reduce_scatter, "]),
        ({"comms_logger": {"prof_ops": ["allreduce"]}}, ['"allreduce"', "Did you mean `all_reduce`"]),
        ({"comms_logger": {"enabled": True, "prof_all": False}}, ["comms_logger", "nothing would be recorded"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "not serve"]),
    ],
    ids=str,
)
def test_a_wrong_key_or_value_is_named_with_what_would_be_right(raw, words):
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.read(raw)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["There is no configuration file", "ds.json"]),
        ("{", ["ds.json, line 1"]),
        ('{\n "train_batch_size": 4,\n}', ["ds.json, line 3", "comma"]),
        ('{\n // batch\n "train_batch_size": 4}', ["ds.json, line 2", "comments"]),
        ("[1]", ["ds.json holds a list"]),
        ('{"train_batch_size": 4, "train_batch_size": 8}', ['"train_batch_size" stands on line 1 already']),
        ('{"zero_optimization": {"stage": 9}}', ["ds.json", "zero_optimization.stage is 9"]),
    ],
)
def test_a_file_that_is_missing_or_broken_says_where(tmp_path, text, words):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.read(path)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_file_a_dict_and_a_config_are_the_same(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(SERVED))
    assert TrainingConfig.read(path) == TrainingConfig.read(str(path)) == TrainingConfig.read(SERVED)
    assert TrainingConfig.read(TrainingConfig.read(SERVED)) == TrainingConfig.read(SERVED)


def test_several_problems_are_told_at_once():
    with pytest.raises(ZcoreError, match="has 3 problems") as caught:
        TrainingConfig.read({"train_batch_sise": 1, "bf16": {"enable": True}, "zero_optimization": {"stage": 7}})
    for word in ("train_batch_sise", "bf16.enable", "zero_optimization.stage"):
        assert word in str(caught.value)


def test_init_checks_the_config_before_a_model_is_built():
    with pytest.raises(ConfigError, match="stagee"), zero.Init(config={"zero_optimization": {"stagee": 3}}):
        raise AssertionError


def test_no_key_is_both_served_and_not_and_each_refusal_has_advice():
    for section in (TrainingConfig, type(TrainingConfig().zero_optimization)):
        assert not set(section.known_unserved) & set(section.model_fields)
        assert all(advice.endswith(".") for advice in section.known_unserved.values())
