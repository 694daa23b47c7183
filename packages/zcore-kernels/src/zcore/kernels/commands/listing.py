"""What the registry holds, as a table: each op, who serves it here, and why others do not."""

import os

import torch

from zcore.core import ops
from zcore.core.tables import Table
from zcore.kernels.commands.cases import CASES, Operands
from zcore.kernels.cuda.loading import architectures

__all__ = ["list_ops"]


def list_ops(*, device: torch.device, dtype: torch.dtype) -> list[Table]:
    """One row for each implementation of an op, the one that serves marked, for activations of `dtype` on `device`."""
    rows: list[tuple[str, ...]] = []
    forced = os.environ.get("ZCORE_OPS")
    for op, registered in ops.registered().items():
        first = CASES[op](Operands(1, dtype=dtype, device=device)).tensors[0].dtype if op in CASES else dtype
        serves = next((each for each in registered if _refusal(each, device, first, forced) is None), None)
        for at, each in enumerate(registered):
            state = "serves" if each is serves else _refusal(each, device, first, forced) or "stands by"
            rows.append((op if at == 0 else "", each.source, state))
    title = f"{str(dtype).removeprefix('torch.')} on {device.type}" + (f", ZCORE_OPS={forced}" if forced else "")
    built = architectures()
    notes = () if built is None else (f"CUDA kernels: built for {built}",)
    return [Table(title, ("op", "source", "here"), tuple(rows), words=("op", "source", "here"), notes=notes)]


def _refusal(each: ops.Implementation, device: torch.device, dtype: torch.dtype, forced: str | None) -> str | None:
    if forced not in (None, "", each.source):
        return "ZCORE_OPS asks for another"
    return each.refusal(device.type, dtype)
