"""The kernels of native/cuda, as bindings/ has them; in the wheel only where it was built with a CUDA compiler.

Addresses are those of tensors on the current device; whoever calls has checked them. A kernel is queued on `stream`,
the number of a CUDA stream, and has not run when the call returns. A launch that is refused raises RuntimeError, which
names the op and what CUDA says.

Of quantised blocks addresses are those of codes, scales and zero points, the last 0 where blocks are symmetric.
"""

from collections.abc import Sequence

LARGEST_NUM_SHARDS: int

def architectures() -> str:
    """What the kernels were compiled for: "sm_80 sm_90 sm_100 compute_100", the last as PTX, for later devices."""

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
