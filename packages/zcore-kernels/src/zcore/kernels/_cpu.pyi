"""The numeric functions of native/ on the CPU: bindings/cpu.cpp.

words and types: see `zcore.kernels.ops.pieces`.
"""

def instruction_set() -> str: ...
def adamw_step(
    words: list[int],
    types: list[int],
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
    words: list[int],
    types: list[int],
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
    words: list[int],
    types: list[int],
    threads: int,
    *,
    ratios: list[float],
    lr: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
) -> None: ...
def lion_step(
    words: list[int],
    types: list[int],
    threads: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def adagrad_step(
    words: list[int],
    types: list[int],
    threads: int,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
) -> None: ...
def sgd_step(
    words: list[int],
    types: list[int],
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
def squared_norm(words: list[int], types: list[int], threads: int) -> float: ...
