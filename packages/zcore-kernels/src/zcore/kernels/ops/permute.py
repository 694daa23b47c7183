"""Rows of tokens sorted by expert, and back; drawn in native/include/zcore/permute.hpp.

permute(x, experts, num_experts) -> rows, counts, places
unpermute(rows, places, weights) -> out

    x, out    [tokens, hidden]
    experts   [tokens, k] int64        from 0 to num_experts - 1
    rows      [tokens * k, hidden]     those of expert 0, then those of expert 1; of one expert in the order of tokens
    counts    [num_experts] int64      how many rows each expert has
    places    [tokens, k] int64        the row of each choice
    weights   [tokens, k]              by which rows are multiplied before a token's are added up

On CUDA Triton serves, which cannot refuse experts and places that there are not without waiting for the device; the
headers of triton/permute.py and triton/unpermute.py say what becomes of them.
"""

from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import CPU, check, check_indices, operand

__all__ = [
    "check_operands",
    "check_operands_unpermute",
    "check_operands_unpermute_backward",
    "fake",
    "fake_unpermute",
    "fake_unpermute_backward",
    "permute",
    "reference",
    "reference_unpermute",
    "unpermute",
]


def reference(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of each row of `x` for each of its experts, sorted by expert; how many each has, and where each lies."""
    chosen, k = experts.flatten(), experts.shape[1]
    order = chosen.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.bincount(chosen, minlength=num_experts)
    return x[order // max(k, 1)], counts, places.view(experts.shape)


def reference_unpermute(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times their weights where there are any.

    Computed in fp32 at least, in the dtype of rows at the end.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))[places]
    return (wide if weights is None else wide * weights.to(wide.dtype).unsqueeze(-1)).sum(1).to(rows.dtype)


def check_operands(x: Tensor, experts: Tensor, num_experts: int, *, device: torch.device = CPU) -> None:
    """Raise LayoutError or ConfigError unless `permute` takes these on `device`, but for the values of `experts`."""
    if x.ndim != 2 or experts.ndim != 2:
        raise LayoutError(
            f"permute: x has shape {tuple(x.shape)}, experts {tuple(experts.shape)}; expected [tokens, hidden] and "
            "[tokens, k]."
        )
    if num_experts < 0:
        raise ConfigError(f"permute: num_experts is {num_experts}; expected 0 or more.")
    check("permute", "x", x, device=device)
    check("permute", "experts", experts, shape=(x.shape[0], experts.shape[1]), dtypes=(torch.int64,), device=device)


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    check_operands(x, experts, num_experts)
    check_indices("permute", "experts", experts, num_experts, "num_experts")
    tokens, hidden = x.shape
    rows, counts, places = fake(x, experts, num_experts)
    _cpu.permute(
        operand(x),
        experts.data_ptr(),
        operand(rows),
        counts.data_ptr(),
        places.data_ptr(),
        tokens,
        hidden,
        experts.shape[1],
        num_experts,
        torch.get_num_threads(),
    )
    return rows, counts, places


def fake(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `permute` returns, unwritten."""
    rows = x.new_empty(experts.shape[0] * experts.shape[1], x.shape[1])
    return rows, experts.new_empty(num_experts), torch.empty_like(experts)


def check_operands_unpermute(
    rows: Tensor, places: Tensor, weights: Tensor | None, *, device: torch.device = CPU
) -> None:
    """Raise LayoutError or ConfigError unless `unpermute` takes these on `device`, but for the values of `places`."""
    if rows.ndim != 2:
        raise LayoutError(f"unpermute: rows has shape {tuple(rows.shape)}; expected [tokens * k, hidden].")
    check("unpermute", "rows", rows, device=device)
    _check_choices("unpermute", places, weights, rows.shape[0], device)


def check_operands_unpermute_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None, *, device: torch.device = CPU
) -> None:
    """The same for its gradient."""
    op = "unpermute_backward"
    if dout.ndim != 2:
        raise LayoutError(f"{op}: dout has shape {tuple(dout.shape)}; expected [tokens, hidden].")
    _check_choices(op, places, weights, places.numel(), device)
    check(op, "dout", dout, shape=(places.shape[0], dout.shape[1]), device=device)
    if rows is not None:
        check(op, "rows", rows, shape=(places.numel(), dout.shape[1]), dtypes=(dout.dtype,), device=device)


def unpermute(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """See `reference_unpermute`; for what `permute` takes, and weights of fp32, bf16 or fp16."""
    check_operands_unpermute(rows, places, weights)
    _check_places("unpermute", places)
    out = fake_unpermute(rows, places, weights)
    _cpu.unpermute(
        operand(rows),
        places.data_ptr(),
        operand(weights),
        operand(out),
        places.shape[0],
        rows.shape[1],
        places.shape[1],
        torch.get_num_threads(),
    )
    return out


def fake_unpermute(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """What `unpermute` returns, unwritten."""
    return rows.new_empty(places.shape[0], rows.shape[1])


def unpermute_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and of weights, which is empty where there are none; only it needs the rows."""
    check_operands_unpermute_backward(dout, rows, places, weights)
    _check_places("unpermute_backward", places)
    drows, dweights = fake_unpermute_backward(dout, rows, places, weights)
    _cpu.unpermute_backward(
        operand(dout),
        operand(rows),
        places.data_ptr(),
        operand(weights),
        operand(drows),
        (0, 0) if rows is None else operand(dweights),
        places.shape[0],
        drows.shape[1],
        places.shape[1],
        torch.get_num_threads(),
    )
    return drows, dweights


def fake_unpermute_backward(
    dout: Tensor, rows: Tensor | None, places: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `unpermute_backward` returns, unwritten."""
    drows = dout.new_empty(places.shape[0] * places.shape[1], dout.shape[-1])
    return drows, dout.new_empty(0) if rows is None or weights is None else torch.empty_like(weights)


def _check_choices(op: str, places: Tensor, weights: Tensor | None, num_rows: int, device: torch.device) -> None:
    if places.ndim != 2 or places.numel() != num_rows:
        raise LayoutError(
            f"{op}: places has shape {tuple(places.shape)}; expected [tokens, k] with a place for each of the "
            f"{num_rows} rows."
        )
    check(op, "places", places, dtypes=(torch.int64,), device=device)
    if weights is not None:
        check(op, "weights", weights, shape=places.shape, device=device)


def _check_places(op: str, places: Tensor) -> None:
    if not _cpu.is_permutation(places.data_ptr(), places.numel()):
        raise LayoutError(
            f"{op}: places do not name each of the {places.numel()} rows once; expected them as `permute` returns them."
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, drows: Tensor, _dcounts: None, _dplaces: None) -> tuple[Tensor | None, ...]:
    (places,) = ctx.saved_tensors
    return torch.ops.zcore.unpermute(drows.contiguous(), places), None, None


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, places, weights = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, places, weights)


def _backward_unpermute(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, places, weights = ctx.saved_tensors
    drows, dweights = torch.ops.zcore.unpermute_backward(dout.contiguous(), rows, places, weights)
    return drows, None, None if rows is None else dweights


register_backward(
    "unpermute_backward",
    "(Tensor dout, Tensor? rows, Tensor places, Tensor? weights) -> (Tensor, Tensor)",
    cpu=unpermute_backward,
    fake=fake_unpermute_backward,
    triton="unpermute",
)
register_differentiable(
    "permute",
    "(Tensor x, Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    cpu=permute,
    fake=fake,
    setup_context=_setup,
    backward=_backward,
    triton="permute",
)
register_differentiable(
    "unpermute",
    "(Tensor rows, Tensor places, Tensor? weights=None) -> Tensor",
    reference=reference_unpermute,
    cpu=unpermute,
    fake=fake_unpermute,
    setup_context=_setup_unpermute,
    backward=_backward_unpermute,
    triton="unpermute",
)
