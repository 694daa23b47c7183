"""Which commands a run is made of: one for each launcher, with host, variables and arguments. Pure: starts nothing.

    on this host    agent ...                                                   ranks meet at a free port
    over ssh        ssh HOST 'cd HERE && exec env NAME=VALUE ... agent ...'     one for each host
    under SLURM     srun ... agent ...                                          srun starts one on each node

Several hosts meet at the first one. Without restarts the rendezvous is torchrun's static one, in which ranks have the
order of the hosts. A restart needs its c10d one, the only one in which a host tells the others to start again; it
orders hosts by address.
"""

import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zcore.comm.launch.hosts import Host, expand_nodelist
from zcore.core.errors import ConfigError

__all__ = [
    "PORT",
    "SHUTDOWN_S",
    "SHUTDOWN_VARIABLE",
    "Command",
    "Job",
    "parse_shutdown_s",
    "parse_variables",
    "plan_local",
    "plan_slurm",
    "plan_ssh",
    "port_of_job",
]

PORT = 29500  # torchrun's own, so that a firewall that lets torchrun through lets this through
MEETING_S = 300  # for all hosts to come; torchrun's 900 s look like a hang
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHUTDOWN_S = 10  # for ranks that were asked to end, to save what they have; torch's 30 look like a hang
# What ranks on other hosts get of the environment here, next to what --env names.
_SENT = re.compile(r"PYTHONPATH|(NCCL|ZCORE|OMP|GLOO|TORCH)_\w+")
_PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")  # ${NAME} is a shell's
_LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, wherever it is."""

    program: tuple[str, ...]  # with its arguments
    python: str  # the absolute path of the interpreter, the same on every host
    is_module: bool = False
    num_ranks: int | None = None  # on each host; None: one for each accelerator, else one
    max_restarts: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)  # set for every rank


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start here."""

    argv: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)  # added to the environment here
    host: str | None = None  # None: this one, or srun, which speaks for many

    def __str__(self) -> str:
        """The command as a shell takes it."""
        return " ".join([*_assignments(self.variables), shlex.join(self.argv)])


def parse_variables(asked: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `--env NAME[=VALUE]`; one without a value is taken from `environment`."""
    variables: dict[str, str] = {}
    for text in asked:
        name, is_set, value = text.partition("=")
        if not name.isidentifier():
            raise ConfigError(f"--env {text} names no variable; expected NAME or NAME=VALUE.")
        if not is_set and name not in environment:
            raise ConfigError(f"--env {name}: {name} is not set here; set it, or write --env {name}=VALUE.")
        variables[name] = value if is_set else environment[name]
    return variables


def parse_shutdown_s(environment: Mapping[str, str]) -> int:
    """How long ranks that are asked to end may take, in seconds, by torch's variable for it.

    >>> parse_shutdown_s({}), parse_shutdown_s({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"})
    (10, 3)
    """
    said = environment.get(SHUTDOWN_VARIABLE, str(SHUTDOWN_S))
    if not said.isdecimal():
        raise ConfigError(
            f"{SHUTDOWN_VARIABLE} is {said!r}; expected the whole seconds that ranks may take to end, such as 10."
        )
    return int(said)


def plan_local(job: Job) -> Command:
    """Start all ranks on this host."""
    meeting = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    return Command(_agent(job, num_ranks=job.num_ranks, options=meeting), job.variables)


def plan_ssh(
    job: Job, hosts: Sequence[Host], *, ssh: str, environment: Mapping[str, str], directory: str
) -> tuple[Command, ...]:
    """Start the ranks of each host by a command that reaches it.

    `ssh` gets one more argument, a line for a shell over there; `{host}` in it is the host, which else comes before
    the line. The program runs in `directory`, as it would here.
    """
    unknown = [name for name in _PLACEHOLDER.findall(ssh) if name != "host"]
    if unknown:
        raise ConfigError(f"--ssh {ssh!r} names {{{unknown[0]}}}; expected no placeholder but {{host}}.")
    master_addr = job.master_addr or hosts[0].address
    if len(hosts) > 1 and not job.master_addr and _LOOPBACK.fullmatch(master_addr):
        raise ConfigError(
            f"The first host is {master_addr}, a name by which the others reach themselves. Write the name by which "
            f"they reach it into the hostfile, or give it with --master-addr."
        )
    commands: list[Command] = []
    for index, host in enumerate(hosts):
        variables = {name: environment[name] for name in sorted(environment) if _SENT.fullmatch(name)}
        variables.update(job.variables)
        if host.devices is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.devices))
        options = _meeting(job, num_hosts=len(hosts), master_addr=master_addr, master_port=job.master_port or PORT)
        if job.max_restarts:
            address = host.address if index else master_addr  # by which the others reach its ranks
            options += [f"--local-addr={address}", f"--rdzv-conf=is_host={int(index == 0)}"]
        else:
            options.append(f"--node-rank={index}")
        agent = shlex.join(_agent(job, num_ranks=_num_ranks(job, host), options=options))
        setting = " ".join(["env", *_assignments(variables), ""]) if variables else ""
        line = f"cd {shlex.quote(directory)} && exec {setting}{agent}"
        commands.append(Command((*_reach(ssh, host), line), host=host.name))
    return tuple(commands)


def plan_slurm(job: Job, environment: Mapping[str, str]) -> Command:
    """Start the ranks of each node of the allocation that `environment` tells of."""
    if "SLURM_JOB_ID" not in environment or "SLURM_JOB_NODELIST" not in environment:
        raise ConfigError(
            "--slurm works inside an allocation of SLURM, and there is none here (SLURM_JOB_ID is not set). Get one "
            "with `salloc --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive`, or write the command into a "
            "script and `sbatch` it with the same options."
        )
    nodes = expand_nodelist(environment["SLURM_JOB_NODELIST"])
    port = job.master_port or port_of_job(environment["SLURM_JOB_ID"])
    options = _meeting(job, num_hosts=len(nodes), master_addr=job.master_addr or nodes[0], master_port=port)
    tasks = environment.get("SLURM_NTASKS_PER_NODE", "")
    num_ranks = job.num_ranks or (int(tasks) if tasks.isdigit() and int(tasks) > 1 else None)
    srun = ("srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpu-bind=none")
    # Only the task knows which node it is on; torchrun reads PET_NODE_RANK where --node-rank is not given.
    node_rank = () if job.max_restarts else ("sh", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "sh")
    return Command((*srun, *node_rank, *_agent(job, num_ranks=num_ranks, options=options)), job.variables)


def port_of_job(name: str) -> int:
    """A port of its own, since two jobs may share a node; below 32768, where Linux begins to give out ports itself."""
    return 20000 + zlib.crc32(name.encode()) % 10000


def _agent(job: Job, *, num_ranks: int | None, options: Sequence[str]) -> tuple[str, ...]:
    """The command of one launcher: options of torchrun, `--`, the program."""
    counted = () if num_ranks is None else (f"--nproc-per-node={num_ranks}",)
    restarts = (f"--max-restarts={job.max_restarts}",) if job.max_restarts else ()
    kind = () if job.program[0].endswith(".py") else ("--no-python",)
    kind = ("--module",) if job.is_module else kind
    # -P: modules in the current directory must not stand in for those of Python and torch.
    return (job.python, "-P", "-m", "zcore.comm.launch.agent", *options, *counted, *restarts, *kind, "--", *job.program)


def _meeting(job: Job, *, num_hosts: int, master_addr: str, master_port: int) -> list[str]:
    if job.max_restarts:
        endpoint = f"--rdzv-endpoint={master_addr}:{master_port}"
        return [f"--nnodes={num_hosts}", "--rdzv-backend=c10d", endpoint]
    master = [f"--master-addr={master_addr}", f"--master-port={master_port}"]
    return [f"--nnodes={num_hosts}", *master, f"--rdzv-conf=timeout={MEETING_S}"]


def _num_ranks(job: Job, host: Host) -> int | None:
    slots = host.slots if host.devices is None else len(host.devices)
    if job.num_ranks and slots is not None and job.num_ranks > slots:
        raise ConfigError(f"-n {job.num_ranks} asks for more than the {slots} slots of {host.address}.")
    return job.num_ranks or slots


def _reach(ssh: str, host: Host) -> list[str]:
    words = shlex.split(ssh)
    return [word.replace("{host}", host.name) for word in words] + ([] if "{host}" in ssh else [host.name])


def _assignments(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
