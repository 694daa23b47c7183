"""AdamW on the CPU as zcore-kernels, torch and DeepSpeed have it, in turns with a stream of the bytes that each moves.

states    a gradient in fp32; states in fp32, bf16 and one byte; torch's fused step and DeepSpeed's
update    all of a mixed-precision update, bf16 gradient in, bf16 copy out: in one pass, and in the calls of others

All step the same parameters, gradients and fp32 states, so that 250 million fit; what they hold does not change the
time. The first of each is what the others are compared with.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.timing import Spread, time_in_turns
from zcore.kernels import _cpu
from zcore.kernels.ops.dynamic_code import num_blocks

__all__ = ["measure_steps"]

ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
GRAD_FACTOR, CLIP_FACTOR = 1 / 1024, 0.5  # of the loss scale, and of the norm
SCALE_BYTES = 4 / 256  # an element's share of its block's scale
DRAWN = 1 << 20  # repeated: to draw 250 million takes long

Run = Callable[[], object]


class Traffic(NamedTuple):
    """Bytes an element that a step moves in each array."""

    in_place: tuple[float, ...]  # read and written
    read: tuple[float, ...]
    written: tuple[float, ...] = ()

    @property
    def bytes(self) -> float:
        """In all."""
        return 2 * sum(self.in_place) + sum(self.read) + sum(self.written)


FP32 = Traffic((4, 4, 4), (4,))
BF16 = Traffic((4, 2, 2), (4,))
BYTE = Traffic((4, 1 + SCALE_BYTES, 1 + SCALE_BYTES), (4,))
UPDATE = Traffic((4, 4, 4), (2,), (2,))


class Contender(NamedTuple):
    """One step, and what no other way to it could do without moving."""

    run: Run
    traffic: Traffic


class Shared:
    """What all step, each in `pieces` parts of flat memory."""

    def __init__(self, numel: int, pieces: int) -> None:
        drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))

        def filled(values: Tensor) -> list[Tensor]:
            return list(values.repeat(-(-numel // DRAWN))[:numel].clone().tensor_split(pieces))

        self.params, self.grads, self.averages = filled(drawn), filled(drawn), filled(drawn)
        self.squares = filled(drawn.square())
        self.low_grads, self.copies = filled(drawn.bfloat16()), filled(drawn.bfloat16())
        codes = torch.arange(DRAWN).to(torch.uint8)  # any is a state
        self.codes = filled(codes), filled(codes)
        self.scales = [[torch.ones(num_blocks(each.numel())) for each in codes] for codes in self.codes]


def measure_steps(numel: int, pieces: int, threads: int, *, rounds: int, slice_s: float) -> dict[str, Any]:
    """A row of the report. For a process of its own that OMP_NUM_THREADS tells `threads`, too: DeepSpeed reads that."""
    torch.set_num_threads(threads)
    shared = Shared(numel, pieces)
    arrays = [torch.zeros(numel) for _ in range(len(UPDATE.in_place) + len(UPDATE.read) + len(UPDATE.written))]
    row: dict[str, Any] = {"numel": numel, "pieces": pieces, "threads": threads}
    for name, contenders in (("states", _states(shared)), ("update", _updates(shared))):
        streams = {each.traffic: _stream(arrays, each.traffic, threads) for each in contenders.values()}
        times_s = time_in_turns(
            {who: each.run for who, each in contenders.items()} | {str(each): run for each, run in streams.items()},
            group=None,
            device=torch.device("cpu"),
            rounds=rounds,
            slice_s=slice_s,
        )
        row[name] = _compared(contenders, times_s)
    return row


def _compared(contenders: dict[str, Contender], times_s: dict[str, list[float]]) -> dict[str, Any]:
    def memory_of(name: str) -> list[float]:
        return times_s[str(contenders[name].traffic)]

    first = next(iter(contenders))
    figures: dict[str, Any] = {}
    for name, (_, traffic) in contenders.items():
        gained = zip(times_s[first], times_s[name], memory_of(first), memory_of(name), strict=True)
        figures[name] = {
            "bytes_an_element": traffic.bytes,
            "time_s": asdict(Spread.of(times_s[name])),
            "of_memory": _ratio(memory_of(name), times_s[name]),
            "times_first": _ratio(times_s[name], times_s[first]),
            "of_allowed_gain": asdict(Spread.of([own / other / (all_ / less) for own, other, all_, less in gained])),
        }
    return figures


def _ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    return asdict(Spread.of([a / b for a, b in zip(above, below, strict=True)]))


def _stream(arrays: Sequence[Tensor], traffic: Traffic, threads: int) -> Run:
    numel, left = arrays[0].numel(), iter(arrays)

    def words(shares: tuple[float, ...]) -> list[tuple[int, int]]:
        return [(next(left).data_ptr(), int(numel * share / 4)) for share in shares]

    in_place, read, written = (words(each) for each in traffic)
    return lambda: _cpu.stream([*in_place, *read], [*in_place, *written], threads)


def _states(shared: Shared) -> dict[str, Contender]:
    averages, squares = shared.averages, shared.squares
    low = ([each.bfloat16() for each in states] for states in (averages, squares))
    scales = dict(zip(("exp_avg_scales", "exp_avg_sq_scales"), shared.scales, strict=True))
    contenders = {
        "zcore": Contender(_by_zcore(shared.params, shared.grads, averages, squares), FP32),
        "zcore, bf16 states": Contender(_by_zcore(shared.params, shared.grads, *low), BF16),
        "zcore, 8-bit states": Contender(_by_zcore(shared.params, shared.grads, *shared.codes, **scales), BYTE),
        "torch fused": Contender(_by_torch(shared, shared.grads), FP32),
    }
    if find_spec("deepspeed") is not None:
        contenders["DeepSpeedCPUAdam"] = Contender(_by_deepspeed(shared, shared.grads), FP32)
    return contenders


def _updates(shared: Shared) -> dict[str, Contender]:
    """Unscale, clip, step, copy out; each of the others' gradients in fp32 is memory that stays."""
    clip_factor = torch.tensor([CLIP_FACTOR])
    scale, found = torch.tensor(1 / (GRAD_FACTOR * CLIP_FACTOR)), torch.zeros(())
    grads = [torch.empty_like(each) for each in shared.params]
    folded = _by_torch(shared, grads, grad_scale=scale, found_inf=found)
    step = _by_torch(shared, grads)

    def in_calls(step: Run, *, is_scaled: bool) -> Run:
        def run() -> None:
            torch._foreach_copy_(grads, shared.low_grads)
            if is_scaled:
                torch._foreach_mul_(grads, GRAD_FACTOR * CLIP_FACTOR)
            step()
            torch._foreach_copy_(shared.copies, shared.params)

        return run

    one_pass = _by_zcore(
        *(shared.params, shared.low_grads, shared.averages, shared.squares, shared.copies),
        grad_factor=GRAD_FACTOR,
        clip_factor=clip_factor,
    )
    contenders = {
        "zcore, one pass": Contender(one_pass, UPDATE),
        "torch in calls": Contender(in_calls(step, is_scaled=True), UPDATE),
        "torch in calls, scaled in its step": Contender(in_calls(folded, is_scaled=False), UPDATE),
    }
    if find_spec("deepspeed") is not None:
        of_deepspeed = _by_deepspeed(shared, grads)
        contenders["DeepSpeedCPUAdam in calls"] = Contender(in_calls(of_deepspeed, is_scaled=True), UPDATE)
    return contenders


def _by_zcore(*operands: list[Tensor], **settings: Any) -> Run:
    step = ops.get("adamw_step", device=operands[0][0].device, dtype=torch.float32)
    corrections = {"bias_correction1": 1 - ADAM["beta1"], "bias_correction2": 1 - ADAM["beta2"]}
    return lambda: step(*operands, **ADAM, **corrections, **settings)


def _by_torch(shared: Shared, grads: list[Tensor], **scaling: Tensor) -> Run:
    steps = [torch.ones(()) for _ in grads]
    states = shared.averages, shared.squares
    return lambda: torch._fused_adamw_(
        shared.params, grads, *states, [], steps, amsgrad=False, maximize=False, **ADAM, **scaling
    )


def _by_deepspeed(shared: Shared, grads: list[Tensor]) -> Run:
    kind = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam  # it has no types
    params = [torch.nn.Parameter(each) for each in shared.params]
    betas = ADAM["beta1"], ADAM["beta2"]
    optimizer = kind(params, lr=ADAM["lr"], betas=betas, eps=ADAM["eps"], weight_decay=ADAM["weight_decay"])
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = grad
        states = {"exp_avg": shared.averages[index], "exp_avg_sq": shared.squares[index]}
        optimizer.state[param] = {"step": 0, **states}
    run: Run = optimizer.step
    return run
