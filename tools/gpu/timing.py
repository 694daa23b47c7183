"""A clock that waits for the device, and what is reported of a series of times: the median and how far it spreads."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["summarize", "timed_s", "wait_for"]


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_s(run: Callable[[], object], device: torch.device, *, repeats: int = 1) -> float:
    """Seconds that one of `repeats` runs takes, the device's work included."""
    wait_for(device)
    start_s = time.perf_counter()
    for _ in range(repeats):
        run()
    wait_for(device)
    return (time.perf_counter() - start_s) / repeats


def summarize(times_s: Sequence[float]) -> dict[str, float]:
    """Median and spread: the distance of the quartiles as a share of the median.

    >>> summarize([2.0, 1.0, 3.0])
    {'median_s': 2.0, 'spread': 0.5, 'min_s': 1.0, 'max_s': 3.0}
    """
    low, median, high = statistics.quantiles(times_s, n=4, method="inclusive")
    return {"median_s": median, "spread": (high - low) / median, "min_s": min(times_s), "max_s": max(times_s)}
