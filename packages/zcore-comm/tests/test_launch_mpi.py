"""A rank that mpirun or srun started gets torch's variables from theirs."""

import pytest

from zcore.comm.launch.mpi import Place, find_place, plan_rank
from zcore.comm.launch.plan import Job
from zcore.core.errors import ConfigError

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[3-4]",
}


@pytest.mark.parametrize(
    ("launcher", "environment"), [("Open MPI", OPEN_MPI), ("MVAPICH", MVAPICH), ("MPICH", MPICH), ("srun", SRUN)]
)
def test_every_launcher_tells_the_same_place(launcher, environment):
    assert find_place(environment) == Place(launcher, rank=5, world_size=8, local_rank=1, local_world_size=4)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # the script of sbatch: the tasks are not started yet
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_what_is_not_one_of_several_ranks_has_no_place(environment):
    assert find_place(environment) is None


@pytest.mark.parametrize(("node", "count"), [(0, 2), (2, 2), (3, 1)])
def test_nodes_with_different_numbers_of_tasks_are_told_apart(node, count):
    environment = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": str(node)}
    place = find_place(environment)
    assert place is not None
    assert place.local_world_size == count


def test_a_place_on_the_host_may_be_given_where_the_launcher_does_not_tell():
    alone = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    with pytest.raises(ConfigError, match="neither MPI_LOCALRANKID and MPI_LOCALNRANKS nor LOCAL_RANK"):
        find_place(alone)
    assert find_place({**alone, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == Place("MPICH", 1, 2, 1, 2)


def test_a_rank_of_srun_is_told_its_place_by_slurm_and_one_of_mpirun_inside_of_it_by_mpirun():
    pmi2 = {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert find_place({**SRUN, **pmi2}) == Place("srun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    daemon = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert find_place({**daemon, **MPICH}) == find_place(MPICH)


def plan(environment, *, program=("train.py", "-x"), num_own_cores=10, **options):
    place = find_place(environment)
    assert place is not None
    return plan_rank(
        Job(program, python="/opt/python", **options), place, environment, num_cores=10, num_own_cores=num_own_cores
    )


def test_the_process_becomes_the_program_with_torchs_variables():
    assert str(plan({**OPEN_MPI, "MASTER_ADDR": "worker-1"})) == (
        "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=worker-1 MASTER_PORT=29500 OMP_NUM_THREADS=2 "
        "/opt/python -u train.py -x"
    )


def test_options_come_before_the_environment_and_the_users_threads_stay():
    environment = {**MPICH, "MASTER_ADDR": "a", "MASTER_PORT": "1", "OMP_NUM_THREADS": "7"}
    variables = plan(environment, master_addr="b", master_port=2, variables={"SEED": "3"}).variables
    assert [variables[name] for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SEED")] == list("b273")


@pytest.mark.parametrize(
    ("program", "is_module", "argv"),
    [
        (("pkg.train", "-v"), True, ("/opt/python", "-u", "-m", "pkg.train", "-v")),
        (("./go", "-v"), False, ("./go", "-v")),
    ],
)
def test_modules_and_other_programs_run_too(program, is_module, argv):
    assert plan(SRUN, program=program, is_module=is_module).argv == argv


def test_where_ranks_meet_is_derived_or_asked_for():
    assert plan(SRUN).variables["MASTER_ADDR"] == "node3"
    assert plan({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}).variables["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"Open MPI started 8 ranks, 4 of them on this host.*--master-addr worker-1"):
        plan(OPEN_MPI)


@pytest.mark.parametrize(
    ("environment", "other"),
    [
        ({**SRUN, "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, {"SLURM_STEP_ID": "1"}),
        ({**MPICH, "SLURM_JOB_ID": "1", "MASTER_ADDR": "a"}, {"SLURM_JOB_ID": "2"}),
        ({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-a-1@1", "MASTER_ADDR": "a"}, {"PMIX_NAMESPACE": "prterun-a-2@1"}),
    ],
)
def test_runs_that_have_a_name_meet_at_ports_of_their_own(environment, other):
    ports = [plan(each).variables["MASTER_PORT"] for each in (environment, environment, {**environment, **other})]
    assert ports[0] == ports[1] != ports[2]
    assert all(20_000 <= int(port) < 30_000 for port in ports)


def test_a_rank_that_is_bound_to_fewer_cores_takes_these():
    assert plan(SRUN, num_own_cores=1).variables["OMP_NUM_THREADS"] == "1"
