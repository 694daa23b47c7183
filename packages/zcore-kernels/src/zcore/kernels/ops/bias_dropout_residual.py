"""residual + dropout(x + bias); formulas and mask stand in native/include/zcore/bias_dropout_residual.hpp.

    bias_dropout_residual(x, bias, residual, seed, drop) -> out

    seed  int64 of one element: a tensor, so that a compiled graph can draw it anew for each call

The mask is a function of the seed and of an element's index alone (Philox4x32-10), the same in the reference and in
compiled code, on any number of threads; the backward computes it again.
"""

from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError
from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import check, operand, rows_of

__all__ = ["bias_dropout_residual", "reference"]

_WORD = 0xFFFFFFFF
_BLOCK = 256  # elements, of 64 counters with four words each


def words(numel: int, seed: int) -> Tensor:
    """The random words of elements 0 to numel - 1 as int64: Philox4x32-10 (doi 10.1145/2063384.2063405)."""
    blocks = -(-numel // _BLOCK)
    counter = torch.arange(blocks * _BLOCK // 4)
    a, b = counter & _WORD, counter >> 32
    c, d = torch.zeros_like(a), torch.zeros_like(a)
    key, high_key = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # A product of two words may pass 2^63, and then wraps; its upper word is put together from narrower products.
        first_high, first = _upper(a, 0xD2511F53), (a * 0xD2511F53) & _WORD
        second_high, second = _upper(c, 0xCD9E8D57), (c * 0xCD9E8D57) & _WORD
        a, b, c, d = second_high ^ b ^ key, second, first_high ^ d ^ high_key, first
        key, high_key = (key + 0x9E3779B9) & _WORD, (high_key + 0xBB67AE85) & _WORD
    return torch.stack([each.view(blocks, _BLOCK // 4) for each in (a, b, c, d)], 1).flatten()[:numel]


def _upper(word: Tensor, factor: int) -> Tensor:
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    return (high + (low >> 16)) >> 16


def reference(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, drop: float) -> Tensor:
    """The sum residual + factor * (x + bias), where factor is 0 with probability `drop` and else 1 / (1 - drop).

    Computed in fp32 at least, in x's dtype at the end.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    threshold = int(drop * 2.0**32)
    scale = 1.0 / (1.0 - drop) if drop < 1.0 else 0.0
    kept = (words(x.numel(), int(seed)) >= threshold).view(x.shape).to(x.device)
    added = x.to(wide) if bias is None else x.to(wide) + bias
    return (residual.to(wide) + added * (kept * scale)).to(x.dtype)


def bias_dropout_residual(x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, drop: float) -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    op = "bias_dropout_residual"
    rows, hidden = rows_of(op, "x", x)
    check(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,))
    if bias is not None:
        check(op, "bias", bias, shape=(hidden,))
    number = _number(op, seed, drop)
    out = torch.empty_like(x)
    operands = (operand(x), operand(bias), operand(residual), operand(out))
    _cpu.bias_dropout_residual(*operands, rows, hidden, drop, number, torch.get_num_threads())
    return out


def bias_dropout_residual_backward(
    dout: Tensor, bias: Tensor | None, seed: Tensor, drop: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where there is none)."""
    op = "bias_dropout_residual_backward"
    rows, hidden = rows_of(op, "dout", dout)
    number = _number(op, seed, drop)
    dx, dbias = fake_backward(dout, bias, seed, drop)
    operands = (operand(dout), operand(dx), operand(None if bias is None else dbias))
    _cpu.bias_dropout_residual_backward(*operands, rows, hidden, drop, number, torch.get_num_threads())
    return dx, dbias


def fake_backward(dout: Tensor, bias: Tensor | None, seed: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """What `bias_dropout_residual_backward` returns, unwritten."""
    return torch.empty_like(dout), dout.new_empty(0) if bias is None else torch.empty_like(bias)


def _number(op: str, seed: Tensor, drop: float) -> int:
    check(op, "seed", seed, shape=(1,), dtypes=(torch.int64,))
    if not 0.0 <= drop <= 1.0:
        raise ConfigError(f"{op}: drop is {drop}; expected a probability, 0 to 1.")
    return int(seed) & 0xFFFFFFFFFFFFFFFF


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, seed, ctx.drop = inputs
    ctx.save_for_backward(bias, seed)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    bias, seed = ctx.saved_tensors
    dx, dbias = torch.ops.zcore.bias_dropout_residual_backward(dout.contiguous(), bias, seed, ctx.drop)
    return dx, None if bias is None else dbias, dout, None, None


register_backward(
    "bias_dropout_residual_backward",
    "(Tensor dout, Tensor? bias, Tensor seed, float drop) -> (Tensor, Tensor)",
    cpu=bias_dropout_residual_backward,
    fake=fake_backward,
    triton="bias_dropout_residual",
)
register_differentiable(
    "bias_dropout_residual",
    "(Tensor x, Tensor? bias, Tensor residual, Tensor seed, float drop) -> Tensor",
    reference=reference,
    cpu=bias_dropout_residual,
    fake=lambda x, bias, residual, seed, drop: torch.empty_like(x),
    setup_context=_setup,
    backward=_backward,
    triton="bias_dropout_residual",
)
