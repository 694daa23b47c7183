"""Times of calls that take turns: what disturbs the machine meets all of them, and their ratio still holds.

    round 0   a a a a | b b | c c c c c c      between bars the ranks meet; each name calls as often as fills its slice
    round 1   b b | c c c c c c | a a a a
    round 2   c c c c c c | a a a a | b b

A time is that of one call, made back to back with its like, on the rank that took longest.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Spread", "time_in_turns"]

MAX_REPEATS = 2000  # calls in a slice


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of a series, and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of `values`.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.5, high=2.5)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    group: dist.ProcessGroup | None,
    device: torch.device,
    rounds: int,
    slice_s: float,
) -> dict[str, list[float]]:
    """Seconds of one call of each of `runs`, a collective of `group`, in each round; every rank gets the same.

    Every rank of `group` calls this with the same names; it is None where one process calls by itself. slice_s: how
    long a name calls before the next has its turn; a call that takes longer is made once.
    """
    names = list(runs)
    repeats = {name: _choose_repeats(run, slice_s, group, device) for name, run in runs.items()}
    times_s = torch.zeros(len(names), rounds, dtype=torch.float64)
    had_collector = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for step in range(len(names)):
                at = (turn + step) % len(names)
                count = repeats[names[at]]
                times_s[at, turn] = _timed_s(runs[names[at]], count, group, device) / count
    finally:
        if had_collector:
            gc.enable()
    times_s = _slowest(times_s, group, device)
    return {name: times_s[at].tolist() for at, name in enumerate(names)}


def _choose_repeats(
    run: Callable[[], object], slice_s: float, group: dist.ProcessGroup | None, device: torch.device
) -> int:
    """How often `run` fits into a slice, the same on every rank. Tells what the ranks' meeting takes from the call."""
    run()
    repeats = 1
    while True:
        took_s = _slowest(torch.tensor([_timed_s(run, repeats, group, device)]), group, device).item()
        if took_s >= slice_s / 4 or repeats >= MAX_REPEATS:
            return max(1, min(MAX_REPEATS, math.ceil(repeats * slice_s / took_s)))
        repeats *= 8


def _timed_s(run: Callable[[], object], repeats: int, group: dist.ProcessGroup | None, device: torch.device) -> float:
    if group is not None:
        dist.barrier(group)
    _finish(device)
    began_s = time.perf_counter()
    for _ in range(repeats):
        run()
    _finish(device)
    return time.perf_counter() - began_s


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _slowest(times_s: torch.Tensor, group: dist.ProcessGroup | None, device: torch.device) -> torch.Tensor:
    if group is None:
        return times_s
    told = times_s.to(device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return told.cpu()
