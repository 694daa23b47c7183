"""What each rank of tools/bench/zero_step.py runs: the steps of all kinds, in turns, in one process group."""

import gc
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from steps.trainers import Step, build_steps

from zcore.comm.bench.timing import Spread, time_in_turns
from zcore.comm.recording.recorder import record
from zcore.core.device import device_in_use_bytes

__all__ = ["measure_steps"]

LOSS_TOLERANCE = 1e-4  # relative, after three steps: reductions add in different orders
REFERENCE = "zcore, plain gloo"
UNCOMPARED = ("no communication",)  # its ranks train apart

Figures = dict[str, object]


def measure_steps(sizes: GPTConfig, kinds: tuple[str, ...], *, sequences: int, rounds: int) -> Figures:
    """Times of one step of each of `kinds`, the same figures on every rank."""
    cpu, world = torch.device("cpu"), dist.group.WORLD
    assert world is not None
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(sizes.vocab_size, (sequences, sizes.context + 1), generator=generator)
    matmul_flops_per_s = _measure_matmul()
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    for kind, step in build_steps(kinds, sizes, tokens):
        steps[kind] = step
        losses[kind] = [step() for _ in range(3)]
        gc.collect()
    _compare(losses)
    runs = {kind: lambda step=step: _discard(step()) for kind, step in steps.items()}
    times_s = time_in_turns(runs, group=world, device=cpu, rounds=rounds, slice_s=1e-3)
    numel = sum(param.numel() for param in GPT(sizes).parameters())
    # Two operations for each weight that a token is multiplied with, three passes; attention's own are left out.
    flops = 6 * (numel - sizes.vocab_size * sizes.width) * sequences * sizes.context
    rows = {}
    for kind in kinds:
        median_s = Spread.of(times_s[kind]).median
        rows[kind] = {
            "time_s": asdict(Spread.of(times_s[kind])),
            "times_plain": _ratio(times_s[kind], times_s[REFERENCE]) if REFERENCE in times_s else None,
            "times_ddp": _ratio(times_s[kind], times_s["DDP"]) if "DDP" in times_s else None,
            "of_matmul": flops / median_s / matmul_flops_per_s,
            "waiting_share": _waiting_share(steps[kind]) if kind.startswith("zcore") else None,
            "losses": losses[kind],
        }
    return {
        "parameters": numel,
        "tokens_per_rank": sequences * sizes.context,
        "rounds": rounds,
        "matmul_flops_per_s": matmul_flops_per_s,
        "held_by_all_kinds_bytes": device_in_use_bytes(cpu),
        "kinds": rows,
    }


def _ratio(own_s: list[float], other_s: list[float]) -> dict[str, float]:
    return asdict(Spread.of([own / other for own, other in zip(own_s, other_s, strict=True)]))


def _compare(losses: dict[str, list[float]]) -> None:
    """Refuse to time what does not train alike."""
    compared = {kind: values for kind, values in losses.items() if kind not in UNCOMPARED}
    first = next(iter(compared.values()))
    for kind, values in compared.items():
        worst = max(abs(one - other) / abs(other) for one, other in zip(values, first, strict=True))
        if worst > LOSS_TOLERANCE:
            raise ValueError(f"{kind} does not train as the others do: losses {values}, expected {first}.")


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
