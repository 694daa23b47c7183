"""`zcore kernels`: every op can be tried, every implementation is right, one that is not is found; whole figures."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from zcore.core import ops
from zcore.core.errors import ConfigError
from zcore.kernels.commands.cases import CASES, Call, Operands
from zcore.kernels.commands.checking import check_op
from zcore.kernels.commands.command import app

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_every_compiled_op_has_operands() -> None:
    compiled = {op for op, known in ops.registered().items() if any(each.source == "cpp" for each in known)}
    assert compiled <= set(CASES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CASES)
def test_every_implementation_is_right(op: str, dtype: torch.dtype) -> None:
    if op not in ops.registered():
        pytest.skip("its user is not installed")
    for outcome in check_op(op, numel=5003, dtype=dtype, device=CPU):
        assert outcome.is_right, outcome


def test_operands_are_the_same_in_every_draw() -> None:
    for make in (CASES["adamw_step"], CASES["rotary"], CASES["quantize_blockwise"]):
        one, other = (make(Operands(3000, dtype=torch.bfloat16, device=CPU)).tensors for _ in range(2))
        assert all(map(torch.equal, one, other))


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op with a reference, one that is right and one that is wrong in place."""

    def double(values: Tensor) -> Tensor:
        return values * 2

    def edit(values: Tensor) -> Tensor:
        return values.mul_(2).clone()

    ops.reference("doubled")(double)
    ops.implementation("doubled", source="good", priority=2)(lambda values: values + values)
    ops.implementation("doubled", source="edits", priority=1)(edit)
    monkeypatch.setitem(CASES, "doubled", lambda draw: Call((draw.flat(),)))
    yield
    ops._registry.pop("doubled")


@pytest.mark.usefixtures("doubled")
def test_what_is_wrong_is_said_and_ends_with_1() -> None:
    code, text = run("check", "doubled", "--dtypes", "float32", "--numel", "100")
    assert code == 1
    assert [line.split()[-1] for line in text.splitlines() if "float32" in line] == ["right", "WRONG"]


def test_the_list_says_who_serves_and_why_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run("list")
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("adamw_step"))
    assert code == 0
    assert lines[at].split() == ["adamw_step", "cpp", "serves"]
    assert lines[at + 1].split() == ["cuda", "serves", "cuda", "only"]
    assert lines[at + 2].split() == ["reference", "stands", "by"]
    monkeypatch.setenv("ZCORE_OPS", "reference")
    assert "ZCORE_OPS asks for another" in run("list")[1]


def test_a_bench_writes_whole_rows(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--numel", "4096", "--rounds", "3", "--turn", "0", "--against", "torch", "--json", str(file))
    code, text = run("bench", "adamw_step,rms_norm", "--dtypes", "bfloat16", *options)
    report = json.loads(file.read_text())
    assert code == 0
    assert [row["contender"] for row in report["rows"]] == ["zcore cpp", "torch", "memory"] * 2
    assert all(row["time_s"]["median"] > 0 and row["of_limit"]["median"] > 0 for row in report["rows"])
    assert "of memory" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "adamw_stop"), "Did you mean adamw_step?"),
        (("check", "--dtypes", "int8"), "expected float32, bfloat16, float16"),
        (("bench", "--against", "jax"), "expected some of torch, compile, deepspeed"),
        (("list", "--device", "tpu"), "expected cpu or cuda"),
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        run(*arguments)
