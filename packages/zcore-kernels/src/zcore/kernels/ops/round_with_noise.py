"""fp32 to bf16 with noise that the caller has drawn; the formula stands in native/include/zcore/round_with_noise.hpp.

For runs that keep the bits they had with a generator of their own; else `round_stochastic` draws it as it rounds.
"""

import torch
from torch import Tensor

from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.operands import check, device_of
from zcore.kernels.ops.registering import register

__all__ = ["reference", "round_with_noise"]

OP = "round_with_noise"
DROPPED_BITS = 16  # of fp32's 32, so that bf16 is left


def reference(values: Tensor, noise: Tensor) -> Tensor:
    """`values` (fp32) in bf16: the upper of two neighbours where noise makes up for what is missing.

    noise: int32 of as many elements, in [0, 2^16). NaN, infinities and what bf16 can hold stay as they are.

    >>> reference(torch.tensor([1.0 + 2**-8] * 2), torch.tensor([0, 2**15], dtype=torch.int32))
    tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    bits = values.view(torch.int32) + noise.view(values.shape)  # of the magnitude; a carry into the kept bits rounds up
    rounded = bits.bitwise_and(-1 << DROPPED_BITS).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def round_with_noise(values: Tensor, noise: Tensor) -> Tensor:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    device = device_of(values)
    check(OP, "values", values, dtypes=(torch.float32,), device=device)
    check(OP, "noise", noise, dtypes=(torch.int32,), numel=values.numel(), device=device)
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=device)
    run(OP, device, values.data_ptr(), noise.data_ptr(), rounded.data_ptr(), numel=values.numel())
    return rounded


def _fake(values: Tensor, noise: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)


register(
    OP,
    "(Tensor values, Tensor noise) -> Tensor",
    reference=reference,
    cpu=round_with_noise,
    cuda=round_with_noise,
    fake=_fake,
    dtypes=(torch.float32,),
)
