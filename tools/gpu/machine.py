"""What machine this is, by name and by measure: every other figure is read against the two ceilings found here."""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from statistics import median

import torch
from gpu.timing import timed_s

__all__ = ["find_facts", "measure_ceilings"]

COMMANDS = {
    "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    "nvcc": ["nvcc", "--version"],
    "cmake": ["cmake", "--version"],
    "ninja": ["ninja", "--version"],
}


def find_facts(device_type: str) -> dict[str, object]:
    """Names and versions of the device and of what builds and runs on it; None for what is not there."""
    on_cuda = device_type == "cuda"
    properties = torch.cuda.get_device_properties(0) if on_cuda else None
    return {
        "name": properties.name if properties else platform.processor() or platform.machine(),
        "memory_bytes": properties.total_memory if properties else None,
        "compute_capability": f"{properties.major}.{properties.minor}" if properties else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        **{name: _first_version(command) for name, command in COMMANDS.items()},
    }


def _first_version(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+[.\d]*", said)
    return found[0] if found else None


def measure_ceilings(device_type: str, *, is_quick: bool) -> dict[str, float]:
    """Bytes per second of a copy (read and written both counted), and bf16 operations per second of a square product.

    On random data: on zeros a matrix product runs faster than any real one.
    """
    device = torch.device(device_type)
    numel, side, repeats = (1 << 16, 64, 2) if is_quick else (1 << 30, 8192, 20)
    source = torch.randn(numel, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(left, right, out=product),
    }
    took_s = {}
    for name, run in runs.items():
        run()
        took_s[name] = median(timed_s(run, device, repeats=repeats) for _ in range(5))
    copied_bytes = 2 * source.numel() * source.element_size()
    return {
        "copy_tb_per_s": copied_bytes / took_s["copy"] / 1e12,
        "bf16_matmul_tflop_per_s": 2 * side**3 / took_s["matmul"] / 1e12,
    }
