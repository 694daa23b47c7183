"""Grouped products by CUTLASS; operands as in ops/grouped_matmul.py, kernels in native/cutlass.

They take bf16 and fp16 whose `in` and `out` are multiples of 8, at addresses that are multiples of 16: TMA and the
widest loads move 16 bytes. A launch describes the groups on the device, in a workspace, so that nothing waits for the
counts. Rows that no count covers become NaN, and no memory beyond the operands is touched whatever the counts are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zcore.kernels.cuda import loading
from zcore.kernels.ops.grouped_matmul import check_operands, check_operands_backward, fake, fake_backward
from zcore.kernels.ops.pieces import TYPES

__all__ = [
    "addresses",
    "grouped_matmul",
    "grouped_matmul_backward",
    "launch",
    "why_not_aligned",
    "why_not_grouped_matmul",
    "why_not_grouped_matmul_backward",
    "why_unavailable",
]

MULTIPLE = 8  # elements of 16 bits in what is moved at a time
ALIGNMENT = 16  # the same in bytes
NOT_BUILT = (
    "this wheel was built without CUTLASS; where nvcc is on PATH: "
    "pip install --no-binary zcore-kernels -Ccmake.define.ZCORE_CUDA=ON zcore-kernels"
)


def why_unavailable() -> str | None:
    """Why no grouped product of CUTLASS can run here, or None if one can."""
    reason = loading.why_unavailable()
    if reason is None and not hasattr(loading.extension(), "grouped_matmul"):
        return NOT_BUILT
    return reason


def why_not_aligned(*operands: Tensor, sides: dict[str, int], multiples: dict[str, int]) -> str | None:
    """Which of `sides` is no multiple of what it has to be, or which operand begins at an odd address; None if none.

    >>> why_not_aligned(sides={"in": 16, "out": 12}, multiples={"in": 8, "out": 8})
    'out is 12; expected a multiple of 8, since 16 bytes are moved at a time. Pad it with zeros.'
    """
    for name, side in sides.items():
        if side % multiples[name]:
            return (
                f"{name} is {side}; expected a multiple of {multiples[name]}, since {ALIGNMENT} bytes are moved at a "
                "time. Pad it with zeros."
            )
    for each in operands:
        if each.data_ptr() % ALIGNMENT:
            return (
                f"an operand, of shape {tuple(each.shape)}, begins at an address that is no multiple of {ALIGNMENT}. "
                "Pass a clone of it."
            )
    return None


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> Tensor:
    """Each group of rows times its weight, of operands that `why_not_grouped_matmul` has nothing against."""
    out = fake(rows, weights, counts, is_transposed)
    lengths = rows.shape[0], counts.shape[0], rows.shape[1], out.shape[1]
    given = addresses(rows, weights, counts, out)
    launch(
        counts,
        lambda workspace, stream: loading.extension().grouped_matmul(
            given, TYPES[rows.dtype], lengths, is_transposed, workspace, stream
        ),
    )
    return out


def why_not_grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool = False) -> str | None:
    """Why it is not served, or None if it is. Raises LayoutError and ConfigError for what nobody serves."""
    check_operands(rows, weights, counts, is_transposed, device=rows.device)
    num_out = weights.shape[1 if is_transposed else 2]
    return _why_not(rows, weights, num_in=rows.shape[1], num_out=num_out)


def grouped_matmul_backward(rows: Tensor, dout: Tensor, counts: Tensor, is_transposed: bool) -> Tensor:
    """The gradient of the weights, exact zeros for an expert without rows; of operands as for `grouped_matmul`."""
    dweights = fake_backward(rows, dout, counts, is_transposed)
    lengths = rows.shape[0], counts.shape[0], rows.shape[1], dout.shape[1]
    given = addresses(rows, dout, counts, dweights)
    launch(
        counts,
        lambda workspace, stream: loading.extension().grouped_matmul_backward(
            given, TYPES[rows.dtype], lengths, is_transposed, workspace, stream
        ),
    )
    return dweights


def why_not_grouped_matmul_backward(rows: Tensor, dout: Tensor, counts: Tensor, is_transposed: bool) -> str | None:
    """The same of the gradient of the weights."""
    check_operands_backward(rows, dout, counts, device=rows.device)
    return _why_not(rows, dout, num_in=rows.shape[1], num_out=dout.shape[1])


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Of each; whoever holds these holds the tensors."""
    return tuple(each.data_ptr() for each in tensors)


def launch(counts: Tensor, call: Callable[[tuple[int, int], int], None]) -> None:
    """Call with the address and bytes of a workspace for these groups, and the stream that is current."""
    with loading.launching(counts.device) as stream:
        size = loading.extension().grouped_matmul_workspace_bytes(counts.shape[0])
        workspace = torch.empty(size, dtype=torch.uint8, device=counts.device)  # what is freed waits for this stream
        call((workspace.data_ptr(), size), stream)


def _why_not(rows: Tensor, other: Tensor, *, num_in: int, num_out: int) -> str | None:
    reason = why_unavailable()
    if reason is not None:
        return f"no kernel of CUTLASS can run: {reason}."
    if rows.dtype is torch.float32:
        return "rows is torch.float32; expected torch.bfloat16 or torch.float16."
    return why_not_aligned(
        rows, other, sides={"in": num_in, "out": num_out}, multiples={"in": MULTIPLE, "out": MULTIPLE}
    )
