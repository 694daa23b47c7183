"""A matrix product for each group of rows, as experts have them: rows sorted by expert, a weight for each expert.

grouped_matmul(rows, weights, counts, is_transposed) -> out

    rows      [total, in]                  counts[0] rows of expert 0, then counts[1] of expert 1
    weights   [num_experts, in, out]       [num_experts, out, in] where transposed, as nn.Linear has its weight
    counts    [num_experts] int64          their sum is `total`
    out       [total, out]                 rows of expert e times weights[e]

The gradient of rows is the same product with the weights the other way round; that of an expert without rows is zero.
On the CPU torch's own product writes each group into its part of one output, and experts without rows cost nothing.
Where threads change the bits of a product of oneDNN or MKL, they change those of this one.

On CUDA CUTLASS serves bf16 and fp16 whose `in` and `out` are multiples of 8 and which begin at multiples of 16 bytes.
Triton serves all else, and all where no kernel of CUTLASS was built; with ZCORE_OPS=cuda that is refused instead, with
the reason. Both sum in fp32 and leave counts on the device, where nobody looks whether their sum is `total`: they keep
within memory whatever it is, and rows that no count covers become NaN.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import LayoutError
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import CPU, check

__all__ = ["check_operands", "check_operands_backward", "fake", "fake_backward", "grouped_matmul", "reference"]


def reference(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> Tensor:
    """Each group of rows times its weight."""
    weights = weights.mT if is_transposed else weights
    if not len(weights):
        return fake(rows, weights, counts)
    groups = rows.split(counts.tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])


def check_operands(
    rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool, *, device: torch.device = CPU
) -> None:
    """Raise LayoutError or ConfigError unless `grouped_matmul` takes these on `device`, counts of any values."""
    op = "grouped_matmul"
    if rows.ndim != 2 or weights.ndim != 3 or weights.shape[2 if is_transposed else 1] != rows.shape[1]:
        expected = "[num_experts, out, in]" if is_transposed else "[num_experts, in, out]"
        raise LayoutError(
            f"{op}: rows has shape {tuple(rows.shape)}, weights {tuple(weights.shape)}; expected [total, in] and "
            f"{expected}."
        )
    check(op, "rows", rows, device=device)
    check(op, "weights", weights, shape=weights.shape, dtypes=(rows.dtype,), device=device)
    check(op, "counts", counts, shape=weights.shape[:1], dtypes=(torch.int64,), device=device)


def check_operands_backward(rows: Tensor, dout: Tensor, counts: Tensor, *, device: torch.device = CPU) -> None:
    """The same for the gradient of the weights."""
    op = "grouped_matmul_backward"
    if rows.ndim != 2 or dout.ndim != 2 or counts.ndim != 1:
        raise LayoutError(
            f"{op}: rows, dout and counts have shapes {tuple(rows.shape)}, {tuple(dout.shape)}, "
            f"{tuple(counts.shape)}; expected [total, in], [total, out] and [num_experts]."
        )
    check(op, "rows", rows, device=device)
    check(op, "dout", dout, shape=(rows.shape[0], dout.shape[1]), dtypes=(rows.dtype,), device=device)
    check(op, "counts", counts, dtypes=(torch.int64,), device=device)


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> Tensor:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    check_operands(rows, weights, counts, is_transposed)
    out = fake(rows, weights, counts, is_transposed)
    for expert, begin, end in _groups("grouped_matmul", counts, rows.shape[0]):
        weight = weights[expert]
        torch.mm(rows[begin:end], weight.T if is_transposed else weight, out=out[begin:end])
    return out


def fake(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> Tensor:
    """What `grouped_matmul` returns, unwritten."""
    return rows.new_empty(rows.shape[0], weights.shape[1 if is_transposed else 2])


def grouped_matmul_backward(rows: Tensor, dout: Tensor, counts: Tensor, is_transposed: bool) -> Tensor:
    """The gradient of the weights."""
    check_operands_backward(rows, dout, counts)
    dweights = fake_backward(rows, dout, counts, is_transposed)
    first, second = (dout, rows) if is_transposed else (rows, dout)
    used = set()
    for expert, begin, end in _groups("grouped_matmul_backward", counts, rows.shape[0]):
        torch.mm(first[begin:end].T, second[begin:end], out=dweights[expert])
        used.add(expert)
    for expert in range(dweights.shape[0]):
        if expert not in used:
            dweights[expert].zero_()
    return dweights


def fake_backward(rows: Tensor, dout: Tensor, counts: Tensor, is_transposed: bool) -> Tensor:
    """What `grouped_matmul_backward` returns, unwritten."""
    sides = (dout.shape[1], rows.shape[1]) if is_transposed else (rows.shape[1], dout.shape[1])
    return rows.new_empty(counts.shape[0], *sides)


def _groups(op: str, counts: Tensor, total: int) -> Iterator[tuple[int, int, int]]:
    """Of each expert that has rows itself, its first row and the one after its last."""
    numbers = counts.tolist()
    if sum(numbers) != total or min(numbers, default=0) < 0:
        raise LayoutError(
            f"{op}: counts are {numbers}, {sum(numbers)} together; expected none below 0, and {total} together, one "
            "for each row."
        )
    end = 0
    for expert, count in enumerate(numbers):
        begin, end = end, end + count
        if count:
            yield expert, begin, end


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, counts, ctx.is_transposed = inputs
    needs_rows, needs_weights = ctx.needs_input_grad[:2]
    ctx.save_for_backward(rows if needs_weights else None, weights if needs_rows else None, counts)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, counts = ctx.saved_tensors
    dout, drows, dweights = dout.contiguous(), None, None
    if weights is not None:
        drows = torch.ops.zcore.grouped_matmul(dout, weights, counts, not ctx.is_transposed)
    if rows is not None:
        dweights = torch.ops.zcore.grouped_matmul_backward(rows, dout, counts, ctx.is_transposed)
    return drows, dweights, None, None


register_backward(
    "grouped_matmul_backward",
    "(Tensor rows, Tensor dout, Tensor counts, bool is_transposed) -> Tensor",
    cpu=grouped_matmul_backward,
    fake=fake_backward,
    triton="grouped_matmul",
    cuda="grouped_matmul",
)
register_differentiable(
    "grouped_matmul",
    "(Tensor rows, Tensor weights, Tensor counts, bool is_transposed=False) -> Tensor",
    reference=reference,
    cpu=grouped_matmul,
    fake=fake,
    setup_context=_setup,
    backward=_backward,
    source="torch",
    triton="grouped_matmul",
    cuda="grouped_matmul",
)
