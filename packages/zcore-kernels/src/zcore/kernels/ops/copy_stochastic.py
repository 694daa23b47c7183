"""Writes fp32 into bf16 that is there already, as `round_stochastic` rounds it: a step's masters into parameters."""

import torch
from torch import Tensor

from zcore.kernels.ops.registering import register
from zcore.kernels.ops.round_stochastic import reference as round_values
from zcore.kernels.ops.round_stochastic import write_rounded

__all__ = ["copy_stochastic", "reference"]

OP = "copy_stochastic"


def reference(target: Tensor, values: Tensor, *, seed: int, offset: int = 0) -> None:
    """Write `values` (fp32) into `target` (bf16, of as many elements); see `round_stochastic`.

    >>> target = torch.zeros(2, dtype=torch.bfloat16)
    >>> reference(target, torch.tensor([1.0, -3.0]), seed=7)
    >>> target
    tensor([ 1., -3.], dtype=torch.bfloat16)
    """
    target.copy_(round_values(values, seed=seed, offset=offset).view_as(target))


def copy_stochastic(target: Tensor, values: Tensor, *, seed: int, offset: int = 0) -> None:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    write_rounded(OP, target, values, seed=seed, offset=offset)


register(
    OP,
    "(Tensor(a!) target, Tensor values, *, int seed, SymInt offset=0) -> ()",
    reference=reference,
    cpu=copy_stochastic,
    cuda=copy_stochastic,
    fake=lambda *args, **kwargs: None,
    dtypes=(torch.bfloat16,),
)
