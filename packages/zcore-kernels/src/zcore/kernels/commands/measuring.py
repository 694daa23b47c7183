"""How fast each op is, beside torch and others, and beside what moving its bytes takes: all take turns in one run.

The limit on the CPU is the machine's own stream of that shape (native/include/zcore/stream.hpp): it reads what the op
reads and writes what it writes, in as many arrays, and computes nothing. What an op returns is new memory in every
call, as torch's is, and costs page faults that the stream does not have. On a GPU the limit is a copy of as many bytes,
half of them read and half written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from zcore.core import ops
from zcore.core.errors import ConfigError, NotInstalledError
from zcore.core.tables import Table, shown_rate, shown_seconds
from zcore.core.timing import Spread, time_in_turns
from zcore.kernels import _cpu
from zcore.kernels.commands.cases import CASES, Call, Operands, tensors_in
from zcore.kernels.commands.liger import check_liger, run_of_liger

__all__ = ["AGAINST", "Row", "check_peers", "measure_op", "table_of"]

AGAINST = ("torch", "compile", "deepspeed", "liger")
LIMIT = "memory"  # the stream, or the copy
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender for an op; times are of one call, ratios of the same round."""

    op: str
    dtype: str
    numel: int
    contender: str
    time_s: Spread
    bytes_per_s: float  # read and written
    of_limit: Spread  # the limit's time over this one's
    speedup: Spread | None  # this one's time over that of what serves: above 1 where it is slower than that


def check_peers(asked: str, *, device: torch.device) -> list[str]:
    """The peers named, separated by commas. Raises ConfigError or NotInstalledError for one that does not run here."""
    peers = [each for each in asked.split(",") if each]
    for peer in peers:
        if peer not in AGAINST:
            raise ConfigError(f"--against {peer}: expected some of {', '.join(AGAINST)}.")
    if "deepspeed" in peers and find_spec("deepspeed") is None:
        raise NotInstalledError("--against deepspeed needs it: pip install 'zcore-kernels[peers]'")
    if "liger" in peers:
        check_liger(device)
    return peers


def measure_op(
    op: str,
    *,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[str],
    rounds: int,
    slice_s: float,
) -> list[Row]:
    """Every implementation that serves, then the peers, then the limit. Empty where only the reference serves."""
    call = CASES[op](Operands(numel, dtype=dtype, device=device))
    served = [each for each in ops.registered()[op] if each.refusal(device.type, call.tensors[0].dtype) is None]
    compiled = [each for each in served if each.source != "reference"]
    if not compiled:
        return []
    runs: dict[str, Run] = {f"zcore {each.source}": _by(each, call.copied()) for each in compiled}
    own = f"zcore {compiled[0].source}"
    reference = next(each for each in served if each.source == "reference")
    runs |= _peers(op, call, reference, peers)
    read, written = _traffic(compiled[0], call)
    moved = sum(each.numel() * each.element_size() for each in (*read, *written))
    runs[LIMIT] = _stream(read, written) if device.type == "cpu" else _copy(moved, device)
    times_s = time_in_turns(runs, group=None, device=device, rounds=rounds, slice_s=slice_s)
    rows = []
    for name, taken in times_s.items():
        rows.append(
            Row(
                op,
                str(dtype).removeprefix("torch."),
                numel,
                name,
                Spread.of(taken),
                moved / Spread.of(taken).median,
                Spread.of([a / b for a, b in zip(times_s[LIMIT], taken, strict=True)]),
                Spread.of([a / b for a, b in zip(taken, times_s[own], strict=True)]),
            )
        )
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """For people."""
    cells: list[tuple[str, ...]] = []
    last = None
    for row in rows:
        key = row.op, row.dtype, row.numel
        names = (row.op, row.dtype) if key != last else ("", "")
        last = key
        spread = (row.time_s.high - row.time_s.low) / row.time_s.median
        times = "" if row.speedup is None or row.contender == LIMIT else f"{row.speedup.median:.2f}"
        cells.append(
            (
                *(*names, row.contender, shown_seconds(row.time_s.median), f"{spread:.0%}"),
                *(shown_rate(row.bytes_per_s), f"{row.of_limit.median:.2f}", times),
            )
        )
    notes = (
        "of memory: the time that moving the same bytes takes, over this one's",
        "times ours: its time over that of what zcore serves, in the same round",
    )
    columns = ("op", "dtype", "who", "time", "spread", "bytes/s", "of memory", "times ours")
    return Table("", columns, tuple(cells), words=("op", "dtype", "who"), notes=notes)


def _by(implementation: ops.Implementation, call: Call) -> Run:
    """With its source forced: several may share torch's way to the op, which takes the best by itself."""

    def run() -> object:
        with ops.force(implementation.source):
            return implementation.function(*call.args, **call.kwargs)

    return run


def _peers(op: str, call: Call, reference: ops.Implementation, peers: Sequence[str]) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    torchs = TORCH.get(op)
    if "torch" in peers:
        made = None if torchs is None else torchs(call.copied())
        runs["torch" if made is not None else "torch (reference)"] = made or _by(reference, call.copied())
    if "compile" in peers and op not in TORCH_STEPS:  # its code for a list of tensors is that of the fused steps
        compiled, given = torch.compile(reference.function, dynamic=False), call.copied()
        runs["torch.compile"] = lambda: compiled(*given.args, **given.kwargs)
    if "deepspeed" in peers and op == "adamw_step" and len(call.args[4]) == 0 and call.tensors[0].is_cpu:
        runs["deepspeed"] = _deepspeed_adam(call.copied())
    by_liger = run_of_liger(op, call.copied()) if "liger" in peers else None
    if by_liger is not None:
        runs["liger"] = by_liger
    return runs


def _traffic(implementation: ops.Implementation, call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of what a call reads, and what it writes: operands that it changes, and its results."""
    tried = call.copied()
    results = list(tensors_in(_by(implementation, tried)()))
    changed = [now for now, before in zip(tried.tensors, call.tensors, strict=True) if not torch.equal(now, before)]
    return tried.tensors, [*changed, *results]


def _stream(read: Sequence[Tensor], written: Sequence[Tensor]) -> Run:
    from_, to = (
        [(each.data_ptr(), each.numel() * each.element_size() // 4) for each in part] for part in (read, written)
    )

    def run(_alive: object = (read, written)) -> None:
        _cpu.stream(from_, to, torch.get_num_threads())

    return run


def _copy(moved_bytes: int, device: torch.device) -> Run:
    source, target = (torch.zeros(moved_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _torch_adamw(call: Call) -> Run | None:
    params, grads, exp_avgs, exp_avg_sqs, copies = call.args
    steps = [torch.ones((), device=param.device) for param in params]
    settings = call.kwargs

    def run() -> None:
        given = grads
        if copies or settings["grad_factor"] != 1.0:  # what a loop does around the fused step
            given = [grad.float() for grad in grads]
            torch._foreach_mul_(given, settings["grad_factor"])
        torch._fused_adamw_(
            params,
            given,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            amsgrad=False,
            lr=settings["lr"],
            beta1=settings["beta1"],
            beta2=settings["beta2"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )
        for copy, param in zip(copies, params, strict=False):
            copy.copy_(param)

    return run


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Run:
    return lambda: functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _torch_sgd(call: Call) -> Run | None:
    params, grads, buffers, copies = call.args
    if copies:
        return None
    settings = {key: call.kwargs[key] for key in ("lr", "momentum", "dampening", "weight_decay")}
    return lambda: torch._fused_sgd_(
        params, grads, buffers, **settings, nesterov=False, maximize=False, is_first_step=False
    )


def _torch_adagrad(call: Call) -> Run | None:
    params, grads, sums, copies = call.args
    if copies or params[0].device.type != "cpu":  # torch's fused one is for the CPU only
        return None
    settings = {key: call.kwargs[key] for key in ("lr", "weight_decay", "eps")}
    steps = [torch.ones(()) for _ in params]
    return lambda: torch._fused_adagrad_(params, grads, sums, steps, **settings, lr_decay=0.0, maximize=False)


def _deepspeed_adam(call: Call) -> Run:
    kind = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam  # it has no types
    params = [torch.nn.Parameter(each) for each in call.args[0]]
    for param, grad in zip(params, call.args[1], strict=True):
        param.grad = grad
    settings = call.kwargs
    optimizer = kind(
        params, lr=settings["lr"], weight_decay=settings["weight_decay"], eps=settings["eps"], adamw_mode=True
    )
    run: Run = optimizer.step
    return run


TORCH_STEPS: dict[str, Callable[[Call], Run | None]] = {
    "adagrad_step": _torch_adagrad,
    "adamw_step": _torch_adamw,
    "sgd_step": _torch_sgd,
}
TORCH: dict[str, Callable[[Call], Run | None]] = TORCH_STEPS | {
    "bias_gelu": lambda call: lambda: functional.gelu(call.args[0] + call.args[1]),
    "geglu": lambda call: lambda: functional.gelu(call.args[0]) * call.args[1],
    "layer_norm": lambda call: _torch_layer_norm(*call.args, **call.kwargs),
    "rms_norm": lambda call: (
        lambda: functional.rms_norm(call.args[0], call.args[0].shape[-1:], call.args[1], call.kwargs["eps"])
    ),
    "squared_norm": lambda call: lambda: torch.linalg.vector_norm(call.args[0], dtype=torch.float32).square(),
    "swiglu": lambda call: lambda: functional.silu(call.args[0]) * call.args[1],
}
