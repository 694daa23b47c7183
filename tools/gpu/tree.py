"""What other programs do with the source tree: build the wheel that holds compiled code, and run the tests.

Each is a process of its own. The tests of core and zero see no GPU: they are about ranks on CPU, and show that those
work here, too.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["build_kernels", "build_wheel", "pytest_figures", "run", "run_tests"]

# Called as pip would call it: neither pip nor an index is needed.
BUILD = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
TESTS_LIMIT_S = 420
BUILD_LIMIT_S = 600


def build_wheel(root: Path, folder: Path) -> tuple[Path, float]:
    """Build the wheel of zcore-kernels from its folder into `folder`; the file and the seconds it took.

    Raises RuntimeError with the end of the log.
    """
    start_s = time.perf_counter()
    run([sys.executable, "-c", BUILD, str(folder)], cwd=root / "packages/zcore-kernels", limit_s=BUILD_LIMIT_S)
    took_s = time.perf_counter() - start_s
    (wheel,) = folder.glob("*.whl")
    return wheel, took_s


def build_kernels(root: Path) -> dict[str, object]:
    """Build the wheel, and say what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        wheel, took_s = build_wheel(root, Path(folder))
        libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
        return {
            "wheel": wheel.name,
            "wheel_bytes": wheel.stat().st_size,
            "build_s": took_s,
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
    root: Path, arguments: Sequence[str], environment: dict[str, str], *, limit_s: int
) -> dict[str, object]:
    """Run pytest; counts and the names of the tests that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        said = run(command, cwd=root, limit_s=limit_s, environment=environment, may_fail=True)
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
    if failed or not counts["tests"]:
        result |= {"status": "failed", "failed": failed, "reason": said[-4000:]}
    return result


def run(
    command: list[str], *, cwd: Path, limit_s: int, environment: dict[str, str] | None = None, may_fail: bool = False
) -> str:
    """Run to the end, within `limit_s` seconds, and return all output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        timeout=limit_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode and not may_fail:
        raise RuntimeError(
            f"{command[:3]} ended with {done.returncode}. The end of what it said:\n{done.stdout[-4000:]}"
        )
    return done.stdout
