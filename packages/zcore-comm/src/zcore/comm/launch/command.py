"""`zcore run`: from options and environment to a Job, its plan, and what is done with it."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from zcore.comm.launch.follow import run
from zcore.comm.launch.hosts import Host, parse_hostfile, select_hosts
from zcore.comm.launch.mpi import find_place, plan_rank
from zcore.comm.launch.plan import Command, Job, parse_shutdown_s, parse_variables, plan_local, plan_slurm, plan_ssh
from zcore.comm.launch.screen import Screen
from zcore.core.cores import num_cores
from zcore.core.errors import ConfigError, nearest

__all__ = ["app"]

# A host that does not answer is told after 10 s, one that is lost after 45 s; a password is never asked for.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15"

# A group without commands: only in a group do options of the program stay the program's.
app = typer.Typer(invoke_without_command=True, subcommand_metavar="", rich_markup_mode=None)


@app.callback()
def command(
    program: Annotated[list[str], typer.Argument(help="train.py, a command, or with -m a module; then its arguments.")],
    *,
    num_ranks: Annotated[
        int | None,
        typer.Option(
            "-n", "--nproc-per-node", min=1, help="Ranks on each host; by default its accelerators, or else 1."
        ),
    ] = None,
    is_module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in python -m.")] = False,
    hostfile: Annotated[Path | None, typer.Option(help="Start over ssh on its hosts: lines `HOST slots=4`.")] = None,
    include: Annotated[str, typer.Option(help="Only these of the hostfile: host1@host2:0,2.")] = "",
    exclude: Annotated[str, typer.Option(help="All of the hostfile but these.")] = "",
    ssh: Annotated[str, typer.Option(help="How to reach {host}; gets a line for a shell there.")] = SSH,
    slurm: Annotated[bool, typer.Option("--slurm", help="Start on each node of this SLURM allocation.")] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often failed ranks are started again.")] = 0,
    master_addr: Annotated[str | None, typer.Option(help="Where ranks meet; by default the first host.")] = None,
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port they meet at.")] = None,
    env: Annotated[list[str], typer.Option(help="NAME or NAME=VALUE, for every rank; may be repeated.")] = [],  # noqa: B006
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="Do not mark lines with their rank.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; start nothing.")] = False,
) -> None:
    """Start PROGRAM on several ranks: on this host, over ssh, under SLURM, or as this rank of mpirun or srun."""
    if (include or exclude) and not hostfile:
        raise ConfigError("--include and --exclude choose from a hostfile; give one with --hostfile.")
    if hostfile and slurm:
        raise ConfigError("--hostfile and --slurm are both given; expected one of them: SLURM knows its hosts.")
    job = Job(
        program=tuple(program),
        python=sys.executable,
        is_module=is_module,
        num_ranks=num_ranks,
        max_restarts=max_restarts,
        master_addr=master_addr,
        master_port=master_port,
        variables=parse_variables(env, os.environ),
    )
    shutdown_s = parse_shutdown_s({**os.environ, **job.variables})
    place = find_place(os.environ)
    commands: Sequence[Command]
    if place is not None:
        if hostfile or slurm or num_ranks:
            raise ConfigError(
                f"{place.launcher} has started this process as rank {place.rank} of {place.world_size}; -n, --hostfile "
                "and --slurm would start ranks within a rank. Leave them out, or start zcore once, by itself."
            )
        commands = [plan_rank(job, place, os.environ, num_cores=os.cpu_count() or 1, num_own_cores=num_cores())]
    elif hostfile:
        hosts = select_hosts(_read_hostfile(hostfile), include=include, exclude=exclude)
        commands = plan_ssh(job, hosts, ssh=ssh, environment=os.environ, directory=str(Path.cwd()))
    elif slurm:
        commands = [plan_slurm(job, os.environ)]
    else:
        commands = [plan_local(job)]
    if dry_run:
        typer.echo("\n".join(map(str, commands)))
        return
    if not hostfile and not is_module:
        _check_program(program[0])
    if place is not None:
        (become,) = commands
        os.execvpe(become.argv[0], become.argv, {**os.environ, **become.variables})
    screen = Screen(sys.stdout, sys.stderr, has_prefix=not no_prefix, has_colour=not os.environ.get("NO_COLOR"))
    raise typer.Exit(run(commands, screen, shutdown_s=shutdown_s))


def _read_hostfile(path: Path) -> tuple[Host, ...]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"The hostfile {path} cannot be read: {error.strerror}.") from error
    return parse_hostfile(text, path=str(path))


def _check_program(name: str) -> None:
    """Find a misspelled name before torch is started for it."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            near = nearest(Path(name).name, (file.name for file in Path(name).parent.glob("*.py")))
            advice = f"did you mean {Path(name).parent / near}?" if near else "give its path from here."
            raise ConfigError(f"There is no {name} in {Path.cwd()}; {advice}")
    elif shutil.which(name) is None:
        here = Path(name)
        if here.is_file():
            advice = f"chmod +x {here}" if not os.access(here, os.X_OK) else f"did you mean ./{here}?"
            raise ConfigError(f"{name} is a file that is not executed as it is named; {advice}")
        raise ConfigError(
            f"{name} is neither a file .py nor a command; expected train.py, a command that can be executed, or with "
            "-m a module."
        )
