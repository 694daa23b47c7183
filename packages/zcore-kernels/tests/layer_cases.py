"""The ops of layers as tests call them: a table of operands, torch's gradients, and what a result may differ by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zcore.kernels.ops.bias_dropout_residual
import zcore.kernels.ops.bias_gelu
import zcore.kernels.ops.geglu
import zcore.kernels.ops.layer_norm
import zcore.kernels.ops.rms_norm
import zcore.kernels.ops.rotary
import zcore.kernels.ops.swiglu  # noqa: F401 - each registers its ops
from zcore.core import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A result may differ from the reference in float64, of the same rounded operands, by this much of 1 + its magnitude.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
EPS = 0.1  # of norms: rows of one element have no tiny deviation then, which would magnify rounding

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """How to call one op: `make` draws its arguments for `rows` of `hidden` elements."""

    name: str
    make: Callable[[Callable[..., Tensor], int, int], Arguments]
    label: str = ""

    def __str__(self) -> str:
        return self.name + self.label

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        return as_tuple(getattr(torch.ops.zcore, self.name)(*arguments))

    def reference(self, *arguments: Any) -> tuple[Tensor, ...]:
        found = next(each for each in ops.implementations()[self.name] if each.source == "reference")
        return as_tuple(found.function(*arguments))


def rotary_operands(draw: Callable[..., Tensor], rows: int, hidden: int) -> Arguments:
    """Two heads of queries and one of keys; all but two elements of a head are turned, by angles of 5 positions."""
    width = max(hidden - 2, 0)
    tables = [draw(5, width).detach() for _ in range(2)]
    return draw(rows, 2, hidden), draw(rows, 1, hidden), *tables, torch.arange(rows) * 3 % 5


OPS = [
    Op("rms_norm", lambda draw, rows, hidden: (draw(rows, hidden), draw(hidden), EPS)),
    Op("rms_norm", lambda draw, rows, hidden: (draw(rows, hidden), draw(hidden), EPS, 1.0), " offset"),
    Op("rms_norm", lambda draw, rows, hidden: (draw(rows, hidden), None, EPS), " no weight"),
    Op("rms_norm_residual", lambda draw, rows, hidden: (draw(rows, hidden), draw(rows, hidden), draw(hidden), EPS)),
    Op("layer_norm", lambda draw, rows, hidden: (draw(rows, hidden), draw(hidden), draw(hidden), EPS)),
    Op("layer_norm", lambda draw, rows, hidden: (draw(rows, hidden), None, None, EPS), " no weight"),
    Op("layer_norm", lambda draw, rows, hidden: (draw(rows, hidden), draw(hidden), None, EPS), " no bias"),
    Op(
        "layer_norm_residual",
        lambda draw, rows, hidden: (draw(rows, hidden), draw(rows, hidden), draw(hidden), draw(hidden), EPS),
    ),
    Op("swiglu", lambda draw, rows, hidden: (draw(rows, hidden), draw(rows, hidden))),
    Op("swiglu_packed", lambda draw, rows, hidden: (draw(rows, hidden),)),
    Op("geglu", lambda draw, rows, hidden: (draw(rows, hidden), draw(rows, hidden), "none")),
    Op("geglu", lambda draw, rows, hidden: (draw(rows, hidden), draw(rows, hidden), "tanh"), " tanh"),
    Op("geglu_packed", lambda draw, rows, hidden: (draw(rows, hidden), "tanh")),
    Op("bias_gelu", lambda draw, rows, hidden: (draw(rows, hidden), draw(hidden), "none")),
    Op("bias_gelu", lambda draw, rows, hidden: (draw(rows, hidden), None, "tanh"), " tanh, no bias"),
    Op("rotary", rotary_operands),
    Op("rotary", lambda draw, rows, hidden: (*rotary_operands(draw, rows, hidden), True), " interleaved"),
    Op(
        "bias_dropout_residual",
        lambda draw, rows, hidden: (draw(rows, hidden), draw(hidden), draw(rows, hidden), torch.tensor([-3]), 0.3),
    ),
    Op(
        "bias_dropout_residual",
        lambda draw, rows, hidden: (draw(rows, hidden), None, draw(rows, hidden), torch.tensor([2**40]), 0.5),
        " no bias",
    ),
]


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def drawing(dtype: torch.dtype, seed: int = 7) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def floats(arguments: Arguments) -> list[Tensor]:
    return [each for each in arguments if isinstance(each, Tensor) and each.is_floating_point()]


def gradients(results: tuple[Tensor, ...], arguments: Arguments) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    seeds = [torch.randn(each.shape, generator=generator).to(torch.bfloat16).to(each.dtype) for each in results]
    return torch.autograd.grad(results, [each for each in floats(arguments) if each.requires_grad], seeds)


def widened(arguments: Arguments) -> Arguments:
    return tuple(
        each.detach().double().requires_grad_(each.requires_grad)
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for each in arguments
    )


def check_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, factor: float) -> None:
    assert len(found) == len(expected)
    for each, right in zip(found, expected, strict=True):
        assert each.dtype == dtype
        assert each.shape == right.shape
        torch.testing.assert_close(
            each.double(), right, atol=TOLERANCE[dtype] * factor, rtol=TOLERANCE[dtype], equal_nan=True
        )
