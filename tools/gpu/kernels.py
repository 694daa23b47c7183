"""The kernels of zcore-kernels on the device: are they right, do they stay in their memory, how fast are they.

A section for each question, over one wheel that is kept between them. Each test file and each op has a process of its
own: what breaks its CUDA context breaks nothing else. All of a section ends in LIMIT_S, what has not begun by then is
told as not run, and what has is ended. The sanitizers are NVIDIA's, which come with the CUDA toolkit.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.tree import end_all, keep_kernels, pytest_figures, run

__all__ = ["LIMIT_S", "bench", "check", "each_apart", "sanitize", "surroundings", "tell_missing", "try_tests"]

COMMAND = "from zcore.kernels.commands.command import app; app()"
TESTS = "packages/zcore-kernels/tests"
STEPS = ("adamw_step", "adagrad_step", "lion_step", "sgd_step", "lamb_average", "lamb_apply", "squared_norm")
BLOCKS = (
    "quantize_blockwise",
    "dequantize_blockwise",
    "dequantize_reduce_requantize",
    "pack_signs",
    "unpack_signs",
    "round_stochastic",
    "copy_stochastic",
    "round_with_noise",
)
QUICK_OPS = ("adamw_step", "quantize_blockwise")
QUICK_TESTS = ("test_cuda", "test_steps")
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
LIMIT_S = 500.0
AT_ONCE = max(1, min(4, (os.cpu_count() or 1) // 4))  # each takes seconds to import torch, and little of the device
SAYS_WHAT_IS_THERE = (
    "import json; from zcore.kernels.commands.cases import CASES; "
    "from zcore.kernels.cuda import grouped_matmul, loading; "
    "print(json.dumps({'ops': [*CASES], '_cuda': loading.why_unavailable(), "
    "'its grouped products': grouped_matmul.why_unavailable()}))"
)

Figures = dict[str, object]


def try_tests(root: Path, kept: Path, device_type: str, *, is_quick: bool) -> Figures:
    """The tests, a process for each file."""
    files = QUICK_TESTS if is_quick else list_test_files(root)

    def one(name: str, environment: dict[str, str], limit_s: float) -> Figures:
        return pytest_figures(root, [f"{TESTS}/{name}.py"], environment, limit_s=limit_s)

    return _over(files, one, root, kept, device_type)


def list_test_files(root: Path) -> list[str]:
    """Those of Triton first: they compile for minutes, while others take turns beside them."""
    found = (file.stem for file in (root / TESTS).glob("test_*.py"))
    return sorted(found, key=lambda name: (not name.startswith("test_triton"), name))


def check(root: Path, kept: Path, device_type: str, *, is_quick: bool) -> Figures:
    """What `zcore kernels check` says, a process for each op."""

    def one(op: str, environment: dict[str, str], limit_s: float) -> Figures:
        command = [sys.executable, "-c", COMMAND, "check", op, "--device", device_type]
        return {"said": run(command, cwd=root, limit_s=limit_s, environment=environment)[-4000:]}

    return _over(QUICK_OPS if is_quick else None, one, root, kept, device_type)


def bench(root: Path, kept: Path, device_type: str, *, is_quick: bool) -> Figures:
    """Rows of `zcore kernels bench`, a process for each op, one after the other."""
    size = ("--numel", "4096", "--rounds", "2", "--turn", "0") if is_quick else ("--numel", "100000000")

    def one(op: str, environment: dict[str, str], limit_s: float) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "bench.json"
            command = [sys.executable, "-c", COMMAND, "bench", op, "--against", "torch", *size, "--json", str(report)]
            try:
                run([*command, "--device", device_type], cwd=root, limit_s=limit_s, environment=environment)
                failure: Figures = {}
            except RuntimeError as error:  # what it measured before stays
                failure = {"status": "failed", "reason": str(error)}
            rows = json.loads(report.read_text())["rows"] if report.exists() else []
        return {"rows": rows, **failure}

    names = QUICK_OPS if is_quick else (*STEPS, *BLOCKS)
    return _over(names, one, root, kept, device_type, at_once=1)


def sanitize(tool: str, root: Path, kept: Path, device_type: str, *, is_quick: bool) -> Figures:
    """What `memcheck` or `racecheck` finds while the tests launch, a process for each file."""
    if device_type != "cuda":
        return {"status": "refused", "reason": "There is no GPU, whose memory compute-sanitizer watches."}
    if shutil.which("compute-sanitizer") is None:
        return {"status": "refused", "reason": "compute-sanitizer of the CUDA toolkit is not on PATH."}

    def one(name: str, environment: dict[str, str], limit_s: float) -> Figures:
        # Without torch's caching allocator every tensor has bounds that the tool knows.
        settings = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "%p.log"  # of each process
            under = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", f"--log-file={log}"]
            try:
                figures = pytest_figures(
                    root, [f"{TESTS}/{name}.py", "-k", "cuda or gpu"], settings, limit_s=limit_s, under=under
                )
            except RuntimeError as error:
                figures = {"status": "failed", "reason": str(error)}
            said = "".join(file.read_text(errors="replace") for file in sorted(Path(folder).glob("*.log")))
        return {**figures, "findings": said if len(said) < 8000 else f"{said[:6000]}\n...\n{said[-2000:]}"}

    return _over(QUICK_TESTS[1:] if is_quick else LAUNCHING, one, root, kept, device_type)


def surroundings(unpacked: Path, root: Path) -> dict[str, str]:
    """What processes of a section find in their environment: the wheel and the core before all that was named."""
    before = filter(None, [os.environ.get("PYTHONPATH")])
    return {
        "PYTHONPATH": os.pathsep.join([str(unpacked), str(root / "packages/zcore-core/src"), *before]),
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def each_apart(names: Iterable[str], one: Callable[[str, float], Figures], *, limit_s: float, at_once: int) -> Figures:
    """What `one` says of each name and the seconds that are left; the reason names what failed or was not begun."""
    ends_s = time.monotonic() + limit_s

    def try_one(name: str) -> Figures:
        start_s = time.monotonic()
        if start_s >= ends_s:
            return {"status": "not run", "reason": f"the {limit_s:.0f} s of the section were over"}
        try:
            figures: Figures = {"status": "ok", **one(name, ends_s - start_s)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the others run
            figures = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        return {**figures, "took_s": time.monotonic() - start_s}

    tried = list(names)
    with ThreadPoolExecutor(at_once) as threads:
        try:
            parts = dict(zip(tried, threads.map(try_one, tried), strict=True))
        except BaseException:  # an interruption, which threads do not get
            threads.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise
    reasons = [
        f"{status}: {', '.join(which)}"
        for status in ("failed", "not run")
        if (which := [name for name, figures in parts.items() if figures["status"] == status])
    ]
    return {"parts": parts, **({"status": "failed", "reason": "; ".join(reasons)} if reasons else {})}


def _over(
    names: Iterable[str] | None,
    one: Callable[[str, dict[str, str], float], Figures],
    root: Path,
    kept: Path,
    device_type: str,
    *,
    at_once: int = AT_ONCE,
) -> Figures:
    """`each_apart` with the wheel, whose building counts; of all ops where no names are given."""
    ends_s = time.monotonic() + LIMIT_S
    environment = surroundings(keep_kernels(root, kept, device_type).unpacked, root)
    said = run([sys.executable, "-c", SAYS_WHAT_IS_THERE], cwd=root, limit_s=120, environment=environment)
    there = json.loads(said.splitlines()[-1])
    every_op = there.pop("ops")
    figures = each_apart(
        every_op if names is None else names,
        lambda name, left_s: one(name, environment, left_s),
        limit_s=ends_s - time.monotonic(),
        at_once=at_once,
    )
    return tell_missing(figures, there) if device_type == "cuda" else figures


def tell_missing(figures: Figures, there: dict[str, str | None]) -> Figures:
    """What the wheel lacks makes a section failed, whatever else it showed; `there` says why, or None of what is."""
    missing = {name: reason for name, reason in there.items() if reason is not None}
    if not missing:
        return figures
    lacks = "missing: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items())
    reason = f"{figures['reason']}; {lacks}" if "reason" in figures else lacks
    return {**figures, "missing": missing, "status": "failed", "reason": reason}
