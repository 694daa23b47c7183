"""How an op over flat pieces is launched: what it takes from the device, and the memory for what it returns.

Settings that are tensors stay on the device and go to the kernel by address, so that nothing waits for them:

    clip_factor    [] or [1] fp32         what gradients are multiplied by besides `grad_factor`; may be None
    ratios         [num_pieces] fp64      of `lamb_apply`
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.cuda.loading import extension, launching
from zcore.kernels.ops.operands import check

__all__ = ["Result", "step", "sum_squares"]


@dataclass(frozen=True, slots=True)
class Result:
    """What an op returns: one row of `width` for each piece, in `dtype`, on the device of the pieces."""

    width: int
    dtype: torch.dtype


def step(op: str, table: _cpu.Table, settings: dict[str, Any], *, device: torch.device) -> None:
    """Queue the kernel of `op` over `table`, whose tensors are on `device`; `settings` as of the op's reference.

    Raises LayoutError and ConfigError for a tensor among these that does not fit.
    """
    given = _by_address(op, settings, len(table), device)
    with launching(device) as stream:
        getattr(extension(), op)(table, stream, **given)


def sum_squares(
    op: str, table: _cpu.Table, settings: dict[str, Any], *, result: Result, device: torch.device
) -> Tensor:  # [num_pieces, result.width]
    """The same of an op that returns sums: of each chunk in scratch, which goes back to torch at once, in turn."""
    given = _by_address(op, settings, len(table), device)
    native = extension()
    with launching(device) as stream:
        made = torch.empty(len(table), result.width, dtype=result.dtype, device=device)
        partial = native.num_partial_sums(table) * result.width
        scratch = torch.empty(partial, dtype=torch.float64, device=device)
        getattr(native, op)(table, stream, scratch=scratch.data_ptr(), result=made.data_ptr(), **given)
    return made


def _by_address(op: str, settings: dict[str, Any], num_pieces: int, device: torch.device) -> dict[str, Any]:
    given = dict(settings)
    for key, numel, dtype in (("clip_factor", 1, torch.float32), ("ratios", num_pieces, torch.float64)):
        if key in given:
            tensor = given[key]
            if tensor is not None:
                check(op, key, tensor, numel=numel, dtypes=(dtype,), device=device)
            given[key] = 0 if tensor is None else tensor.data_ptr()
    return given
