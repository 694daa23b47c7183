"""What ZeRO on 2 ranks of one host is to reach, and whether it does. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from steps.names import peers_of, zcore_at
from target import Target

__all__ = ["judge"]

PLAIN_GLOO = "zcore 3 plain gloo"
STAGES = range(4)
FALL_SHARE = 0.9  # of the formula's: a peak also holds activations and buffers, which stages have more or less of


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
