"""What other programs do with the source tree: build the wheel that will hold compiled code, and run the tests.

Each is a process of its own. The tests see no GPU: they are about ranks on CPU, and show that those work here, too.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

__all__ = ["build_kernels", "run_tests"]

# Called as pip would call it: neither pip nor an index is needed.
BUILD = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
TESTS_LIMIT_S = 420


def build_kernels(root: Path) -> dict[str, object]:
    """Build the wheel of zcore-kernels from its folder. Raises RuntimeError with the end of the log."""
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        _run([sys.executable, "-c", BUILD, folder], cwd=root / "packages/zcore-kernels", limit_s=300)
        took_s = time.perf_counter() - start_s
        (wheel,) = Path(folder).glob("*.whl")
        libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
        return {
            "wheel": wheel.name,
            "wheel_bytes": wheel.stat().st_size,
            "build_s": took_s,
            "compiled_libraries": libraries,
        }


def run_tests(root: Path, *, is_quick: bool) -> dict[str, object]:
    """Run the tests of core and zero on CPU ranks; counts and the names of those that failed."""
    paths = ["packages/zcore-core/tests", "packages/zcore-zero/tests"]
    if is_quick:
        paths = ["packages/zcore-core/tests/test_store.py"]
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        # Whatever plugins the machine has are not what is tested; ours is no installed one and is named.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "zcore.core.testing.plugin", f"--junitxml={report}"]
        said = _run([*command, *paths], cwd=root, limit_s=TESTS_LIMIT_S, environment=environment, may_fail=True)
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


def _run(
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
