"""What a figure was measured on: processor, memory, system, versions, and how busy the machine was."""

import os
import platform
from pathlib import Path

import torch

from zcore.core.cores import num_cores
from zcore.core.extensions import WHEELS, installed

__all__ = ["find_machine", "find_versions", "load", "load_notes"]

BUSY = 1.0  # processes beyond the bench's own, from which on figures are doubtful


def find_machine(device: torch.device) -> dict[str, object]:
    """The host of this process, and its accelerator if that is what `device` is."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": num_cores(),
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.release()}",
        "accelerator": None if device.type == "cpu" else torch.get_device_module(device.type).get_device_name(device),
    }


def find_versions() -> dict[str, str]:
    """Of Python, torch and the wheels that are installed."""
    wheels = {name: installed(name) for name in WHEELS}
    here = {name: version for name, version in wheels.items() if version is not None}
    return {"python": platform.python_version(), "torch": torch.__version__, **here}


def load() -> float:
    """How many processes wanted a processor, on average over the last minute."""
    return os.getloadavg()[0]


def load_notes(before: float) -> tuple[str, ...]:
    """What to say of that load."""
    busy = f"The machine was busy before (load {before:.1f}): quiet ones are faster, and say more."
    return (busy,) if before > BUSY else ()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
