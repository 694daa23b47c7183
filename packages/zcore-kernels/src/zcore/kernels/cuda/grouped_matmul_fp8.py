"""Grouped products of fp8 by CUTLASS, for sm_90; operands as in ops/grouped_matmul_fp8.py, where they are checked."""

import torch
from torch import Tensor

from zcore.kernels.cuda import loading
from zcore.kernels.cuda.grouped_matmul import addresses, launch, why_not_aligned
from zcore.kernels.cuda.grouped_matmul import why_unavailable as why_no_products

__all__ = ["multiply", "why_not", "why_unavailable"]

HOPPER = (9, 0)


def why_unavailable(device: torch.device | None = None) -> str | None:
    """Why no grouped product of fp8 can run on `device`, by default the current one, or None if one can."""
    reason = why_no_products()
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) == HOPPER else f"it is written for sm_90, and this device is sm_{major}{minor}"


def why_not(rows: Tensor, weights: Tensor) -> str | None:
    """Why these are not served, or None if they are."""
    reason = why_unavailable(rows.device)
    if reason is not None:
        return f"no kernel of CUTLASS can run: {reason}."
    num_out, num_in = weights.shape[1:]
    return why_not_aligned(rows, weights, sides={"in": num_in, "out": num_out}, multiples={"in": 16, "out": 8})


def multiply(rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its weight and both scales, bf16."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=torch.bfloat16)
    lengths = rows.shape[0], counts.shape[0], rows.shape[1], out.shape[1]
    given = addresses(rows, weights, row_scales, weight_scales, counts, out)
    launch(
        counts,
        lambda workspace, stream: loading.extension().grouped_matmul_fp8(given, lengths, workspace, stream),
    )
    return out
