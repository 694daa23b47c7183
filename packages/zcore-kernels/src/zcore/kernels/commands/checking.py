"""Each implementation of an op beside its reference, on the same operands: results, and what is written in place.

A difference is taken over the largest value of its tensor, since sums of many terms lose digits where these cancel.
Integers and bytes have to be equal. Each is called while its source is forced, since sources may share torch's way to
the op, which takes the best by itself. What raises is told as that implementation's outcome.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, nearest
from zcore.core.tables import Table
from zcore.kernels.commands.cases import CASES, Call, Operands, tensors_in

__all__ = ["Outcome", "check_op", "named_ops", "table_of", "told"]

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
    raised: str = ""  # what, where it came to no result; then the difference is infinite

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
    """Try every implementation that serves `dtype` on `device`, but the reference; this alone where it raises."""
    name, outcomes = str(dtype).removeprefix("torch."), []
    try:
        call = CASES[op](Operands(numel, dtype=dtype, device=device))
        registered = ops.registered()[op]
        (reference,) = (each for each in registered if each.source == "reference")
        expected = _run(reference, call.copied())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told and the other ops are tried
        return [Outcome(op, "reference", name, float("inf"), told(error))]
    for each in registered:
        if each is not reference and each.refusal(device.type, call.tensors[0].dtype) is None:
            raised = ""
            try:
                excess = _largest_excess(_run(each, call.copied()), expected) / MAGNIFIED.get(op, 1.0)
            except Exception as error:  # noqa: BLE001 - as above
                excess, raised = float("inf"), told(error)
            outcomes.append(Outcome(op, each.source, name, excess, raised))
    return outcomes


def told(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def table_of(outcomes: list[Outcome]) -> Table:
    """For people."""
    rows = tuple((each.op, each.source, each.dtype, f"{each.excess:.2f}", _verdict(each)) for each in outcomes)
    notes = (
        "difference: from the reference, over what rounding explains; at most 1",
        *(f"{each.op}, {each.source}, {each.dtype} raised {each.raised}" for each in outcomes if each.raised),
    )
    columns = ("op", "source", "dtype", "difference", "")
    return Table("", columns, rows, words=("op", "source", "dtype", ""), notes=notes)


def _verdict(outcome: Outcome) -> str:
    return "FAILED" if outcome.raised else "right" if outcome.is_right else "WRONG"


def _run(implementation: ops.Implementation, call: Call) -> list[Tensor]:
    with ops.force(implementation.source):
        result = implementation.function(*call.args, **call.kwargs)
    return [*tensors_in(result), *call.tensors]


def _largest_excess(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(map(_excess, found, expected), default=0.0) if len(found) == len(expected) else float("inf")


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
