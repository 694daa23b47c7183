"""What each rank runs to weigh one contender alone: fresh processes, so that no other's memory is there to be counted.

    before the model   the process group stands, the tokens are there: what is held then is subtracted everywhere
    start              the model is built and takes three steps: buckets, states and buffers come to be
    steady             more steps; `peak_bytes` is of these, which all others of a run are like

steps/watch.py says what counts and how. As a check on it, `resident_peak_bytes` is the kernel's own high-water mark of
a rank (VmHWM), exact, but with shared pages counted on each rank that maps them, and with pages of files.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from steps.contenders import Trainer, build_trainers, load
from steps.measure import make_tokens
from steps.names import STAGE_OF
from steps.sent import count_payload, in_parameters, loopback_bytes
from steps.watch import Held, Watch

from zcore.zero.placement import row_for, state_bytes

__all__ = ["weigh"]

STEPS = 3
FP32_BYTES = 4
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Figures = dict[str, object]


def weigh(name: str, sizes: GPTConfig, *, sequences: int) -> Figures:
    """Memory and traffic of contender `name`, per rank; all but `resident_peak_bytes` is the same on every rank."""
    tokens = make_tokens(sizes, sequences=sequences)
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))  # what the first product brings along
    load(name)
    size = dist.get_world_size()
    with _watched() as watch:
        before = watch.look()
        before_resident_bytes = _status_bytes("VmRSS")
        CLEAR.write_text("5", encoding="ascii")  # the high-water mark begins anew
        ((_, trainer),) = build_trainers((name,), sizes, tokens)
        _steps(trainer)
        start = watch.look()
        _steps(trainer)
        steady = watch.look()
    resident_bytes = _status_bytes("VmHWM") - before_resident_bytes
    payload_bytes, calls = count_payload(trainer.step, trainer.engine)
    crossed_bytes = loopback_bytes(trainer.step, repeats=STEPS)
    numel = sum(param.numel() for param in GPT(sizes).parameters())
    in_all = in_parameters(payload_bytes, parameters_bytes=numel * FP32_BYTES)
    memory = {
        "peak_bytes": (steady.peak_bytes - before.held_bytes) / size,
        "held_bytes": (steady.held_bytes - before.held_bytes) / size,
        "start_peak_bytes": (start.peak_bytes - before.held_bytes) / size,
        "resident_peak_bytes": resident_bytes,
        "samples": steady.samples,
        "formula_bytes": _formula_bytes(STAGE_OF[name], numel, size),
        "states_bytes": None if trainer.engine is None else trainer.engine.memory_report().ranks[0].states_bytes,
    }
    sent = {
        "payload_bytes": payload_bytes,
        "calls": calls,
        "in_parameters": in_all,
        "least_bytes": in_all * numel * FP32_BYTES * (size - 1) / size,
        "loopback_bytes": crossed_bytes / size,
    }
    return {"memory": memory, "sent": sent}


class _Told:
    """The watch of rank 0; the others only meet it, so that no rank steps while it looks."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch

    def look(self) -> Held:
        """All ranks between steps; the same on every rank."""
        gc.collect()
        dist.barrier()
        held = torch.zeros(3, dtype=torch.int64)
        if self._watch is not None:
            seen = self._watch.look()
            held = torch.tensor([seen.peak_bytes, seen.held_bytes, seen.samples])
        dist.broadcast(held, src=0)
        return Held(*held.tolist())


@contextmanager
def _watched() -> Iterator[_Told]:
    """Watch all ranks of this host."""
    processes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    processes[dist.get_rank()] = os.getpid()
    dist.all_reduce(processes)
    if dist.get_rank():
        yield _Told(None)
        return
    with Watch(processes.tolist()) as watch:
        yield _Told(watch)


def _steps(trainer: Trainer) -> None:
    for _ in range(STEPS):
        trainer.step()


def _formula_bytes(stage: int, numel: int, size: int) -> int:
    row = row_for(stage, shard_size=size)
    return state_bytes(row, numel=numel, shard_size=size, compute_bytes=4, master_bytes=4, optimizer_bytes=8)


def _status_bytes(field: str) -> int:
    (line,) = (line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10
