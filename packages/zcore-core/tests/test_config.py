"""A configuration takes what users write, and names every problem by the key they wrote."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pytest
from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError, model_validator

from zcore.core.config import Auto, Config, settled
from zcore.core.errors import ConfigError


class Zero(Config):
    known_unserved: ClassVar[dict[str, str]] = {"offload_optimizer": "Leave it out; states stay on the device."}

    stage: Literal[0, 1, 2, 3] = 0
    reduce_bucket_size: PositiveInt | Auto = 500_000_000
    prefetch: int = Field(default=50, alias="stage3_prefetch_bucket_size")
    overlap_comm: bool | None = None


class Optimizer(Config):
    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class Training(Config):
    train_batch_size: Annotated[int, Field(ge=1)] | Auto = "auto"
    gradient_clipping: NonNegativeFloat = 0.0
    zero_optimization: Zero = Zero()
    optimizer: Optimizer | None = None

    @model_validator(mode="after")
    def _refuse_13(self) -> Self:
        if self.train_batch_size == 13:
            raise ValueError("train_batch_size is 13, which 4 ranks cannot share. Take 12 or 16.")
        return self


def problem(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Training.read(raw)
    return str(caught.value).removeprefix("Training: ")


def test_files_mappings_and_instances_read_alike(tmp_path: Path) -> None:
    raw = {"train_batch_size": 16, "zero_optimization": {"stage": 3}}
    (tmp_path / "it.json").write_text('{"train_batch_size": 16, "zero_optimization": {"stage": 3}}')
    (tmp_path / "it.yaml").write_text("train_batch_size: 16\nzero_optimization: {stage: 3}\n")
    config = Training.read(raw)
    assert config.zero_optimization.stage == 3
    assert Training.read(str(tmp_path / "it.json")) == Training.read(tmp_path / "it.yaml") == config
    assert Training.read(config) is config


def test_what_is_neither_file_nor_mapping_nor_instance_is_refused() -> None:
    with pytest.raises(ConfigError, match="Cannot read a Training from Zero; pass a path, dict or Training"):
        Training.read(Zero())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"train_batch_size": "16"},
            'train_batch_size is "16"; expected an integer or "auto", written without quotes.',
        ),
        ({"train_batch_size": "big"}, 'train_batch_size is "big"; expected an integer or "auto".'),
        ({"train_batch_size": True}, 'train_batch_size is true; expected an integer or "auto".'),
        ({"train_batch_size": 1.5}, 'train_batch_size is 1.5; expected an integer or "auto".'),
        ({"train_batch_size": 0}, 'train_batch_size is 0; expected at least 1 or "auto".'),
        ({"train_batch_size": None}, 'train_batch_size is null; expected a valid integer or "auto".'),
        ({"train_batch_size": 13}, "train_batch_size is 13, which 4 ranks cannot share. Take 12 or 16."),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is NaN; expected a finite number."),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping is "1.0"; expected a number, written without quotes.'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; expected 0, 1, 2 or 3."),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true; expected 0, 1, 2 or 3."),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm is 1; expected true or false."),
        ({"zero_optimization": 3}, "zero_optimization is 3; expected a section, as in {...}."),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing; it has no default."),
        ({"optimizer": {"type": 1}}, "optimizer.type is 1; expected a string."),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(raw: dict[str, Any], message: str) -> None:
    assert problem(raw) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trian_batch_size": 8}, "trian_batch_size is not a known key; did you mean `train_batch_size`?"),
        ({"stage": 3}, "`stage` stands at the top level; it belongs in `zero_optimization`."),
        ({"params": {}}, "`params` stands at the top level; it belongs in `optimizer`."),
        (
            {"zero_optimization": {"gradient_clipping": 1.0}},
            "`gradient_clipping` stands in `zero_optimization`; it belongs at the top level.",
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_sise": 1}},
            "zero_optimization.stage3_prefetch_bucket_sise is not a known key; "
            "did you mean `stage3_prefetch_bucket_size`?",
        ),
        (
            {"optimizer": {"type": "Adam", "overlap_com": True}},
            "optimizer.overlap_com is not a known key; did you mean `zero_optimization.overlap_comm`?",
        ),
        (
            {"optimizer": {"type": "Adam", "xyzzy.y": 1}},
            "optimizer.xyzzy.y is not a known key; expected type or params.",
        ),
    ],
)
def test_an_unknown_key_is_told_where_it_belongs(raw: dict[str, Any], message: str) -> None:
    assert problem(raw) == message


def test_all_problems_arrive_in_one_error_in_the_users_spelling() -> None:
    message = problem({"stage": 3, "zero_optimization": {"prefetch": "x", "stage": 7}})
    assert message.splitlines() == [
        "Training has 3 problems:",
        "  zero_optimization.stage is 7; expected 0, 1, 2 or 3.",
        '  zero_optimization.prefetch is "x"; expected an integer.',
        "  `stage` stands at the top level; it belongs in `zero_optimization`.",
    ]
    assert problem({"zero_optimization": {"stage3_prefetch_bucket_size": "x"}}).startswith(
        "zero_optimization.stage3_prefetch_bucket_size is"
    )


def test_a_problem_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"stage": 3}')
    with pytest.raises(ConfigError, match=r"ds\.json: `stage` stands at the top level"):
        Training.read(tmp_path / "ds.json")


def test_a_known_key_that_is_not_served_is_refused_loudly() -> None:
    assert problem({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) == (
        "zero_optimization.offload_optimizer is a known DeepSpeed key that zcore does not serve yet; "
        '{"device": "cpu"} would have no effect. Leave it out; states stay on the device.'
    )


@pytest.mark.parametrize("off", [None, False, {"enabled": False, "device": "cpu"}])
def test_a_known_key_that_is_switched_off_asks_for_nothing(off: object) -> None:
    assert Training.read({"zero_optimization": {"offload_optimizer": off}}) == Training()


@pytest.mark.parametrize("size", [500_000_000, 5e8])
def test_whole_floats_are_integers_as_in_files(size: float) -> None:
    config = Training.read({"zero_optimization": {"reduce_bucket_size": size}, "gradient_clipping": 1})
    assert repr(config.zero_optimization.reduce_bucket_size) == "500000000"
    assert repr(config.gradient_clipping) == "1.0"


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Training().gradient_clipping = 1.0


def test_auto_is_resolved_and_what_the_user_wrote_is_kept() -> None:
    config = Training.read(
        {
            "gradient_clipping": 0.5,
            "zero_optimization": {"reduce_bucket_size": "auto"},
            "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, "auto"]}},
        }
    )
    keys = [
        "train_batch_size",
        "zero_optimization.reduce_bucket_size",
        "optimizer.params.lr",
        "optimizer.params.betas.1",
    ]
    assert list(config.auto_keys()) == keys
    resolved = config.resolve({**dict.fromkeys(keys, 8.0), "gradient_clipping": 99.0})
    assert resolved.auto_keys() == {}
    assert settled(resolved.train_batch_size) == 8
    assert resolved.gradient_clipping == 0.5
    assert resolved.optimizer == Optimizer(type="Adam", params={"lr": 8.0, "betas": [0.9, 8.0]})
    assert resolved.zero_optimization.model_fields_set == {"reduce_bucket_size"}


def test_what_nothing_can_resolve_is_listed_by_key() -> None:
    config = Training.read({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}})
    with pytest.raises(ConfigError, match=r'^train_batch_size, optimizer\.params\.lr: still "auto"'):
        config.resolve({"train_batch_size": "auto"})


def test_a_chosen_value_is_validated_like_a_written_one() -> None:
    with pytest.raises(ConfigError, match="train_batch_size is 0; expected at least 1"):
        Training().resolve({"train_batch_size": 0})


def test_an_unresolved_setting_is_not_used_by_accident() -> None:
    with pytest.raises(ConfigError, match="call resolve"):
        settled(Training().train_batch_size)


def test_the_digest_tells_settings_apart_and_not_spellings() -> None:
    by_alias = Training.read({"zero_optimization": {"stage3_prefetch_bucket_size": 7}})
    by_name = Training.read({"zero_optimization": {"prefetch": 7.0}})
    assert by_alias.digest() == by_name.digest() != Training().digest()


def test_to_dict_reads_back_as_the_same_configuration() -> None:
    config = Training.read({"zero_optimization": {"prefetch": 7}, "optimizer": {"type": "Adam"}})
    assert config.to_dict()["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert Training.read(config.to_dict()) == config
