"""A process that mpirun or srun started as one rank of many: which rank it is, in torch's words. Pure.

Nothing is launched then: the process becomes the program, with the variables that torchrun would have set.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from zcore.comm.launch.hosts import expand_nodelist
from zcore.comm.launch.plan import PORT, Command, Job, port_of_job
from zcore.core.errors import ConfigError

__all__ = ["Place", "find_place", "plan_rank"]


@dataclass(frozen=True, slots=True)
class _Names:
    """The variables by which one launcher tells a rank its place."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


_NAMES = (
    _Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Only srun sets those of the step; in the script that sbatch runs SLURM_PROCID is 0 and means nothing. Last, as
    # mpirun starts its own daemons by srun, whose variables its ranks inherit.
    _Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands among the others."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place of this process, or None if it is not one of several.

    >>> find_place({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    Place(launcher='MPICH', rank=3, world_size=4, local_rank=1, local_world_size=2)
    """
    missing: _Names | None = None
    for names in _NAMES:
        if names.rank not in environment or int(environment.get(names.world_size, "1")) < 2:
            continue
        local_rank = environment.get(names.local_rank, environment.get("LOCAL_RANK"))
        local_world_size = environment.get(names.local_world_size, environment.get("LOCAL_WORLD_SIZE"))
        if local_rank is None or local_world_size is None:
            missing = missing or names  # srun --mpi=pmi2 sets MPICH's rank and size, and its own place on the host
            continue
        if names.launcher == "srun":
            local_world_size = _tasks_of_node(local_world_size, int(environment.get("SLURM_NODEID", "0")))
        rank, world_size = int(environment[names.rank]), int(environment[names.world_size])
        return Place(names.launcher, rank, world_size, int(local_rank), int(local_world_size))
    if missing is not None:
        raise ConfigError(
            f"{missing.launcher} tells this process its rank, not its place on the host: neither {missing.local_rank} "
            f"and {missing.local_world_size} nor LOCAL_RANK and LOCAL_WORLD_SIZE are set. Set these for each process."
        )
    return None


def plan_rank(job: Job, place: Place, environment: Mapping[str, str], *, num_cores: int, num_own_cores: int) -> Command:
    """What this process is to become, on a host of `num_cores`; the launcher may have bound it to fewer."""
    num_threads = max(1, min(num_own_cores, num_cores // place.local_world_size))
    variables = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "MASTER_ADDR": _master_addr(job, place, environment),
        "MASTER_PORT": job.master_port or environment.get("MASTER_PORT", _master_port(place, environment)),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", num_threads),
    }
    python = (job.python, "-u") if job.is_module or job.program[0].endswith(".py") else ()
    module = ("-m",) if job.is_module else ()
    texts = {name: str(value) for name, value in variables.items()}
    return Command((*python, *module, *job.program), {**texts, **job.variables})


def _master_addr(job: Job, place: Place, environment: Mapping[str, str]) -> str:
    said = job.master_addr or environment.get("MASTER_ADDR")
    if said:
        return said
    if place.local_world_size == place.world_size:
        return "127.0.0.1"
    if place.launcher == "srun" and (nodes := environment.get("SLURM_STEP_NODELIST")):
        return expand_nodelist(nodes)[0]
    raise ConfigError(
        f"{place.launcher} started {place.world_size} ranks, {place.local_world_size} of them on this host, and does "
        "not say where rank 0 is. Give every rank its host's name: --master-addr worker-1, or MASTER_ADDR."
    )


def _master_port(place: Place, environment: Mapping[str, str]) -> int:
    """A run's own port where the launcher tells all its ranks the same name of the run; else torchrun's."""
    job = environment.get("SLURM_JOB_ID")
    if place.launcher == "srun" and job:
        job += f".{environment.get('SLURM_STEP_ID')}"
    run = environment.get("PMIX_NAMESPACE", job) if place.launcher == "Open MPI" else job
    return port_of_job(run) if run else PORT


def _tasks_of_node(text: str, node: int) -> str:
    """SLURM's `2(x3),1`: 2 tasks on each of nodes 0 to 2, 1 on node 3."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [count] * int(times or 1)
    return counts[node]
