"""The ops of layers as tests call them: `make` of each draws its arguments for some rows of `hidden` elements."""

from collections.abc import Callable

import torch
from op_calls import Arguments, Op
from torch import Tensor

import zcore.kernels.ops.bias_dropout_residual
import zcore.kernels.ops.bias_gelu
import zcore.kernels.ops.geglu
import zcore.kernels.ops.layer_norm
import zcore.kernels.ops.rms_norm
import zcore.kernels.ops.rotary
import zcore.kernels.ops.swiglu  # noqa: F401 - each registers its ops

EPS = 0.1  # of norms: rows of one element have no tiny deviation then, which would magnify rounding


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


def drawing(dtype: torch.dtype, seed: int = 7) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
