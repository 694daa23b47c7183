"""The numeric functions of native/ on the CPU, as bindings/ has them.

Addresses are those of flat tensors on the CPU; whoever calls has checked them, or has a table read, which checks. Of
quantised blocks they are those of codes, scales and zero points, the last 0 where blocks are symmetric.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_BLOCK_SIZE: int
Operand = tuple[int, int]  # address and zcore::Type
Part = tuple[int, int, int, int]  # of an operand its columns: address, zcore::Type, stride of rows, first column

class Table:
    """Addresses of pieces, a row for each; whoever holds it holds their tensors."""

    def __len__(self) -> int: ...

class Layout:
    """The columns of an op: of each what a torch.dtype is as zcore::Type, is_optional, and whose scales (-1: none)."""

    def __init__(self, columns: Sequence[tuple[Sequence[tuple[torch.dtype, int]], bool, int]]) -> None: ...
    def read(self, operands: Sequence[Sequence[Tensor]], cuda_index: int | None = None) -> Table | None:
        """One list of tensors for each column; None unless all are as the columns want them.

        cuda_index: of the device that all lie on; None: the CPU.
        """

def instruction_set() -> str: ...
def stream(read: Sequence[tuple[int, int]], written: Sequence[tuple[int, int]], threads: int) -> None:
    """See native/include/zcore/stream.hpp; arrays by address and words of 4 bytes."""

def adamw_step(
    table: Table,
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
    table: Table,
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
    table: Table,
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
    table: Table,
    threads: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def adagrad_step(
    table: Table,
    threads: int,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def sgd_step(
    table: Table,
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
def squared_norm(table: Table, threads: int) -> float: ...
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
def rms_norm(
    x: Operand,
    residual: Operand,
    weight: Operand,
    sum: Operand,
    y: Operand,
    rows: int,
    hidden: int,
    eps: float,
    offset: float,
    threads: int,
) -> None: ...
def rms_norm_backward(
    dy: Operand,
    s: Operand,
    weight: Operand,
    dsum: Operand,
    ds: Operand,
    dweight: Operand,
    rows: int,
    hidden: int,
    eps: float,
    offset: float,
    threads: int,
) -> None: ...
def layer_norm(
    x: Operand,
    residual: Operand,
    weight: Operand,
    bias: Operand,
    sum: Operand,
    y: Operand,
    rows: int,
    hidden: int,
    eps: float,
    threads: int,
) -> None: ...
def layer_norm_backward(
    dy: Operand,
    s: Operand,
    weight: Operand,
    dsum: Operand,
    ds: Operand,
    dweight: Operand,
    dbias: Operand,
    rows: int,
    hidden: int,
    eps: float,
    threads: int,
) -> None: ...
def glu(gate: Part, up: Part, out: Part, rows: int, hidden: int, form: int, threads: int) -> None: ...
def glu_backward(
    dout: Part, gate: Part, up: Part, dgate: Part, dup: Part, rows: int, hidden: int, form: int, threads: int
) -> None: ...
def bias_gelu(x: Operand, bias: Operand, out: Operand, rows: int, hidden: int, form: int, threads: int) -> None: ...
def bias_gelu_backward(
    dout: Operand,
    x: Operand,
    bias: Operand,
    dx: Operand,
    dbias: Operand,
    rows: int,
    hidden: int,
    form: int,
    threads: int,
) -> None: ...
def topk_gate(
    logits: Operand,
    bias: Operand,
    weights: int,
    experts: int,
    tokens: int,
    num_experts: int,
    k: int,
    scoring: int,
    is_normalised: bool,
    threads: int,
) -> None: ...
def topk_gate_backward(
    dweights: int,
    logits: Operand,
    weights: int,
    experts: int,
    dlogits: Operand,
    tokens: int,
    num_experts: int,
    k: int,
    scoring: int,
    is_normalised: bool,
    threads: int,
) -> None: ...
def permute(
    x: Operand,
    experts: int,
    rows: Operand,
    counts: int,
    places: int,
    tokens: int,
    hidden: int,
    k: int,
    num_experts: int,
    threads: int,
) -> None: ...
def is_permutation(places: int, count: int) -> bool: ...
def unpermute(
    rows: Operand, places: int, weights: Operand, out: Operand, tokens: int, hidden: int, k: int, threads: int
) -> None: ...
def unpermute_backward(
    dout: Operand,
    rows: Operand,
    places: int,
    weights: Operand,
    drows: Operand,
    dweights: Operand,
    tokens: int,
    hidden: int,
    k: int,
    threads: int,
) -> None: ...
def rotary(
    x: Operand,
    y: Operand,
    cos: Operand,
    sin: Operand,
    position: int,
    tokens: int,
    heads: int,
    dim: int,
    width: int,
    is_interleaved: bool,
    is_backward: bool,
    threads: int,
) -> None: ...
def bias_dropout_residual(
    x: Operand,
    bias: Operand,
    residual: Operand,
    out: Operand,
    rows: int,
    hidden: int,
    drop: float,
    seed: int,
    threads: int,
) -> None: ...
def bias_dropout_residual_backward(
    dout: Operand, dx: Operand, dbias: Operand, rows: int, hidden: int, drop: float, seed: int, threads: int
) -> None: ...
