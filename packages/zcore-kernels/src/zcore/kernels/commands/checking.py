"""Each implementation of an op beside its reference, on the same operands: results, and what is written in place.

A difference is taken over the largest value of its tensor, since sums of many terms lose digits where these cancel.
Integers and bytes have to be equal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, nearest
from zcore.core.tables import Table
from zcore.kernels.commands.cases import CASES, Call, Operands, tensors_in

__all__ = ["Outcome", "check_op", "named_ops", "table_of"]

# Some units in the last place; fp32's also cover sums of all operands, which references add in fp32.
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# Its steps magnify the rounding of every product: sums in another order alone differ by 1.0 of that, [512, 512].
MAGNIFIED = {"newton_schulz": 4.0}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one implementation: the largest difference over what is allowed of it; at most 1 is right."""

    op: str
    source: str
    dtype: str
    excess: float

    @property
    def is_right(self) -> bool:
        """False for NaN where the reference has none, too."""
        return self.excess <= 1.0


def named_ops(asked: str) -> list[str]:
    """The ops named, separated by commas, or all. Raises ConfigError for one that there is not."""
    names = [each for each in asked.split(",") if each] or list(CASES)
    for name in names:
        if name not in CASES:
            near = nearest(name, CASES)
            advice = f"Did you mean {near}?" if near else "`zcore kernels list` shows them."
            raise ConfigError(f"No op is called {name!r}. {advice}")
    return names


def check_op(op: str, *, numel: int, dtype: torch.dtype, device: torch.device) -> list[Outcome]:
    """Try every implementation that serves `dtype` on `device`, but the reference."""
    call = CASES[op](Operands(numel, dtype=dtype, device=device))
    registered = ops.registered()[op]
    (reference,) = (each for each in registered if each.source == "reference")
    expected = _run(reference, call.copied())
    outcomes = []
    for each in registered:
        if each is not reference and each.refusal(device.type, call.tensors[0].dtype) is None:
            found = _run(each, call.copied())
            excess = max(map(_excess, found, expected), default=0.0) if len(found) == len(expected) else float("inf")
            excess /= MAGNIFIED.get(op, 1.0)
            outcomes.append(Outcome(op, each.source, str(dtype).removeprefix("torch."), excess))
    return outcomes


def table_of(outcomes: list[Outcome]) -> Table:
    """For people."""
    rows = tuple(
        (each.op, each.source, each.dtype, f"{each.excess:.2f}", "right" if each.is_right else "WRONG")
        for each in outcomes
    )
    note = "difference: from the reference, over what rounding explains; at most 1"
    columns = ("op", "source", "dtype", "difference", "")
    return Table("", columns, rows, words=("op", "source", "dtype", ""), notes=(note,))


def _run(implementation: ops.Implementation, call: Call) -> list[Tensor]:
    result = implementation.function(*call.args, **call.kwargs)
    return [*tensors_in(result), *call.tensors]


def _excess(found: Tensor, expected: Tensor) -> float:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if found.dtype not in ALLOWED:
        equal = torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        return 0.0 if equal else float("inf")
    if not found.numel():
        return 0.0
    one, other = found.double(), expected.double()
    difference = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, one - other).abs().max()
    largest = other.abs().nan_to_num().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(difference / largest) / ALLOWED[found.dtype]
