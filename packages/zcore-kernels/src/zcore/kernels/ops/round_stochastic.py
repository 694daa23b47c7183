"""fp32 to bf16, right on average; the formula stands in native/include/zcore/round_stochastic.hpp.

arXiv 1502.02551, section 3; for weights in bf16 arXiv 2010.06192.
"""

import torch
from torch import Tensor

from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.noise import noise_at, word_of
from zcore.kernels.ops.operands import check, check_place, device_of
from zcore.kernels.ops.registering import register

__all__ = ["reference", "round_stochastic", "write_rounded"]

OP = "round_stochastic"
DROPPED_BITS = 16  # of fp32's 32, so that bf16 is left; noise has as many


def reference(values: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """`values` (fp32) in bf16: what lies between two neighbours becomes either, the upper one as often as it is near.

    NaN, infinities and what bf16 can hold stay as they are. offset: the place of the first element in something larger,
    so that a part is rounded as it would be in the whole.

    >>> reference(torch.tensor([1.0, torch.inf]), seed=7)
    tensor([1., inf], dtype=torch.bfloat16)
    """
    noise = noise_at(offset, values.numel(), seed=seed, device=values.device).view(values.shape)
    bits = values.view(torch.int32) + noise  # of the magnitude; a carry into the kept bits rounds it up
    rounded = bits.bitwise_and(-1 << DROPPED_BITS).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def round_stochastic(values: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=device_of(values))
    write_rounded(OP, rounded, values, seed=seed, offset=offset)
    return rounded


def write_rounded(op: str, target: Tensor, values: Tensor, *, seed: int, offset: int) -> None:
    """Check the operands of `op`, and write into `target` what `reference` makes of `values`."""
    device = device_of(target)
    check(op, "values", values, dtypes=(torch.float32,), device=device)
    check(op, "target", target, dtypes=(torch.bfloat16,), numel=values.numel(), device=device)
    check_place(op, offset)
    run(
        OP,
        device,
        values.data_ptr(),
        target.data_ptr(),
        numel=values.numel(),
        seed=word_of(seed),
        offset=offset,
    )


def _fake(values: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    return torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)


register(
    OP,
    "(Tensor values, *, int seed, SymInt offset=0) -> Tensor",
    reference=reference,
    cpu=round_stochastic,
    cuda=round_stochastic,
    fake=_fake,
    dtypes=(torch.float32,),
)
