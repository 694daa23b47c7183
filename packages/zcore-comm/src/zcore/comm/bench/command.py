"""`zcore comm`: measures collectives, and the table that chooses between algorithms, on ranks that it starts itself.

Where ranks are there already, as under `zcore run zcore comm bench` on several hosts, the command is one of them.
"""

import json
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from zcore.core.errors import ConfigError

__all__ = ["app", "parse_bytes"]

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
DECIMAL_UNITS = ("K", "M", "G", "KB", "MB", "GB")  # which some take for 1,000, others for 1,024

app = typer.Typer(no_args_is_help=True, help="Measure collectives on this machine.", rich_markup_mode=None)


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it.

    >>> parse_bytes("64MiB"), parse_bytes("4 KiB"), parse_bytes("512")
    (67108864, 4096, 512)
    """
    digits = text.rstrip("BbIiKkMmGg ")
    unit = text[len(digits) :].strip().upper()
    if not digits.isdecimal() or unit not in UNITS or not int(digits):
        meant = f"{digits}{unit[0]}iB" if digits.isdecimal() and unit in DECIMAL_UNITS else ""
        advice = f" Did you mean {meant}?" if meant else ""
        raise ConfigError(f"{text!r} is no size; expected one such as 4KiB, 64MiB or 1GiB.{advice}")
    return int(digits) * UNITS[unit]


@app.command()
def bench(
    *,
    num_ranks: Annotated[int, typer.Option("-n", min=2, help="Ranks to start on this host.")] = 2,
    ops: Annotated[str, typer.Option(help="Some collectives only: all_gather,barrier; by default all.")] = "",
    min_bytes: Annotated[str, typer.Option(help="The smallest payload.")] = "1KiB",
    max_bytes: Annotated[str, typer.Option(help="The largest; a rank needs memory for six of it.")] = "1GiB",
    rounds: Annotated[int, typer.Option(min=1, help="How often every implementation has its turn.")] = 7,
    turn_s: Annotated[float, typer.Option("--turn", min=0.0, help="Seconds of a turn; at least one call.")] = 0.02,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw it into this PNG file.")] = None,
) -> None:
    """Measure every collective and implementation beside plain torch.distributed, in one run.

    This takes minutes, most of them for the largest payloads: --max-bytes 64MiB leaves these out.
    """
    from rich.console import Console

    from zcore.comm.bench.contenders import OPS
    from zcore.comm.bench.measure import Plan, Report, sizes_up_to
    from zcore.comm.bench.plot import check_plot, draw_plot
    from zcore.comm.bench.table import tables_of
    from zcore.core.tables import draw_tables

    low, high = parse_bytes(min_bytes), parse_bytes(max_bytes)
    if low > high:
        raise ConfigError(f"--min-bytes {min_bytes} is more than --max-bytes {max_bytes}; expected it to be less.")
    plan = Plan(
        ops=tuple(ops.split(",")) if ops else OPS,
        sizes_bytes=sizes_up_to(high, min_bytes=low),
        rounds=rounds,
        slice_s=turn_s,
    )
    if os.environ.get("RANK", "0") == "0":  # where ranks are there already, one of them writes
        if plot_file is not None:
            check_plot(plan, plot_file)
        for file in (json_file, plot_file):
            if file is not None:
                _check_file(file)
    text = _run("zcore.comm.bench.measure", plan.to_json(), num_ranks=num_ranks)
    if text is None:
        return
    report = replace(Report.from_json(text), command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    Console().print(draw_tables(tables_of(report)))
    if json_file is not None:
        json_file.write_text(report.to_json(), encoding="utf-8")
    if plot_file is not None:
        draw_plot(report, plot_file)
    for file in (json_file, plot_file):
        if file is not None:
            typer.echo(f"written: {file}")


@app.command()
def tune(
    *,
    num_ranks: Annotated[int, typer.Option("-n", min=2, help="Ranks to start on this host.")] = 2,
    max_bytes: Annotated[str, typer.Option(help="The largest payload to measure.")] = "64MiB",
    rounds: Annotated[int, typer.Option(min=1, help="How often every algorithm has its turn.")] = 9,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; write nothing.")] = False,
) -> None:
    """Measure which algorithm serves which size between ranks that share no memory, and keep the answer for later."""
    from rich.console import Console

    from zcore.comm.bench.measure import sizes_up_to
    from zcore.comm.bench.tune import Found, TunePlan, table_of
    from zcore.core.tables import draw_tables

    sizes_bytes = sizes_up_to(parse_bytes(max_bytes), min_bytes=256)
    plan = TunePlan(sizes_bytes=sizes_bytes, rounds=rounds, is_dry=dry_run)
    text = _run("zcore.comm.bench.tune", json.dumps(asdict(plan)), num_ranks=num_ranks)
    if text is not None:
        found = Found.from_json(text)
        Console().print(draw_tables([table_of(found)]))
        typer.echo(f"{'would be written' if dry_run else 'written'}: {found.path}")


def _check_file(path: Path) -> None:
    """Refuse a file that could not be written after minutes of measuring."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a file. Name one in it: {path / 'bench'}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}. Make it, or name another.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: permission denied. Name a file that you may write.")


def _run(module: str, plan: str, *, num_ranks: int) -> str | None:
    """What rank 0 has found, on ranks of this process's run or on new ones; None on its other ranks."""
    with tempfile.TemporaryDirectory(prefix="zcore-comm-") as folder:
        file = Path(folder) / "found.json"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            from importlib import import_module

            import_module(module).main([plan, str(file)])
        else:
            _start_ranks(module, [plan, str(file)], num_ranks=num_ranks)
        return file.read_text(encoding="utf-8") if file.exists() else None


def _start_ranks(module: str, arguments: list[str], *, num_ranks: int) -> None:
    from zcore.comm.launch.follow import run
    from zcore.comm.launch.plan import Job, parse_shutdown_s, plan_local
    from zcore.comm.launch.screen import Screen

    job = Job(program=(module, *arguments), python=sys.executable, is_module=True, num_ranks=num_ranks)
    screen = Screen(sys.stdout, sys.stderr, has_prefix=False)
    code = run([plan_local(job)], screen, shutdown_s=parse_shutdown_s(os.environ))
    if code:
        raise typer.Exit(code)
