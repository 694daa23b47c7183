"""What other programs do with the source tree: build the wheel that holds compiled code, and run the tests.

Each is a process of its own, ended with all that it started where it does not end in time. The tests of core and zero
see no GPU: they are about ranks on CPU, and show that those work here, too.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Built", "build_kernels", "end_all", "find_nvcc", "keep_kernels", "pytest_figures", "run", "run_tests"]

# Called as pip would call it: neither pip nor an index is needed.
BUILD = (
    "import json, sys; from scikit_build_core.build import build_wheel; "
    "build_wheel(sys.argv[1], json.loads(sys.argv[2]))"
)
SOURCES = ("native", "packages/zcore-kernels/bindings", "packages/zcore-kernels/src")
PROJECT = ("packages/zcore-kernels/CMakeLists.txt", "packages/zcore-kernels/pyproject.toml")
TESTS_LIMIT_S = 420
BUILD_LIMIT_S = 500
ALL_SKIPPED = 5  # pytest's code where a file is skipped as a whole, or nothing was chosen
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
RUNNING: set[subprocess.Popen[bytes]] = set()  # what threads wait for, and an interruption has to end


@dataclass(frozen=True, slots=True)
class Built:
    """A wheel of zcore-kernels, and the folder in which it is unpacked for processes to import it from."""

    wheel: Path
    unpacked: Path
    build_s: float


def find_nvcc() -> str | None:
    """The CUDA compiler: the one that is named, on PATH, or where it usually lies."""
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    usual = (str(each) for each in (*(folder / "bin/nvcc" for folder in folders), USUAL_NVCC) if each.exists())
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or next(usual, None)


def keep_kernels(root: Path, kept: Path, device_type: str) -> Built:
    """The wheel in the folder `kept`, built there unless it is one of these very sources and settings.

    CUDA kernels are demanded where there is nvcc for a GPU, and left out where the CPU is tried. Raises RuntimeError
    with the end of the log.
    """
    nvcc = find_nvcc() if device_type == "cuda" else None
    settings = {"cmake.define.ZCORE_CUDA": "ON" if nvcc else "OFF"}
    environment = {"CUDACXX": nvcc} if nvcc else {}  # CMake looks for it on PATH alone
    has_cutlass = find_spec("cutlass_library") is not None  # wherever it lies
    folder = kept / _digest(root, [sys.version, json.dumps([settings, has_cutlass])])
    told = folder / "built.json"
    if not told.exists():  # written last: a build that was cut off is begun anew
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-c", BUILD, str(folder), json.dumps(settings)]
        start_s = time.perf_counter()
        run(command, cwd=root / "packages/zcore-kernels", limit_s=BUILD_LIMIT_S, environment=environment)
        took_s = time.perf_counter() - start_s
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "unpacked")
        told.write_text(json.dumps({"build_s": took_s}))
    (wheel,) = folder.glob("*.whl")
    return Built(wheel, folder / "unpacked", json.loads(told.read_text())["build_s"])


def _digest(root: Path, also: Sequence[str]) -> str:
    """Of the sources that the wheel is made of, and `also`."""
    files = [file for part in SOURCES for file in (root / part).rglob("*") if "__pycache__" not in file.parts]
    digest = hashlib.sha256("".join(also).encode())
    for file in sorted([*files, *(root / part for part in PROJECT)]):
        if file.is_file():
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def build_kernels(root: Path, kept: Path, device_type: str) -> dict[str, object]:
    """Build the wheel, or take the one that is kept, and say what it holds."""
    built = keep_kernels(root, kept, device_type)
    with zipfile.ZipFile(built.wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    return {
        "wheel": built.wheel.name,
        "wheel_bytes": built.wheel.stat().st_size,
        "build_s": built.build_s,
        "compiled_libraries": libraries,
    }


def run_tests(root: Path, *, is_quick: bool) -> dict[str, object]:
    """Run the tests of core and zero on CPU ranks."""
    paths = ["packages/zcore-core/tests", "packages/zcore-zero/tests"]
    if is_quick:
        paths = ["packages/zcore-core/tests/test_store.py"]
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        # Whatever plugins the machine has are not what is tested; ours is no installed one and is named.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    return pytest_figures(root, ["-p", "zcore.core.testing.plugin", *paths], environment, limit_s=TESTS_LIMIT_S)


def pytest_figures(
    root: Path, arguments: Sequence[str], environment: dict[str, str], *, limit_s: float, under: Sequence[str] = ()
) -> dict[str, object]:
    """Run pytest, started by the command `under` where there is one; counts and the names of the tests that failed.

    Raises RuntimeError where it does not come to its end within `limit_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [*under, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        code, said = _run(command, cwd=root, limit_s=limit_s, environment=environment)
        if not report.exists():
            raise RuntimeError(f"pytest left no report. The end of what it said:\n{said[-4000:]}")
        suite = ET.parse(report).getroot()[0]
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    result: dict[str, object] = {**counts, "pytest_s": float(suite.get("time", 0))}
    if failed or code not in (0, ALL_SKIPPED) or not counts["tests"]:
        result |= {"status": "failed", "failed": failed, "reason": said[-4000:]}
    return result


def run(command: list[str], *, cwd: Path, limit_s: float, environment: dict[str, str] | None = None) -> str:
    """Run to the end and return all output. Raises RuntimeError after `limit_s` seconds, and for a code but 0."""
    code, said = _run(command, cwd=cwd, limit_s=limit_s, environment=environment or {})
    if code:
        raise RuntimeError(f"{command[:3]} ended with {code}. The end of what it said:\n{said[-4000:]}")
    return said


def _run(command: list[str], *, cwd: Path, limit_s: float, environment: dict[str, str]) -> tuple[int, str]:
    """The code and all output, which goes to a file: a pipe would stay open in whatever the process left behind."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.add(process)
        is_late = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            RUNNING.discard(process)
            _end(process)  # by an interruption, too
        output.seek(0)
        said = output.read().decode(errors="replace")
    if is_late:
        raise RuntimeError(
            f"{command[:3]} had not ended after {limit_s:.0f} s. The end of what it said:\n{said[-4000:]}"
        )
    return process.returncode, said


def end_all() -> None:
    """End what threads are waiting for, with all that it started."""
    for process in list(RUNNING):
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
