"""The kernels of native/cuda, as bindings/ has them; in the wheel only where it was built with a CUDA compiler.

Addresses are those of tensors on the current device; whoever calls has checked them. A kernel is queued on `stream`,
the number of a CUDA stream, and has not run when the call returns. A launch that is refused raises RuntimeError, which
names the op and what CUDA says.
"""

from collections.abc import Sequence

def architectures() -> str:
    """What the kernels were compiled for: "sm_80 sm_90 sm_100 compute_100", the last as PTX, for later devices."""

# From here on only where it was built with CUTLASS. lengths: total, num_groups, num_in, num_out; workspace: address
# and bytes; see native/include/zcore/cuda/grouped_matmul.hpp.
def grouped_matmul_workspace_bytes(num_groups: int) -> int: ...
def grouped_matmul(
    addresses: Sequence[int],
    type: int,
    lengths: Sequence[int],
    is_transposed: bool,
    workspace: tuple[int, int],
    stream: int,
) -> None:
    """Addresses of rows, weights, counts and out; type: zcore::Type of all but counts. ValueError for odd lengths."""

def grouped_matmul_backward(
    addresses: Sequence[int],
    type: int,
    lengths: Sequence[int],
    is_transposed: bool,
    workspace: tuple[int, int],
    stream: int,
) -> None:
    """Addresses of rows, dout, counts and dweights."""

def grouped_matmul_fp8(
    addresses: Sequence[int], lengths: Sequence[int], workspace: tuple[int, int], stream: int
) -> None:
    """Addresses of rows, weights, row_scales, weight_scales, counts and out."""
