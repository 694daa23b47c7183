"""The device facade: the few things that differ between CPU and an accelerator, and nothing else.

The same program runs on both; CUDA adds speed, not semantics. A device is chosen once, at the border, and passed on.
"""

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["backend_for", "choose_device", "device_in_use_bytes", "restore_random_state", "take_random_state"]


def choose_device(environ: Mapping[str, str] = os.environ) -> torch.device:
    """The accelerator of this local rank (`LOCAL_RANK`, 0 when absent), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def backend_for(device: torch.device) -> str:
    """The torch.distributed backend that moves tensors of `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def device_in_use_bytes(device: torch.device) -> int:
    """Bytes in use: what torch has allocated on an accelerator, the resident set of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        resident_pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(resident_pages) * resource.getpagesize()
    except FileNotFoundError:  # not Linux: the peak is the nearest figure that the standard library has
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def take_random_state(device: torch.device) -> dict[str, Tensor]:
    """The random generators' states as CPU byte tensors, by name."""
    states = {"torch_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["torch_cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `take_random_state` took."""
    torch.set_rng_state(states["torch_cpu"])
    if device.type == "cuda" and "torch_cuda" in states:
        torch.cuda.set_rng_state(states["torch_cuda"], device)
