"""How many cores this process may use; without torch, which launchers do not import."""

import os

__all__ = ["num_cores"]


def num_cores() -> int:
    """Those it may run on where the system tells, else all of the host."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
