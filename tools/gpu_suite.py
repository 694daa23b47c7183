"""Builds, tests and times on one CUDA device whatever wants a GPU, without network, and writes one JSON file.

    python tools/gpu_suite.py [--sections facts,build,...] [--wheels DIR] [--out FILE] [--keep DIR] [--quick]

Runs from the source tree; nothing of it needs to be installed. Exit code 0: no section failed, 1: one did, 2: there is
no CUDA device. `--device cpu` tries the suite itself, at test size; its figures are no benchmark and say so.

The file: {"schema": 1, "device": name, "is_benchmark": bool, "command", "commit", "has_local_changes", "started",
"sections": {name: figures}}. Every section's figures hold "status" (ok, failed, refused), "took_s" and, unless it is
ok, a "reason". The others, with `_s` seconds and `_bytes` bytes:

    facts        versions of device, driver, torch and tools; copy_tb_per_s (read + written), bf16_matmul_tflop_per_s
    build        wheel, wheel_bytes, build_s, compiled_libraries
    kernels_*    of zcore-kernels on the device, each within 500 s, parts: name: {status (or `not run`: no time was
                 left), took_s, reason, and the figures here}; on a GPU missing: what the wheel should have and has not
      tests        each file: as below                    bench      each op: rows as `zcore kernels bench` writes them
      check        each op: said, the table               memcheck, racecheck    each file: as below, and findings
    tests        tests, skipped, failures, errors, pytest_s, and names in failed
    zero_parity  {one_rank, two_ranks}: {fp32, bf16}: {zcore-<stage>: largest relative difference of a loss}
    zero_step    {one_rank, simulated}: model: shape, {trainer: median_s, spread (quartile distance / median),
                 times_plain (median over rounds of time / plain torch's), tokens_per_s, held_bytes (between steps),
                 peak_bytes, synchronizations by line, states_bytes of zcore and the formula's}
    overlap      {one_rank, simulated}: {trainer: collectives, kernels, kernels_s (their sum), busy_s (their union)}

gpu/worlds.py says what `simulated` is, gpu/trainers.py what each trainer does. The wheel is built once, by whichever
section wants it first, and kept beside FILE, or in the folder that `--keep` names, for later runs over the same
sources. Where a command may take 10 minutes only, run `--sections build` first, then section by section: each with its
own FILE, all with one `--keep`.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILED = "zcore-kernels"  # used where it is installed: its sources alone lack what is compiled
PACKAGES = [each for each in ROOT.glob("packages/*/src") if each.parent.name != COMPILED]
SOURCES = [*PACKAGES, ROOT / "docs/examples", ROOT / "tools"]  # the examples hold the model
FOR_ZERO = ("torch", "pydantic", "safetensors")
FOR_TESTS = (*FOR_ZERO, "pytest", "hypothesis", "typer", "rich", "yaml")
FOR_BUILD = ("scikit_build_core", "nanobind")
FOR_KERNELS = (*FOR_TESTS, *FOR_BUILD)
CUTLASS, CUTLASS_VERSION = "cutlass_library", "nvidia-cutlass==4.2.0.0"  # headers, with which nvcc is to build
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where an import has another name than what is downloaded

Figures = dict[str, object]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the suite: what it imports from outside, and what it does with (device type, quick, kept wheel)."""

    needs: tuple[str, ...]
    run: Callable[[str, bool, Path], Figures]
    builds: bool = False  # the wheel of kernels, unless it is kept


def facts(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Name the machine and measure its two ceilings."""
    from gpu.machine import find_facts, measure_ceilings

    from zcore.core.testing import run_ranks

    (ceilings,) = run_ranks(1, measure_ceilings, device_type, is_quick=is_quick, init_process_group=False)
    return {**find_facts(device_type), **ceilings}


def build(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Build the kernels' wheel."""
    from gpu.tree import build_kernels

    return build_kernels(ROOT, kept, device_type)


def kernels_tests(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Run the kernels' tests."""
    from gpu.kernels import try_tests

    return try_tests(ROOT, kept, device_type, is_quick=is_quick)


def kernels_check(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Compare every op with its reference."""
    from gpu.kernels import check

    return check(ROOT, kept, device_type, is_quick=is_quick)


def kernels_bench(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Time the ops of steps and of blocks."""
    from gpu.kernels import bench

    return bench(ROOT, kept, device_type, is_quick=is_quick)


def kernels_memcheck(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Look for accesses outside memory."""
    from gpu.kernels import sanitize

    return sanitize("memcheck", ROOT, kept, device_type, is_quick=is_quick)


def kernels_racecheck(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Look for races in shared memory."""
    from gpu.kernels import sanitize

    return sanitize("racecheck", ROOT, kept, device_type, is_quick=is_quick)


def tests(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Run the tests of core and zero, without the GPU."""
    from gpu.tree import run_tests

    return run_tests(ROOT, is_quick=is_quick)


def zero_parity(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Compare losses with plain torch's."""
    from gpu.parity import compare_losses

    return compare_losses(device_type, is_quick=is_quick)


def zero_step(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Time steps beside plain torch's and FSDP2's."""
    from gpu.step import time_steps

    return time_steps(device_type, is_quick=is_quick)


def overlap(device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Profile steps."""
    from gpu.overlap import profile_steps

    return profile_steps(device_type, is_quick=is_quick)


SECTIONS = {
    "facts": Section(("torch",), facts),
    "build": Section(FOR_BUILD, build, builds=True),
    "kernels_tests": Section(FOR_KERNELS, kernels_tests, builds=True),
    "kernels_check": Section(FOR_KERNELS, kernels_check, builds=True),
    "kernels_bench": Section(FOR_KERNELS, kernels_bench, builds=True),
    "kernels_memcheck": Section(FOR_KERNELS, kernels_memcheck, builds=True),
    "kernels_racecheck": Section(FOR_KERNELS, kernels_racecheck, builds=True),
    "tests": Section(FOR_TESTS, tests),
    "zero_parity": Section(FOR_ZERO, zero_parity),
    "zero_step": Section(FOR_ZERO, zero_step),
    "overlap": Section(FOR_ZERO, overlap),
}


def find_missing(modules: Sequence[str]) -> list[str]:
    """Those of `modules`, or of what they import in turn, that are not here, as names to download."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            name = (error.name or module).partition(".")[0]
            missing.append(DISTRIBUTIONS.get(name, name.replace("_", "-")))
    return list(dict.fromkeys(missing))


def tell_how_to_carry(missing: Sequence[str]) -> str:
    """What to do where something is missing and there is no network."""
    version, machine = "".join(platform.python_version_tuple()[:2]), platform.machine()
    platforms = " ".join(f"--platform manylinux_2_{glibc}_{machine}" for glibc in (28, 17))
    download = "python -m pip download --dest wheels"
    commands = []
    if others := [name for name in missing if name != CUTLASS_VERSION]:
        commands.append(
            f"`{download} --only-binary=:all: --implementation cp --python-version {version} {platforms} "
            f"{' '.join(others)}`"
        )
    if CUTLASS_VERSION in missing:
        commands.append(f"`{download} --no-deps {CUTLASS_VERSION}`")  # of which only headers are wanted
    return (
        f"Not installed here: {', '.join(missing)}. On a machine with network run {' and '.join(commands)}, "
        "carry the folder here and add `--wheels wheels`."
    )


def find_missing_headers(device_type: str) -> list[str]:
    """What the wheel's CUDA kernels are built with, and is not here, as names to download."""
    from gpu.tree import find_nvcc

    is_wanted = device_type == "cuda" and find_nvcc() is not None and importlib.util.find_spec(CUTLASS) is None
    return [CUTLASS_VERSION] if is_wanted else []


def install_carried(wheels: Path, target: Path) -> None:
    """Install the wheel files in `wheels` into the folder `target`, asking no index."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(
            f"--wheels {wheels} holds no *.whl file. Fill it with `pip download`, or leave the option out."
        )
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True)


def open_paths(*folders: Path) -> None:
    """Put folders in front of where this process and those that it starts import from."""
    paths = list(map(str, folders))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def refuse_without_cuda() -> None:
    """Exit with 2 and one paragraph where torch sees no CUDA device."""
    advice = (
        "This suite builds, tests and times on one NVIDIA GPU. Run it where `nvidia-smi` lists one and a CUDA build of "
        "torch is installed; to try the suite itself on CPU, at test size, add `--device cpu --out FILE`."
    )
    if find_missing(["torch"]):
        reason = "torch is not installed for this Python."
    else:
        import torch

        if torch.cuda.is_available():
            return
        reason = f"There is no CUDA device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees none."
    print(f"{reason} {advice}", file=sys.stderr)
    raise SystemExit(2)


def run_section(section: Section, device_type: str, is_quick: bool, kept: Path) -> Figures:
    """Run one section to its end, whatever that is."""
    start_s = time.perf_counter()
    try:
        missing = [*find_missing(section.needs), *(find_missing_headers(device_type) if section.builds else [])]
        if missing:
            figures: Figures = {"status": "refused", "reason": tell_how_to_carry(missing)}
        else:
            figures = {"status": "ok", **section.run(device_type, is_quick, kept)}
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the other sections run
        frames = traceback.format_tb(error.__traceback__)
        figures = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": frames}
    return {**figures, "took_s": time.perf_counter() - start_s}


def name_device(device_type: str) -> str:
    """The device's own name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name(0) if device_type == "cuda" else "cpu"


def ask_git(*arguments: str) -> str | None:
    """What git says of the tree; None where it is no checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Build, test and time what wants a GPU, on one CUDA device.")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which to run, by default %(default)s")
    parser.add_argument("--wheels", type=Path, help="folder of carried wheel files for imports that are missing here")
    parser.add_argument("--out", type=Path, help="JSON file, by default docs/benchmarks/gpu-<device>.json")
    parser.add_argument("--keep", type=Path, help="folder of the wheel, by default beside the file, <FILE>-wheel")
    parser.add_argument("--commit", help="where the tree is no git checkout: which commit it is")
    parser.add_argument("--quick", action="store_true", help="test size: seconds, and no benchmark")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the suite, at test size")
    options = parser.parse_args(arguments)
    options.sections = options.sections.split(",")
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.device == "cpu" and options.out is None:
        parser.error("--device cpu measures nothing worth keeping: say with --out where its file goes")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line names and write the file."""
    options = read_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="zcore-wheels-") as carried:
        if options.wheels is not None:
            install_carried(options.wheels, Path(carried))
        open_paths(Path(carried), *SOURCES)
        if options.device == "cuda":
            refuse_without_cuda()
        is_quick = options.quick or options.device == "cpu"
        device = name_device(options.device)
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        out: Path = options.out or ROOT / f"docs/benchmarks/gpu-{slug}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = (options.keep or out.with_name(f"{out.stem}-wheel")).resolve()
        sections: dict[str, Figures] = {}
        changes = ask_git("status", "--porcelain", "--untracked-files=no")
        report = {
            "schema": 1,
            "device": device,
            "is_benchmark": not is_quick,
            "command": shlex.join(
                ["python", "tools/gpu_suite.py", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            "commit": options.commit or ask_git("rev-parse", "HEAD"),
            "has_local_changes": None if changes is None else bool(changes),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "sections": sections,
        }
        for name in options.sections:
            print(f"{name:17} ...", flush=True)
            sections[name] = run_section(SECTIONS[name], options.device, is_quick, kept)
            out.write_text(json.dumps(report, indent=2) + "\n")  # each time: a later section may be cut off
            took_s, status = sections[name]["took_s"], sections[name]["status"]
            print(f"{name:17} {status} in {took_s:.1f} s  {sections[name].get('reason', '')}", flush=True)
    print(f"written: {out}")
    return 1 if any(figures["status"] == "failed" for figures in sections.values()) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended, too, and not left to itself
    sys.exit(main())
