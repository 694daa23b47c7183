"""`zcore kernels`: every op can be tried, every implementation is right, one that is not is found; whole figures."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from zcore.core import ops
from zcore.core.errors import ConfigError
from zcore.kernels.commands.cases import CASES, Call, Operands, tensors_in
from zcore.kernels.commands.checking import check_op
from zcore.kernels.commands.command import app
from zcore.kernels.commands.liger import LIGER, run_of_liger
from zcore.kernels.commands.measuring import measure_op

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
    """An op with a reference, one that raises, one that is right and one that is wrong in place."""

    def double(values: Tensor) -> Tensor:
        return values * 2

    def edit(values: Tensor) -> Tensor:
        return values.mul_(2).clone()

    def raises(values: Tensor) -> Tensor:
        raise RuntimeError(f"an illegal access\nby {ops.forced()}")

    ops.reference("doubled")(double)
    ops.implementation("doubled", source="good", priority=2)(lambda values: values + values)
    ops.implementation("doubled", source="edits", priority=1)(edit)
    ops.implementation("doubled", source="raises", priority=3)(raises)
    monkeypatch.setitem(CASES, "doubled", lambda draw: Call((draw.flat(),)))
    yield
    ops._registry.pop("doubled")


@pytest.mark.usefixtures("doubled")
def test_what_is_wrong_is_said_and_ends_with_1() -> None:
    code, text = run("check", "doubled", "--dtypes", "float32", "--numel", "100")
    assert code == 1
    rows = [line.split() for line in text.splitlines() if "float32" in line]
    assert [row[-1] for row in rows[:3]] == ["FAILED", "right", "WRONG"]
    assert "doubled, raises, float32 raised RuntimeError: an illegal access by raises" in text


@pytest.mark.usefixtures("doubled")
def test_what_raises_hides_no_other_op(tmp_path: Path) -> None:
    options = ("--numel", "64", "--rounds", "1", "--turn", "0", "--against", "", "--dtypes", "float32")
    code, text = run("bench", "doubled,squared_norm", *options, "--json", str(tmp_path / "bench.json"))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert code == 1
    assert report["raised"] == {"doubled, float32": "RuntimeError: an illegal access by raises"}
    assert {row["op"] for row in report["rows"]} == {"squared_norm"}
    assert "doubled, float32 raised RuntimeError: an illegal access by raises" in text
    code, text = run("check", "doubled,squared_norm", "--dtypes", "float32", "--numel", "100")
    assert code == 1
    assert any(line.split()[:2] == ["squared_norm", "cpp"] for line in text.splitlines())


def test_each_source_is_tried_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def shared(values: Tensor) -> Tensor:
        asked.append(ops.forced())
        return values * 2

    for at, source in enumerate(("reference", "one", "other")):
        ops.implementation("shared", source=source, priority=at)(shared)
    monkeypatch.setitem(CASES, "shared", lambda draw: Call((draw.flat(),)))
    try:
        check_op("shared", numel=8, dtype=torch.float32, device=CPU)
        assert asked == ["reference", "other", "one"]
        asked.clear()
        rows = measure_op("shared", numel=8, dtype=torch.float32, device=CPU, peers=["torch"], rounds=1, slice_s=0.0)
    finally:
        ops._registry.pop("shared")
    assert [row.contender for row in rows] == ["zcore other", "zcore one", "torch (reference)", "memory"]
    assert set(asked) == {"reference", "other", "one"}


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


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("liger_kernel") is None,
    reason="Liger-Kernel and a GPU are not both here",
)
@pytest.mark.parametrize("op", LIGER)
def test_liger_computes_the_same(op: str) -> None:
    device = torch.device("cuda")
    call = CASES[op](Operands(4096, dtype=torch.float32, device=device))
    run = run_of_liger(op, call.copied())
    assert run is not None
    ours = ops.get(op, device=device, dtype=torch.float32)(*call.args, **call.kwargs)
    for one, other in zip(tensors_in(ours), tensors_in(run()), strict=False):  # Liger's may return more
        torch.testing.assert_close(other.transpose(1, 2) if op == "rotary" else other, one, atol=1e-4, rtol=1e-4)


def test_liger_has_no_op_that_is_not_ours() -> None:
    assert set(LIGER) <= set(CASES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "adamw_stop"), "Did you mean adamw_step?"),
        (("check", "--dtypes", "int8"), "expected float32, bfloat16, float16"),
        (("bench", "--against", "jax"), "expected some of torch, compile, deepspeed, liger"),
        (("bench", "--against", "torch,liger"), "on cpu: Liger-Kernel runs on GPUs only; expected --device cuda"),
        (("list", "--device", "tpu"), "expected cpu or cuda"),
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        run(*arguments)
