"""The kernels of zcore-kernels on the device: are they right, do they stay in their memory, how fast are they.

The wheel is built from its folder, and unpacked for processes of their own, so that nothing has to be installed. What
runs there sees the GPU; the sanitizer is NVIDIA's, which comes with the CUDA toolkit.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gpu.tree import build_wheel, pytest_figures, run

__all__ = ["try_kernels"]

COMMAND = "from zcore.kernels.commands.command import app; app()"
TESTS = "packages/zcore-kernels/tests"
STEPS = "adamw_step,adagrad_step,lion_step,sgd_step,lamb_average,lamb_apply,squared_norm"
BLOCKS = (
    "quantize_blockwise,dequantize_blockwise,dequantize_reduce_requantize,pack_signs,unpack_signs,round_stochastic,"
    "copy_stochastic,round_with_noise"
)
MEASURED = f"{STEPS},{BLOCKS}"
# They slow a kernel by tens; these tests launch every one, over odd sizes and alignments.
LAUNCHING = (
    "test_steps",
    "test_quantize_blockwise",
    "test_dequantize_reduce_requantize",
    "test_pack_signs",
    "test_round_stochastic",
    "test_round_with_noise",
    "test_grouped_matmul_cuda",
)
SANITIZED = (*(f"{TESTS}/{name}.py" for name in LAUNCHING), "-k", "cuda or gpu")
SANITIZERS = ("memcheck", "racecheck")
LIMIT_S = 900

Figures = dict[str, object]


def try_kernels(root: Path, device_type: str, *, is_quick: bool) -> Figures:
    """Tests, `zcore kernels check` and `bench`, and the sanitizers; the reason names what failed."""
    with tempfile.TemporaryDirectory() as folder:
        wheel, _ = build_wheel(root, Path(folder))
        unpacked, report = Path(folder) / "unpacked", Path(folder) / "bench.json"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        environment = {
            "PYTHONPATH": os.pathsep.join([str(unpacked), str(root / "packages/zcore-core/src")]),
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }

        def command(*arguments: str) -> Figures:
            return _try([sys.executable, "-c", COMMAND, *arguments, "--device", device_type], root, environment)

        tests = [f"{TESTS}/test_cuda.py", f"{TESTS}/test_steps.py"] if is_quick else [TESTS]
        size = ("--numel", "4096", "--rounds", "2", "--turn", "0") if is_quick else ("--numel", "100000000")
        figures = {
            "tests": pytest_figures(root, tests, environment, limit_s=LIMIT_S),
            "check": command("check", *([MEASURED] if is_quick else [])),
            "bench": command("bench", MEASURED, "--against", "torch", *size, "--json", str(report)),
        }
        if report.exists():
            figures["bench"] = {"rows": json.loads(report.read_text())["rows"]}
        figures |= {tool: _sanitize(tool, root, environment, device_type) for tool in SANITIZERS}
    failed = [name for name, found in figures.items() if found.get("status") == "failed"]
    reason = {"status": "failed", "reason": f"failed: {', '.join(failed)}"} if failed else {}
    return {**figures, **reason}


def _sanitize(tool: str, root: Path, environment: dict[str, str], device_type: str) -> Figures:
    if device_type != "cuda":
        return {"status": "not run", "reason": "there is no GPU"}
    if shutil.which("compute-sanitizer") is None:
        return {"status": "not run", "reason": "compute-sanitizer is not installed"}
    # Without torch's caching allocator every tensor has bounds that the tool knows.
    settings = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", *SANITIZED]
    return _try(["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *pytest], root, settings)


def _try(command: list[str], root: Path, environment: dict[str, str]) -> Figures:
    """What it said last."""
    try:
        return {"said": run(command, cwd=root, limit_s=LIMIT_S, environment=environment)[-4000:]}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"status": "failed", "reason": str(error)}
