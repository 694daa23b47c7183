"""`zcore kernels`: what serves each op on this machine, whether it is right, and how fast it is.

torch is imported when a command runs, and not when `zcore` looks which there are.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zcore.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["app"]

DTYPES = ("float32", "bfloat16", "float16")

app = typer.Typer(no_args_is_help=True, help="Ops: who serves them, are they right, how fast.", rich_markup_mode=None)

Ops = Annotated[str, typer.Argument(help="Some ops only, separated by commas: adamw_step,rms_norm.")]
Dtypes = Annotated[str, typer.Option(help="Of activations and gradients; some of float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Numel = Annotated[int, typer.Option(min=1, help="Elements of the largest operand.")]


@app.command("list")
def list_all(dtype: Dtypes = "float32", device: Device = "cpu") -> None:
    """Show every op, who would serve it here, and why others do not."""
    from rich.console import Console

    from zcore.core.tables import draw_tables
    from zcore.kernels.commands.listing import list_ops

    for each in _dtypes(dtype):
        Console().print(draw_tables(list_ops(device=_device(device), dtype=each)))


@app.command()
def check(
    ops: Ops = "", *, dtypes: Dtypes = "float32,bfloat16", device: Device = "cpu", numel: Numel = 100_003
) -> None:
    """Compare every implementation that serves with its reference; 1 is returned where one is wrong or raises."""
    from rich.console import Console

    from zcore.core.tables import draw_tables
    from zcore.kernels.commands.checking import check_op, named_ops, table_of

    outcomes = [
        outcome
        for op in named_ops(ops)
        for dtype in _dtypes(dtypes)
        for outcome in check_op(op, numel=numel, dtype=dtype, device=_device(device))
    ]
    Console().print(draw_tables([table_of(outcomes)]))
    raise typer.Exit(0 if all(each.is_right for each in outcomes) else 1)


@app.command()
def bench(
    ops: Ops = "",
    *,
    against: Annotated[str, typer.Option(help="Peers: torch, compile, deepspeed, liger (on cuda).")] = "torch,compile",
    dtypes: Dtypes = "float32,bfloat16",
    device: Device = "cpu",
    numel: Numel = 10_000_000,
    threads: Annotated[int, typer.Option(min=0, help="0: those that torch takes by itself.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn.")] = 9,
    turn_s: Annotated[float, typer.Option("--turn", min=0.0, help="Seconds of a turn; at least one call.")] = 0.05,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
) -> None:
    """Time every op beside torch, and beside what moving its bytes takes, all in turns; 1 where one raises."""
    import torch
    from rich.console import Console

    from zcore.core.machine import find_machine, find_versions, load, load_notes
    from zcore.core.tables import Table, draw_tables
    from zcore.kernels.commands.checking import named_ops, told
    from zcore.kernels.commands.measuring import check_peers, measure_op, table_of

    if threads:
        torch.set_num_threads(threads)
    on = _device(device)
    peers, before, began = check_peers(against, device=on), load(), datetime.now(UTC)
    rows, raised = [], {}
    for op, dtype in product(named_ops(ops), _dtypes(dtypes)):
        try:
            rows += measure_op(op, numel=numel, dtype=dtype, device=on, peers=peers, rounds=rounds, slice_s=turn_s)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told and the other ops are timed
            raised[f"{op}, {str(dtype).removeprefix('torch.')}"] = told(error)
    machine = find_machine(on)
    title = f"{machine['accelerator'] or machine['processor']}, {torch.get_num_threads()} threads, {numel} elements"
    notes = *load_notes(before), *(f"{what} raised {error}" for what, error in raised.items())
    Console().print(draw_tables([Table(title, notes=notes), table_of(rows)]))
    if json_file is not None:
        report = {
            "schema": 1,
            "is_benchmark": True,
            "started": began.isoformat(timespec="seconds"),
            "machine": machine,
            "versions": find_versions(),
            "threads": torch.get_num_threads(),
            "load": [before, load()],
            "plan": {"numel": numel, "rounds": rounds, "slice_s": turn_s, "against": peers},
            "rows": [asdict(row) for row in rows],
            "raised": raised,
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(1 if raised else 0)


def _dtypes(names: str) -> "list[torch.dtype]":
    import torch

    for name in names.split(","):
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r}: expected {', '.join(DTYPES)}.")
    return [getattr(torch, name) for name in names.split(",")]


def _device(name: str) -> "torch.device":
    import torch

    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no such device here. `zcore doctor` shows what it sees.")
    return torch.device(name)
