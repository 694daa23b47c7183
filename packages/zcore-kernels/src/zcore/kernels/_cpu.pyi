Operand = tuple[int, int]  # address and zcore::Type
Part = tuple[int, int, int, int]  # of an operand its columns: address, zcore::Type, stride of rows, first column

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
