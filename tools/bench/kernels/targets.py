"""What zcore-kernels promises of a CPU, and whether it holds. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from target import Target

__all__ = ["judge"]

STEP, UPDATE, GAIN, OP = 0.97, 1.5, 0.85, 0.8
FIRST = "zcore"
ONE_PASS = "zcore, one pass"
# What streams through memory; the rest computes more than it moves, or moves it out of order.
STREAMING = (
    *("rms_norm", "layer_norm", "swiglu", "geglu", "bias_gelu", "bias_dropout_residual", "rotary"),
    *("quantize_blockwise", "dequantize_blockwise", "dequantize_reduce_requantize", "pack_signs", "unpack_signs"),
)
COMPILED = "torch.compile"

Figures = Mapping[str, Any]


def judge(steps: Sequence[Figures], ops: Sequence[Figures]) -> list[Target]:
    """Every promise that the rows show something of."""
    return [*(target for row in steps for target in _judge_steps(row)), *_judge_ops(ops)]


def _judge_steps(row: Figures) -> Iterator[Target]:
    where = f"{row['numel'] // 10**6} M in {row['pieces']}, threads {row['threads']}"
    for name, each in row["states"].items():
        if name == FIRST:
            yield Target(f"AdamW, {where}", "of memory", STEP, False, *_spread(each["of_memory"]))
        elif name.startswith(FIRST):
            yield Target(f"gain of {name}, {where}", "of bytes saved", GAIN, False, *_spread(each["of_allowed_gain"]))
    peers = [each["times_first"] for name, each in row["update"].items() if name != ONE_PASS]
    fastest = min(peers, key=lambda each: each["median"])
    yield Target(f"update in one pass, {where}", "x the fastest peer", UPDATE, False, *_spread(fastest))


def _judge_ops(rows: Sequence[Figures]) -> Iterator[Target]:
    for row in rows:
        if row["op"] in STREAMING:
            name = f"{row['op']}, {row['dtype']}"
            if row["contender"].startswith(FIRST):
                yield Target(name, "of memory", OP, False, *_spread(row["of_limit"]))
            elif row["contender"] == COMPILED:
                yield Target(f"{name}, beside torch.compile", "x", 1.0, False, *_spread(row["speedup"]))


def _spread(figures: Figures) -> tuple[float, float, float]:
    return figures["median"], figures["low"], figures["high"]
