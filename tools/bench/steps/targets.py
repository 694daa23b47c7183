"""What ZeRO on 2 ranks of one host is to reach, and whether it does. Pure."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import ge, le
from typing import Any

from steps.names import peers_of, zcore_at

__all__ = ["Target", "judge"]

PLAIN_GLOO = "zcore 3 plain gloo"
STAGES = range(4)
FALL_SHARE = 0.9  # of the formula's: a peak also holds activations and buffers, which stages have more or less of


@dataclass(frozen=True, slots=True)
class Target:
    """One promise about one model. `found` is a median where `low` and `high` are its quartiles."""

    name: str
    unit: str
    wanted: float
    is_limit: bool  # `wanted` is the most, else the least
    found: float
    low: float | None = None
    high: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the promise is kept."""
        keeps: Callable[[float, float], bool] = le if self.is_limit else ge
        return keeps(self.found, self.wanted)

    def to_dict(self) -> dict[str, object]:
        """For the report."""
        return {**asdict(self), "is_met": self.is_met}

    def __str__(self) -> str:
        spread = "" if self.low is None else f" ({self.low:.3f} - {self.high:.3f})"
        bound = "at most" if self.is_limit else "at least"
        verdict = "met   " if self.is_met else "MISSED"
        return f"{verdict} {self.name}: wanted {bound} {self.wanted:.2f}, found {self.found:.3f}{spread} {self.unit}"


def judge(contenders: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """Every promise of which the contenders of a model show something."""
    return [*_judge_times(contenders), *_judge_memory(contenders)]


def _judge_times(contenders: Mapping[str, Mapping[str, Any]]) -> Iterator[Target]:
    times = [(zcore_at(stage), "times_ddp", "x DDP", 1.0) for stage in STAGES]
    times += [(zcore_at(3), "times_fsdp2", "x FSDP2", 0.65), (PLAIN_GLOO, "times_fsdp2", "x FSDP2", 0.85)]
    for name, key, unit, wanted in times:
        ratio = contenders.get(name, {}).get(key)
        if ratio is not None:
            found = ratio["median"]
            yield Target(f"step of {name}", unit, wanted, True, found, low=ratio["low"], high=ratio["high"])


def _judge_memory(contenders: Mapping[str, Mapping[str, Any]]) -> Iterator[Target]:
    def peak_bytes(name: str) -> float | None:
        memory = contenders.get(name, {}).get("memory")
        return None if memory is None else memory["peak_bytes"]

    def formula_bytes(stage: int) -> float:
        return contenders[zcore_at(stage)]["memory"]["formula_bytes"]

    for stage in STAGES:
        own = peak_bytes(zcore_at(stage))
        peers = [(peak, name) for name in peers_of(stage) if (peak := peak_bytes(name)) is not None]
        if own is not None and peers:
            least, best = min(peers)
            yield Target(f"peak memory of {zcore_at(stage)}", f"x {best}", 0.95, True, own / least)
    for stage in STAGES[1:]:
        above, own = peak_bytes(zcore_at(stage - 1)), peak_bytes(zcore_at(stage))
        if above is not None and own is not None:
            share = (above - own) / (formula_bytes(stage - 1) - formula_bytes(stage))
            name = f"fall of peak memory from {zcore_at(stage - 1)} to {zcore_at(stage)}"
            yield Target(name, "x the formula's", FALL_SHARE, False, share)
