"""The sum of squares of one flat tensor, for a global norm: it is finite only where every element is.

Squares are summed in fp64: on the CPU in 16 lanes for each 32,768 elements, and these sums in order, whatever the
number of threads; on CUDA in another order, as fixed. Each is equal from run to run to the bit. The sum is rounded to
fp32 once, so above 3.4e38 it is infinite, as the reference's. The op belongs to whoever clips gradients; its reference
here stands in until the user's is imported.
"""

import torch
from torch import Tensor

from zcore.core.errors import LayoutError
from zcore.kernels import _cpu
from zcore.kernels.cuda.stepping import Result, sum_squares
from zcore.kernels.ops.pieces import FLOATS, Column, Columns
from zcore.kernels.ops.registering import register

__all__ = ["reference", "squared_norm"]

COLUMNS = Columns("squared_norm", [Column("tensor")])
RESULT = Result(1, torch.float32)


def reference(tensor: Tensor) -> Tensor:  # [] fp32
    """The sum of squares of a flat floating-point tensor: one fp32 element, or fp64 of fp64."""
    dtype = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    return tensor.double().square().sum().to(dtype)


def _table(tensor: Tensor) -> _cpu.Table:
    if not isinstance(tensor, Tensor):
        raise LayoutError(
            f"squared_norm got a {type(tensor).__name__}; expected one flat tensor. Sum the norms of several."
        )
    if tensor.dim() != 1:
        raise LayoutError(
            f"squared_norm got a tensor of shape {tuple(tensor.shape)}; expected a flat one. Pass view(-1)."
        )
    return COLUMNS.table(([tensor],))


def _on_cpu(tensor: Tensor) -> Tensor:
    return torch.tensor(_cpu.squared_norm(_table(tensor), torch.get_num_threads()), dtype=torch.float32)


def _on_cuda(tensor: Tensor) -> Tensor:
    return sum_squares("squared_norm", _table(tensor), {}, result=RESULT, device=tensor.device).view(())


def _fake(tensor: Tensor) -> Tensor:
    return tensor.new_empty((), dtype=torch.float32)


squared_norm = register(
    "squared_norm",
    "(Tensor tensor) -> Tensor",
    reference=reference,
    cpu=_on_cpu,
    fake=_fake,
    dtypes=FLOATS,
    cuda=_on_cuda,
)
