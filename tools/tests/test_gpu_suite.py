"""Runs the GPU suite on CPU, at test size, and meets its refusals."""

import importlib.util
import json
import os
import signal
import sys
import time
import warnings
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
    section = suite.Section(("json", "zcore_absent"), lambda device_type, is_quick, kept: {})
    figures = suite.run_section(section, "cpu", True, Path())
    assert figures["status"] == "refused"
    assert figures["reason"].startswith(
        "Not installed here: zcore-absent. On a machine with network run `python -m pip "
    )
    assert "add `--wheels" in figures["reason"]


def test_a_failing_section_is_recorded_with_where_it_failed(suite: ModuleType) -> None:
    section = suite.Section((), lambda device_type, is_quick, kept: {"value": 1 // 0})
    figures = suite.run_section(section, "cpu", True, Path())
    assert (figures["status"], figures["reason"]) == ("failed", "ZeroDivisionError: integer division or modulo by zero")
    assert "value" in figures["traceback"][-1]


def test_a_section_may_call_itself_failed(suite: ModuleType) -> None:
    section = suite.Section((), lambda device_type, is_quick, kept: {"status": "failed", "reason": "too far off"})
    assert suite.run_section(section, "cpu", True, Path())["status"] == "failed"


def test_headers_of_cutlass_are_asked_for_where_nvcc_is_to_build_with_them(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu import tree

    monkeypatch.setattr(suite, "CUTLASS", "zcore_absent")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    section = suite.Section(("zcore_missing",), lambda device_type, is_quick, kept: {}, builds=True)
    reason = suite.run_section(section, "cuda", True, tmp_path)["reason"]
    assert "Not installed here: zcore-missing, nvidia-cutlass==4.2.0.0." in reason
    assert "--no-deps nvidia-cutlass==4.2.0.0`" in reason
    assert "nvidia" not in suite.run_section(section, "cpu", True, tmp_path)["reason"]
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tree, "USUAL_NVCC", tmp_path / "nvcc")
    assert suite.find_missing_headers("cuda") == []
    assert tree.find_nvcc() is None
    (tmp_path / "nvcc").touch()
    assert tree.find_nvcc() == str(tmp_path / "nvcc")


@pytest.fixture
def folders(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what the script starts is imported from, too."""
    suite.open_paths(*suite.SOURCES)


@pytest.mark.usefixtures("folders")
def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    from gpu.tree import run

    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    with pytest.raises(RuntimeError, match="had not ended after 3 s") as caught:
        run([sys.executable, "-c", program], cwd=tmp_path, limit_s=3)
    child = int(str(caught.value).split()[-1])
    ends_s = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < ends_s
        os.sched_yield()


def is_running(process: int) -> bool:
    """Of what may have no parent that waits for it: a zombie does not run."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("folders")
def test_what_a_command_leaves_behind_does_not_hold_it_up(tmp_path: Path) -> None:
    from gpu.tree import run

    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    said = run([sys.executable, "-c", program], cwd=tmp_path, limit_s=60)
    os.kill(int(said), signal.SIGKILL)


@pytest.mark.usefixtures("folders")
def test_a_part_that_fails_hides_no_other_and_what_has_no_time_is_told() -> None:
    from gpu.kernels import each_apart

    ends_s = time.monotonic() + 0.2

    def one(name: str, left_s: float) -> dict[str, object]:
        assert 0 < left_s <= 0.2
        if name == "broken":
            raise RuntimeError("an illegal access")
        if name == "wrong":
            return {"status": "failed", "reason": "too far off"}
        while name == "long" and time.monotonic() < ends_s:
            pass
        return {"value": 1}

    figures = each_apart(["broken", "wrong", "fine", "long", "late"], one, limit_s=0.2, at_once=1)
    parts = figures["parts"]
    assert [each["status"] for each in parts.values()] == ["failed", "failed", "ok", "ok", "not run"]
    assert parts["broken"]["reason"] == "RuntimeError: an illegal access"
    assert parts["fine"]["value"] == 1
    assert (figures["status"], figures["reason"]) == ("failed", "failed: broken, wrong; not run: late")
    assert "status" not in each_apart(["fine"], one, limit_s=0.2, at_once=1)


@pytest.mark.usefixtures("folders")
def test_a_wheel_that_lacks_kernels_is_told_beside_what_else_there_was() -> None:
    from gpu.kernels import tell_missing

    figures = {"parts": {}, "status": "failed", "reason": "failed: broken"}
    assert tell_missing(figures, {"_cuda": None}) == figures
    found = tell_missing(figures, {"_cuda": None, "its grouped products": "built without CUTLASS"})
    assert found["missing"] == {"its grouped products": "built without CUTLASS"}
    assert found["reason"] == "failed: broken; missing: its grouped products (built without CUTLASS)"
    assert tell_missing({"parts": {}}, {"_cuda": "not built"})["status"] == "failed"


@pytest.mark.usefixtures("folders")
def test_a_test_file_that_fails_or_does_not_end_is_told(tmp_path: Path) -> None:
    from gpu.tree import pytest_figures

    # A root of its own: pytest names tests from the root it finds, and the folder may lie within a project.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    figures = pytest_figures(tmp_path, ["test_one.py"], {}, limit_s=120)
    assert (figures["status"], figures["tests"], figures["failures"]) == ("failed", 2, 1)
    assert figures["failed"] == ["test_one::test_wrong"]
    (tmp_path / "test_other.py").write_text("import pytest\npytest.skip('no GPU', allow_module_level=True)\n")
    figures = pytest_figures(tmp_path, ["test_other.py"], {}, limit_s=120)
    assert "status" not in figures and figures["skipped"] == 1
    # A sanitizer's code counts where all tests pass.
    under = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:]); sys.exit(9)"]
    figures = pytest_figures(tmp_path, ["test_one.py", "-k", "right"], {}, limit_s=120, under=under)
    assert (figures["status"], figures["failed"]) == ("failed", [])


@pytest.mark.usefixtures("folders")
def test_the_wheel_comes_before_whatever_was_named_and_that_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu.kernels import surroundings

    monkeypatch.setenv("PYTHONPATH", "/carried")
    paths = surroundings(tmp_path, Path("/tree"))["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(tmp_path), "/tree/packages/zcore-core/src", "/carried"]


@pytest.mark.usefixtures("folders")
def test_a_wheel_is_built_once_for_the_same_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu import tree

    program = (
        "import pathlib, sys, zipfile\n"
        "archive = zipfile.ZipFile(pathlib.Path(sys.argv[1]) / 'some.whl', 'w')\n"
        "archive.writestr('settings', sys.argv[2])\n"
        "archive.close()"
    )
    monkeypatch.setattr(tree, "BUILD", program)
    monkeypatch.setenv("CUDACXX", "nvcc")
    root, kept = tmp_path / "tree", tmp_path / "kept"
    for file in (*tree.PROJECT, "native/op.cpp"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("1")
    built = tree.keep_kernels(root, kept, "cuda")
    assert (built.unpacked / "settings").read_text() == '{"cmake.define.ZCORE_CUDA": "ON"}'
    monkeypatch.setattr(tree, "BUILD", "raise SystemExit(3)")
    assert tree.keep_kernels(root, kept, "cuda") == built
    (root / "native/op.cpp").write_text("2")
    for _ in range(2):  # one that failed is no wheel
        with pytest.raises(RuntimeError, match="ended with 3"):
            tree.keep_kernels(root, kept, "cuda")
    (root / "native/op.cpp").write_text("1")
    assert tree.keep_kernels(root, kept, "cuda") == built


@pytest.mark.usefixtures("folders")
def test_waits_are_counted_by_line_without_the_note_on_the_prototype() -> None:
    from gpu.step import count_waits

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("Synchronization debug mode is a prototype feature; synchronizing ...", stacklevel=1)
        for line in (7, 7, 9):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/a/b/c/step.py", line)
    assert count_waits(caught) == {"total": 3, "b/c/step.py:7": 2, "b/c/step.py:9": 1}


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
