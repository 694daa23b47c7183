"""Runs the GPU suite on CPU, at test size, and meets its refusals."""

import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "gpu_suite.py"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; what it does to the paths ends with the test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)
    spec.loader.exec_module(module)
    return module


def test_without_a_cuda_device_it_refuses_in_one_paragraph(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whatever this machine has
    with pytest.raises(SystemExit) as exit_info:
        suite.main([])
    said = capsys.readouterr()
    assert (exit_info.value.code, said.out) == (2, "")
    assert said.err.startswith("There is no CUDA device: torch ")
    assert "add `--device cpu --out FILE`" in said.err
    assert said.err.count("\n") == 1


def test_on_cpu_it_measures_at_test_size_and_calls_it_no_benchmark(suite: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "new" / "cpu.json"
    code = suite.main(["--device", "cpu", "--sections", "facts,zero_parity,zero_step,overlap", "--out", str(file)])
    report = json.loads(file.read_text())
    sections = report["sections"]
    assert code == 0, sections
    assert (report["device"], report["is_benchmark"]) == ("cpu", False)
    assert {figures["status"] for figures in sections.values()} == {"ok"}
    assert sections["facts"]["copy_tb_per_s"] > 0
    for world in ("one_rank", "two_ranks"):
        assert sections["zero_parity"][world]["fp32"]["zcore-3"] < 1e-6
    step = sections["zero_step"]["simulated"]["tiny"]
    measured = step["trainers"]["zcore-3"]
    # Rank 0 of 8 holds an eighth of master, gradient and two moments, 4 bytes each; norms are whole, slices padded.
    assert measured["states_formula_bytes"] == step["parameters"] * 16 // 8
    assert measured["states_bytes"] == pytest.approx(measured["states_formula_bytes"], rel=0.02)
    collectives = sections["overlap"]["simulated"]["zcore-3"]["collectives"]
    assert collectives["zcore::all_gather"] > collectives["zcore::reduce_scatter"] > 0


def test_a_section_without_its_imports_is_refused_with_the_line_that_fetches_them(suite: ModuleType) -> None:
    section = suite.Section(("json", "zcore_absent"), lambda device_type, is_quick: {})
    figures = suite.run_section(section, "cpu", True)
    assert figures["status"] == "refused"
    assert figures["reason"].startswith(
        "Not installed here: zcore-absent. On a machine with network run `python -m pip "
    )
    assert "add `--wheels" in figures["reason"]


def test_a_failing_section_is_recorded_with_where_it_failed(suite: ModuleType) -> None:
    section = suite.Section((), lambda device_type, is_quick: {"value": 1 // 0})
    figures = suite.run_section(section, "cpu", True)
    assert (figures["status"], figures["reason"]) == ("failed", "ZeroDivisionError: integer division or modulo by zero")
    assert "value" in figures["traceback"][-1]


def test_a_section_may_call_itself_failed(suite: ModuleType) -> None:
    section = suite.Section((), lambda device_type, is_quick: {"status": "failed", "reason": "too far off"})
    assert suite.run_section(section, "cpu", True)["status"] == "failed"


def test_carried_wheels_are_installed_from_their_folder(suite: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("pip", reason="environments made by uv have no pip")
    info = "zcore_carried-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "zcore_carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("zcore_carried.py", "x = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: zcore-carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    suite.install_carried(tmp_path, tmp_path / "target")
    assert (tmp_path / "target/zcore_carried.py").read_text() == "x = 1\n"


def test_a_folder_without_wheels_is_refused(suite: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no \*\.whl file"):
        suite.install_carried(tmp_path, tmp_path / "target")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sections", "facts,parity"], "unknown section parity; there are facts, build, "),
        (["--device", "cpu"], "say with --out where its file goes"),
    ],
)
def test_a_wrong_command_line_is_refused(
    suite: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit):
        suite.read_arguments(arguments)
    assert expected in capsys.readouterr().err
