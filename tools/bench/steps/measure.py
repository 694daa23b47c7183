"""What each rank runs to time a lineup: the steps of its contenders, in turns, in one process group."""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from steps.contenders import Step, Trainer, build_trainers
from steps.names import DDP, FSDP2, NO_COMMUNICATION
from torch import Tensor

from zcore.comm.recording.recorder import record
from zcore.core.device import device_in_use_bytes
from zcore.core.timing import Spread, time_in_turns

__all__ = ["Figures", "make_tokens", "measure_steps"]

LOSS_TOLERANCE = 1e-4  # relative, after three steps: reductions add in different orders
TURN_S = 0.5  # of a turn: a short step is made several times, one that takes longer once

Figures = dict[str, object]


def make_tokens(sizes: GPTConfig, *, sequences: int) -> Tensor:
    """This rank's, [sequences, context + 1]: inputs, and the same one further as targets."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(sizes.vocab_size, (sequences, sizes.context + 1), generator=generator)


def measure_steps(sizes: GPTConfig, names: Sequence[str], *, sequences: int, rounds: int) -> Figures:
    """Times of one step of each of `names`, DDP and FSDP2 among them; the same figures on every rank."""
    cpu, world = torch.device("cpu"), dist.group.WORLD
    assert world is not None
    tokens = make_tokens(sizes, sequences=sequences)
    matmul_flops_per_s = _measure_matmul()
    trainers: dict[str, Trainer] = {}
    losses: dict[str, list[float]] = {}
    for name, trainer in build_trainers(names, sizes, tokens):
        trainers[name] = trainer
        losses[name] = [trainer.step() for _ in range(3)]
        gc.collect()
    _compare(losses)
    runs = {name: lambda step=trainer.step: _discard(step()) for name, trainer in trainers.items()}
    times_s = time_in_turns(runs, group=world, device=cpu, rounds=rounds, slice_s=TURN_S)
    numel = sum(param.numel() for param in GPT(sizes).parameters())
    # Two operations for each weight that a token is multiplied with, three passes; attention's own are left out.
    flops = 6 * (numel - sizes.vocab_size * sizes.width) * sequences * sizes.context
    rows = {}
    for name, trainer in trainers.items():
        own_s = times_s[name]
        rows[name] = {
            "time_s": asdict(Spread.of(own_s)),
            "times_ddp": _ratio(own_s, times_s[DDP]),
            "times_fsdp2": _ratio(own_s, times_s[FSDP2]),
            "of_matmul": flops / Spread.of(own_s).median / matmul_flops_per_s,
            "waiting_share": None if trainer.engine is None else _waiting_share(trainer.step),
            "losses": losses[name],
        }
    return {
        "parameters": numel,
        "matmul_flops_per_s": matmul_flops_per_s,
        "held_by_rank_0_bytes": device_in_use_bytes(cpu),
        "contenders": rows,
    }


def _ratio(own_s: list[float], other_s: list[float]) -> dict[str, float]:
    return asdict(Spread.of([own / other for own, other in zip(own_s, other_s, strict=True)]))


def _compare(losses: dict[str, list[float]]) -> None:
    """Refuse to time what does not train alike."""
    expected = losses[DDP]
    for name, values in losses.items():
        worst = max(abs(one - other) / abs(other) for one, other in zip(values, expected, strict=True))
        if worst > LOSS_TOLERANCE and name != NO_COMMUNICATION:  # whose ranks train apart
            raise ValueError(f"{name} does not train as DDP does: losses {values}, expected {expected}.")


def _waiting_share(step: Step) -> float:
    """Share of two further steps that this rank's program was held by collectives, the mean over ranks."""
    dist.barrier()
    began_s = time.monotonic()
    with record() as recording:
        step()
        step()
        took_s = time.monotonic() - began_s
    held_s = sum(
        (call.issued_s or 0) - call.started_s + (call.done_s or 0) - (call.wait_began_s or 0)
        for call in recording.calls
    )
    share = torch.tensor(held_s / took_s)
    dist.all_reduce(share)
    return share.item() / dist.get_world_size()


def _measure_matmul() -> float:
    """fp32 operations per second of a square product, on all ranks at once: the ceiling of each."""
    side = 1024
    left, right = torch.randn(side, side), torch.randn(side, side)
    times_s = []
    for _ in range(7):
        dist.barrier()
        began_s = time.perf_counter()
        torch.mm(left, right)
        times_s.append(time.perf_counter() - began_s)
    return 2 * side**3 / sorted(times_s)[3]


def _discard(_: object) -> None:
    """A loss was looked at before."""
