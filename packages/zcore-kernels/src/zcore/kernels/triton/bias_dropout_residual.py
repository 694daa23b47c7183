"""residual + dropout(x + bias) in Triton; operands as in ops/bias_dropout_residual.py.

Formulas and the order of random words stand in native/include/zcore/bias_dropout_residual.hpp: a counter of Philox
gives the words of four elements that lie 64 apart, so a program takes elements in four runs, and uses every word.

    counter    0  1 ... 63   64 ...          element of word w: 256 (counter / 64) + 64 w + counter % 64

In fp32 forward moves 12 bytes an element, backward 8, and with a bias 4 more: its gradient is summed from dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.kernels.ops.operands import check, rows_of

__all__ = ["bias_dropout_residual", "bias_dropout_residual_backward"]

COUNTERS = 256  # of a program, with four elements each; not measured on a GPU yet
NUM_WARPS = 4
LANES = tl.constexpr(64)  # counters of a block of 256 elements


@triton.jit
def first_elements_and_words(
    seed: tl.tensor, COUNTERS: tl.constexpr
) -> tuple[tl.tensor, tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]]:
    """Of this program's counters the element of the first word, int64, and all four words."""
    counter = tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros([COUNTERS], tl.uint32)
    words = tl.philox(tl.load(seed), low, high, zero, zero)
    return counter // LANES * (4 * LANES) + counter % LANES, words


@triton.jit
def forward_kernel(
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    seed: tl.tensor,
    out: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    numel: tl.tensor,
    hidden: tl.tensor,
    COUNTERS: tl.constexpr,
) -> None:
    """4 COUNTERS elements; what has a word at or above `threshold` is kept, times `scale`. `bias` may be None."""
    first, words = first_elements_and_words(seed, COUNTERS)
    for index in tl.static_range(4):
        element = first + index * LANES
        is_inside = element < numel
        added = tl.load(x + element, mask=is_inside, other=0.0).to(tl.float32)
        if bias is not None:
            added += tl.load(bias + element % hidden, mask=is_inside, other=0.0).to(tl.float32)
        factor = tl.where(words[index].to(tl.int64) >= threshold, scale, 0.0)
        found = tl.load(residual + element, mask=is_inside, other=0.0).to(tl.float32) + added * factor
        tl.store(out + element, found.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(
    dout: tl.tensor,
    seed: tl.tensor,
    dx: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    numel: tl.tensor,
    COUNTERS: tl.constexpr,
) -> None:
    """The gradient of x, by the mask drawn again."""
    first, words = first_elements_and_words(seed, COUNTERS)
    for index in tl.static_range(4):
        element = first + index * LANES
        is_inside = element < numel
        factor = tl.where(words[index].to(tl.int64) >= threshold, scale, 0.0)
        found = tl.load(dout + element, mask=is_inside, other=0.0).to(tl.float32) * factor
        tl.store(dx + element, found.to(dx.dtype.element_ty), mask=is_inside)


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, drop: float) -> Tensor:
    """The sum; raises LayoutError and ConfigError for operands that are not served.

    seed: on the CPU or on the device of x, where no copy has to be sent for it.
    """
    op = "bias_dropout_residual"
    _, hidden = rows_of(op, "x", x, device=x.device)
    check(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    if bias is not None:
        check(op, "bias", bias, shape=(hidden,), device=x.device)
    seed, threshold, scale = _mask(op, seed, drop, x.device)
    out = torch.empty_like(x)
    if x.numel():
        forward_kernel[_grid(x)](
            x,
            bias,
            residual,
            seed,
            out,
            threshold,
            scale,
            x.numel(),
            hidden,
            COUNTERS=COUNTERS,
            num_warps=NUM_WARPS,
        )
    return out


def bias_dropout_residual_backward(
    dout: Tensor, bias: Tensor | None, seed: Tensor, drop: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where there is none)."""
    op = "bias_dropout_residual_backward"
    rows, hidden = rows_of(op, "dout", dout, device=dout.device)
    seed, threshold, scale = _mask(op, seed, drop, dout.device)
    dx = torch.empty_like(dout)
    if dout.numel():
        sizes = {"COUNTERS": COUNTERS, "num_warps": NUM_WARPS}
        backward_kernel[_grid(dout)](dout, seed, dx, threshold, scale, dout.numel(), **sizes)
    if bias is None:
        return dx, dout.new_empty(0)
    return dx, dx.view(rows, hidden).sum(0, dtype=torch.float32).to(bias.dtype)


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), 4 * COUNTERS),)


def _mask(op: str, seed: Tensor, drop: float, device: torch.device) -> tuple[Tensor, int, float]:
    """The seed where kernels can read it, the first word that is kept, and the factor of what is kept."""
    check(op, "seed", seed, shape=(1,), dtypes=(torch.int64,), device=seed.device)
    if not 0.0 <= drop <= 1.0:
        raise ConfigError(f"{op}: drop is {drop}; expected a probability, 0 to 1.")
    return seed.to(device), int(drop * 2.0**32), 1.0 / (1.0 - drop) if drop < 1.0 else 0.0
