"""The kernels of native/cuda, as bindings/ has them; in the wheel only where it was built with a CUDA compiler.

Addresses are those of tensors on the current device; whoever calls has checked them. A kernel is queued on `stream`,
the number of a CUDA stream, and has not run when the call returns. A launch that is refused raises RuntimeError, which
names the op and what CUDA says. Tables are read by `_cpu`. What a step takes from the device comes by address; 0: none.

Of quantised blocks addresses are those of codes, scales and zero points, the last 0 where blocks are symmetric.
"""

from collections.abc import Sequence

from zcore.kernels._cpu import Table

LARGEST_NUM_SHARDS: int

def architectures() -> str:
    """What the kernels were compiled for: "sm_80 sm_90 sm_100 compute_100", the last as PTX, for later devices."""

def why_unusable() -> str | None:
    """Why no kernel can be launched on the current device, in CUDA's words; makes its context."""

def adamw_step(
    table: Table,
    stream: int,
    *,
    clip_factor: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float,
    is_decoupled: bool,
) -> None: ...
def lamb_average(
    table: Table,
    stream: int,
    *,
    clip_factor: int,
    scratch: int,
    result: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float,
) -> None:
    """result: of fp64, two for each piece; scratch: of fp64, twice `num_partial_sums`."""

def lamb_apply(
    table: Table,
    stream: int,
    *,
    ratios: int,
    lr: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
) -> None: ...
def lion_step(
    table: Table,
    stream: int,
    *,
    clip_factor: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def adagrad_step(
    table: Table,
    stream: int,
    *,
    clip_factor: int,
    lr: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def sgd_step(
    table: Table,
    stream: int,
    *,
    clip_factor: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool,
    is_first: bool,
    grad_factor: float,
) -> None: ...
def num_partial_sums(table: Table) -> int:
    """How many sums the kernels make of all pieces, one for each chunk, before they add these."""

def squared_norm(table: Table, stream: int, *, scratch: int, result: int) -> None:
    """Of one tensor. result: of fp32, one; scratch: of fp64, `num_partial_sums`."""

def quantize_blockwise(
    values: int,
    type: int,
    out: Sequence[int],
    stream: int,
    *,
    numel: int,
    block_size: int,
    format: int,
    is_stochastic: bool,
    seed: int,
    offset: int,
) -> None: ...
def dequantize_blockwise(
    quantized: Sequence[int],
    out: int,
    type: int,
    stream: int,
    *,
    numel: int,
    block_size: int,
    format: int,
) -> None: ...
def dequantize_reduce_requantize(
    shards: Sequence[int],
    out: Sequence[int],
    stream: int,
    *,
    factor: float,
    numel: int,
    block_size: int,
    format: int,
    is_stochastic: bool,
    seed: int,
    offset: int,
) -> None: ...
def pack_signs(
    values: int, type: int, error: int, signs: int, scales: int, stream: int, *, numel: int, block_size: int
) -> None: ...
def unpack_signs(signs: int, scales: int, out: int, type: int, stream: int, *, numel: int, block_size: int) -> None: ...
def round_stochastic(values: int, out: int, stream: int, *, numel: int, seed: int, offset: int) -> None: ...
def round_with_noise(values: int, noise: int, out: int, stream: int, *, numel: int) -> None: ...

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
