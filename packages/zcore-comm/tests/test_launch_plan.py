"""What `zcore run` would start, in every mode, from options and environment alone."""

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.launch.hosts import Host
from zcore.comm.launch.plan import Job, parse_variables, plan_local, plan_slurm, plan_ssh
from zcore.core.errors import ConfigError

JOB = Job(("train.py", "--lr", "3"), python="/opt/python")
AGENT = "/opt/python -P -m zcore.comm.launch.agent"
HOSTS = (Host("worker-1", 4), Host("me@worker-2", 4, (0, 2)))
SLURM = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[08-10]", "SLURM_NTASKS_PER_NODE": "1"}


def ssh(job=JOB, hosts=HOSTS, *, by="ssh", environment=None):
    commands = plan_ssh(job, hosts, ssh=by, environment=environment or {}, directory="/data/my runs")
    return [str(command) for command in commands]


@pytest.mark.parametrize(
    ("job", "end"),
    [
        (JOB, "-- train.py --lr 3"),
        (replace(JOB, num_ranks=2), "--nproc-per-node=2 -- train.py --lr 3"),
        (replace(JOB, max_restarts=3), "--max-restarts=3 -- train.py --lr 3"),
        (replace(JOB, is_module=True, program=("pkg.train", "-v")), "--module -- pkg.train -v"),
        (replace(JOB, program=("./go.sh", "a b", "--", "-x")), "--no-python -- ./go.sh 'a b' -- -x"),
    ],
)
def test_on_one_host_ranks_meet_at_a_free_port(job, end):
    assert str(plan_local(job)) == f"{AGENT} --rdzv-backend=c10d --rdzv-endpoint=localhost:0 {end}"


def test_variables_stand_before_the_command_as_a_shell_takes_them():
    job = replace(JOB, variables={"GREETING": "hello you", "A": ""})
    assert str(plan_local(job)).startswith(f"GREETING='hello you' A='' {AGENT}")


def test_over_ssh_each_host_gets_a_line_for_its_shell_and_ranks_have_the_order_of_hosts():
    meeting = "--nnodes=2 --master-addr=worker-1 --master-port=29500 --rdzv-conf=timeout=300"
    lines = [
        f"cd '/data/my runs' && exec {AGENT} {meeting} --node-rank=0 --nproc-per-node=4 -- train.py --lr 3",
        f"cd '/data/my runs' && exec env CUDA_VISIBLE_DEVICES=0,2 {AGENT} {meeting} --node-rank=1 "
        "--nproc-per-node=2 -- train.py --lr 3",
    ]
    assert ssh() == [f"ssh worker-1 {shlex.quote(lines[0])}", f"ssh me@worker-2 {shlex.quote(lines[1])}"]


def test_a_placeholder_that_there_is_not_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"--ssh 'ssh {hots} -v' names {hots}; expected no placeholder but {host}"):
        ssh(by="ssh {hots} -v")
    assert ssh(by="sh -c 'ssh ${OPTIONS} {host}'")[0].startswith("sh -c 'ssh ${OPTIONS} worker-1' ")


def test_restarts_over_ssh_take_the_rendezvous_that_can_restart():
    hosts = (Host("a"), Host("me@b"))
    first, second = ssh(replace(JOB, max_restarts=2), hosts)
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=a:29500 --local-addr=a --rdzv-conf=is_host=1" in first
    assert "--rdzv-endpoint=a:29500 --local-addr=b --rdzv-conf=is_host=0 --max-restarts=2" in second
    first, second = ssh(replace(JOB, max_restarts=2, master_addr="10.0.0.1"), hosts)
    assert "--rdzv-endpoint=10.0.0.1:29500 --local-addr=10.0.0.1 --rdzv-conf=is_host=1" in first
    assert "--rdzv-endpoint=10.0.0.1:29500 --local-addr=b --rdzv-conf=is_host=0" in second


def test_ranks_over_ssh_get_the_variables_of_their_libraries_and_those_asked_for():
    environment = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/my code", "HOME": "/root", "ZCORE_X": "1", "XNCCL_": ""}
    job = replace(JOB, variables={"SEED": "it's 7", "ZCORE_X": "2"})
    (line, _) = ssh(job, environment=environment)
    words = shlex.split(shlex.split(line)[-1])
    start, end = words.index("env"), words.index("/opt/python")
    assert words[start + 1 : end] == ["NCCL_DEBUG=INFO", "PYTHONPATH=/my code", "ZCORE_X=2", "SEED=it's 7"]


def test_the_host_stands_where_the_template_wants_it():
    assert ssh(by="ip netns exec {host} sh -c")[1].startswith("ip netns exec me@worker-2 sh -c 'cd ")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), max_size=5))
def test_any_argument_survives_both_shells(arguments):
    job = replace(JOB, program=("train.py", *arguments))
    line = shlex.split(ssh(job)[0])[-1]
    assert shlex.split(line)[-len(arguments) - 1 :] == ["train.py", *arguments]


@pytest.mark.parametrize("name", ["localhost", "me@127.0.0.1"])
def test_a_first_host_that_others_cannot_reach_is_refused_unless_an_address_is_given(name):
    hosts = (Host(name), Host("b"))
    with pytest.raises(ConfigError, match="--master-addr"):
        ssh(hosts=hosts)
    assert "--master-addr=10.0.0.1" in ssh(replace(JOB, master_addr="10.0.0.1"), hosts)[0]
    assert len(ssh(hosts=hosts[:1])) == 1


def test_more_ranks_than_slots_are_refused():
    with pytest.raises(ConfigError, match="-n 5 asks for more than the 4 slots of worker-1"):
        ssh(replace(JOB, num_ranks=5))


def test_under_slurm_srun_starts_one_launcher_on_each_node_and_the_job_has_a_port_of_its_own():
    assert str(plan_slurm(replace(JOB, num_ranks=8), SLURM)) == (
        "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpu-bind=none "
        f"""sh -c 'PET_NODE_RANK=$SLURM_NODEID exec "$@"' sh {AGENT} --nnodes=3 --master-addr=node08 """
        "--master-port=20927 --rdzv-conf=timeout=300 --nproc-per-node=8 -- train.py --lr 3"
    )


def test_under_slurm_restarts_need_no_node_rank():
    assert str(plan_slurm(replace(JOB, max_restarts=1), SLURM)) == (
        f"srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpu-bind=none {AGENT} --nnodes=3 --rdzv-backend=c10d "
        "--rdzv-endpoint=node08:20927 --max-restarts=1 -- train.py --lr 3"
    )


def test_tasks_per_node_are_ranks_unless_n_says_otherwise():
    four = {**SLURM, "SLURM_NTASKS_PER_NODE": "4"}
    assert "--nproc-per-node=4" in str(plan_slurm(JOB, four))
    assert "--nproc-per-node=2" in str(plan_slurm(replace(JOB, num_ranks=2), four))
    assert "--nproc-per-node" not in str(plan_slurm(JOB, SLURM))


def test_outside_an_allocation_the_error_says_how_to_get_one():
    with pytest.raises(ConfigError, match=r"salloc --nodes=2 .*sbatch"):
        plan_slurm(JOB, {})


def test_variables_are_taken_as_given_or_from_here():
    assert parse_variables(["A=1=2", "B", "C="], {"B": "b"}) == {"A": "1=2", "B": "b", "C": ""}


@pytest.mark.parametrize(("text", "message"), [("B", "B is not set here"), ("1=2", "names no variable")])
def test_a_variable_that_is_none_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_variables([text], {})


def test_a_thousand_hosts_are_planned_at_once():
    commands = ssh(hosts=[Host(f"node{index}", 8) for index in range(1024)])
    assert "--node-rank=1023" in commands[-1]
