"""The numeric functions of native/ on the CPU: bindings/cpu.cpp.

words and types: see `zcore.kernels.ops.pieces`. Other addresses are those of flat tensors on the CPU; whoever calls has
checked them. Of quantised blocks they are those of codes, scales and zero points, the last 0 where blocks are symmetric.
"""

from collections.abc import Sequence

LARGEST_BLOCK_SIZE: int

def instruction_set() -> str: ...
def adamw_step(
    words: Sequence[int],
    types: Sequence[int],
    threads: int,
    *,
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
    words: Sequence[int],
    types: Sequence[int],
    threads: int,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float,
) -> list[tuple[float, float]]: ...
def lamb_apply(
    words: Sequence[int],
    types: Sequence[int],
    threads: int,
    *,
    ratios: Sequence[float],
    lr: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
) -> None: ...
def lion_step(
    words: Sequence[int],
    types: Sequence[int],
    threads: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def adagrad_step(
    words: Sequence[int],
    types: Sequence[int],
    threads: int,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def sgd_step(
    words: Sequence[int],
    types: Sequence[int],
    threads: int,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    is_nesterov: bool,
    is_first: bool,
    grad_factor: float,
) -> None: ...
def squared_norm(words: Sequence[int], types: Sequence[int], threads: int) -> float: ...
def quantize_blockwise(
    values: int,
    type: int,
    out: Sequence[int],
    threads: int,
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
    threads: int,
    *,
    numel: int,
    block_size: int,
    format: int,
) -> None: ...
def dequantize_reduce_requantize(
    shards: Sequence[int],
    out: Sequence[int],
    threads: int,
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
    values: int, type: int, error: int, signs: int, scales: int, threads: int, *, numel: int, block_size: int
) -> None: ...
def unpack_signs(
    signs: int, scales: int, out: int, type: int, threads: int, *, numel: int, block_size: int
) -> None: ...
def round_stochastic(values: int, out: int, threads: int, *, numel: int, seed: int, offset: int) -> None: ...
def round_with_noise(values: int, noise: int, out: int, threads: int, *, numel: int) -> None: ...
