"""`zcore run` as users start it: real launchers, real ranks, on one host and on two that a stand-in for ssh reaches.

Ranks import no torch, so that nearly all the time of a run is torch's in its launchers, about 3 s.
"""

import os
import re
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

typer_testing = pytest.importorskip("typer.testing")

from zcore.comm.launch.command import app  # noqa: E402 - behind the extra cli
from zcore.core.errors import ConfigError  # noqa: E402

DEADLINE_S = 60

# What a rank does is said by its arguments; `alive` is a FIFO that every rank holds open as long as it lives, and by
# `word`, another one, rank 1 says to rank 0 how far it is.
PROGRAM = """
import os, signal, sys, time
rank, alive, what = int(os.environ["RANK"]), open(sys.argv[1], "w"), sys.argv[2]
alive.write("here\\n"); alive.flush()
if what == "show":
    print(f"args {sys.argv[3:]} of {os.environ['WORLD_SIZE']} threads {os.environ['OMP_NUM_THREADS']}")
    print(f"stdin {sys.stdin.read()!r} seed {os.environ.get('SEED')} cwd {os.getcwd()}", file=sys.stderr)
    print("x" * 100_000)
    print("no end", end="")
elif what == "restart":  # ranks that meet again find each other, not what the first attempt left in the store
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    if rank == 1 and not os.path.exists("tried"):
        open("tried", "w")
        sys.exit(5)
    dist.all_reduce(total)
    print(f"total {total.item():g}")
    dist.destroy_process_group()
elif what in ("stopped", "deaf", "leaves", "dies"):
    if rank == 0:
        word = open("word").read()  # to its end
        if what == "stopped":
            os.kill(int(word), signal.SIGSTOP)
        while what == "dies" and os.path.exists(f"/proc/{int(word)}"):  # until its launcher has seen that it ended
            time.sleep(0.001)
        raise ValueError("no answer")
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    word = open("word", "w")
    print(os.getpid(), file=word, flush=True)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leaves":  # and closes the word when it has ended
        sys.exit(0)
    word.close()
    time.sleep(600)
elif what in ("raise", "kill", "wait"):
    if rank == 1 and what == "raise":
        raise ValueError("empty shard")
    if rank == 1 and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""

# Reaches a "host" here: a bare environment and another directory, so that all a rank has came through the line.
SSH = """
import os, sys
host, line = sys.argv[1:]
if host == "lost":
    os.write(2, b"ssh: connect to host lost port 22: Connection refused\\n")
    sys.exit(255)
os.chdir("/")
os.execve("/bin/sh", ["sh", "-c", line], {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")})
"""

# Starts --ntasks processes, each with its SLURM_NODEID, and passes stdin on to all of them.
SRUN = """
import os, subprocess, sys
count = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--ntasks="))
command = sys.argv[next(at for at, word in enumerate(sys.argv) if at and not word.startswith("--")):]
environments = [{**os.environ, "SLURM_NODEID": str(node)} for node in range(count)]
tasks = [subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) for environment in environments]
pid = os.fork()
if pid == 0:
    word = sys.stdin.buffer.readline()
    for task in tasks:
        task.stdin.write(word); task.stdin.close()
    os._exit(0)
codes = [task.wait() for task in tasks]
os.kill(pid, 9)
sys.exit(max(codes))
"""

FRONT = """
import sys
from zcore.comm.launch.command import app
app(prog_name="zcore run")
"""


@dataclass(frozen=True)
class Place:
    """A directory with a program, and what a run needs around it."""

    path: Path
    environment: dict[str, str]

    @property
    def ssh(self) -> list[str]:
        return ["--ssh", f"{sys.executable} {self.path / 'ssh.py'} {{host}}"]

    @property
    def meeting(self) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return ["--master-addr", "127.0.0.1", "--master-port", str(probe.getsockname()[1])]

    def start(self, *options: str, what: str) -> "Front":
        alive = os.open(self.path / "alive", os.O_RDONLY | os.O_NONBLOCK)
        command = [sys.executable, "-c", FRONT, *options, *what.split()]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=self.path, env=self.environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
        return Front(process, alive)

    def run(self, *options: str, what: str) -> "Done":
        return self.start(*options, what=what).finish()


@dataclass(frozen=True)
class Done:
    """How a run ended; no rank of it is left."""

    exitcode: int
    stdout: list[str]
    stderr: list[str]


@dataclass(frozen=True)
class Front:
    process: "subprocess.Popen[str]"
    alive: int

    def wait_for_ranks(self, count: int) -> None:
        seen = b""
        while seen.count(b"\n") < count:
            assert select.select([self.alive], [], [], DEADLINE_S)[0], f"{seen!r} of {count} ranks started"
            seen += os.read(self.alive, 2**16)

    def finish(self) -> Done:
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        self.wait_for_no_rank()
        return Done(self.process.returncode, stdout.splitlines(), stderr.splitlines())

    def wait_for_no_rank(self) -> None:
        with os.fdopen(self.alive, "rb", buffering=0) as alive:
            while alive.read(2**16) != b"":  # None: a rank lives and says nothing
                assert select.select([alive], [], [], DEADLINE_S)[0], "a rank outlives the run"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    os.mkfifo(tmp_path / "alive")
    os.mkfifo(tmp_path / "word")
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "ssh.py").write_text(SSH)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f"#!{sys.executable}\n{SRUN}")
    srun.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    paths = [str(Path(each).resolve()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return Place(tmp_path, {**kept, **changed})


def test_two_ranks_get_their_arguments_and_every_line_says_whose_it_is(place):
    done = place.run("-n", "2", "--env", "SEED=7", what="train.py alive show --lr 3 -- -n")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.exitcode == 0
    for rank in ("0", "1"):
        mine = [line.removeprefix(f"[{rank}] ") for line in done.stdout if line.startswith(f"[{rank}] ")]
        assert mine[0] == f"args ['--lr', '3', '--', '-n'] of 2 threads {threads}"
        assert "".join(mine[1:-1]) == "x" * 100_000  # a line this long may be cut
        assert mine[-1] == "no end"
        assert f"[{rank}] stdin '' seed 7 cwd {place.path}" in done.stderr
    assert all(re.match(r"\[[01]\] ", line) for line in done.stdout + done.stderr)


def test_when_a_rank_raises_the_others_end_and_its_traceback_comes_last(place):
    done = place.run("-n", "3", what="train.py alive raise")
    assert done.exitcode == 1
    assert re.match(r"--- rank 1 on .* failed first: exit code 1 ---", done.stderr[-6])
    assert done.stderr[-5] == "Traceback (most recent call last):"
    assert done.stderr[-2] == "ValueError: empty shard"
    assert "[1] ValueError: empty shard" in done.stderr
    assert not [line for line in done.stderr if "elastic" in line or "OMP_NUM_THREADS" in line]


def test_a_stopped_rank_is_ended_at_once_and_the_rank_that_failed_is_told(place):
    place.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(10 * DEADLINE_S)
    done = place.run("-n", "2", what="train.py alive stopped")
    assert done.exitcode == 1
    note = f"[launcher] rank 0 failed: exit code 1; ending the others, up to {10 * DEADLINE_S} s"
    assert note in done.stderr
    assert re.match(r"--- rank 0 on .* failed first: exit code 1 ---", done.stderr[done.stderr.index(note) + 1])
    assert done.stderr[-2] == "ValueError: no answer"


def test_a_rank_that_does_not_end_is_killed_in_time_and_not_blamed(place):
    place.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "1"
    done = place.run("-n", "2", what="train.py alive deaf")
    assert done.exitcode == 1
    assert "[launcher] rank 1 did not end within 1 s: killed" in done.stderr
    assert done.stderr[-2] == "ValueError: no answer"


def test_a_rank_that_left_without_an_error_is_told_when_another_one_fails(place):
    done = place.run("-n", "2", what="train.py alive leaves")
    assert done.exitcode == 1
    assert done.stderr[-3:-1] == ["ValueError: no answer", "Rank 1 had ended by then, with exit code 0."]


def test_the_others_of_a_killed_rank_may_say_what_they_know_of_it(place):
    done = place.run("-n", "2", what="train.py alive dies")
    assert "[0] ValueError: no answer" in done.stderr
    assert done.exitcode == 128 + signal.SIGKILL


def test_over_ssh_a_killed_rank_is_named_with_its_host_and_the_other_host_ends(place):
    place.environment.update(NCCL_DEBUG="WARN", SECRET="x")
    look = "print(*(os.environ.get(name) for name in ('NCCL_DEBUG', 'SEED', 'SECRET')), os.getcwd(), file=sys.stderr)"
    (place.path / "train.py").write_text(f"import os, sys; {look}\n{PROGRAM}")
    options = ("--hostfile", "hosts", *place.ssh, *place.meeting, "--env", "SEED=a 'b'")
    done = place.run(*options, what="train.py alive kill")
    assert done.exitcode == 128 + signal.SIGKILL
    assert done.stderr[-4].startswith("--- rank 1 on b failed first: killed by SIGKILL ---")
    assert done.stderr[-3] == f"WARN a 'b' None {place.path}"
    assert done.stderr[-2].startswith("The kernel kills so when memory runs out")


def test_a_host_that_is_not_reached_ends_the_run(place):
    (place.path / "hosts").write_text("a\nlost\n")
    done = place.run("--hostfile", "hosts", *place.ssh, *place.meeting, what="train.py alive wait")
    assert done.exitcode == 255
    assert "[lost] ssh: connect to host lost port 22: Connection refused" in done.stderr
    assert done.stderr[-4].startswith("--- launcher on lost failed: exit code 255")


def test_ctrl_c_ends_every_rank(place):
    front = place.start("-n", "2", what="train.py alive wait")
    front.wait_for_ranks(2)
    front.process.send_signal(signal.SIGINT)
    done = front.finish()
    assert done.exitcode == 128 + signal.SIGINT
    assert "[zcore run] SIGINT: all ranks are told to end" in done.stderr
    assert "[0] KeyboardInterrupt" in done.stderr  # so a program may save what it has


def test_a_killed_front_leaves_no_rank_behind(place):
    front = place.start("--hostfile", "hosts", *place.ssh, *place.meeting, what="train.py alive wait")
    front.wait_for_ranks(2)
    front.process.kill()
    front.process.communicate(timeout=DEADLINE_S)
    front.wait_for_no_rank()


def test_failed_ranks_start_again_on_all_hosts(place):
    (place.path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    options = ("--hostfile", "hosts", *place.ssh, *place.meeting, "--max-restarts", "1")
    done = place.run(*options, what="train.py alive restart")
    assert done.exitcode == 0, done.stderr
    assert sorted(done.stdout) == ["[0] total 4", "[1] total 4"]
    told = [line for line in done.stderr if "restart" in line]
    (failed,) = filter(
        None,
        (
            re.match(r"\[(\S+)\] rank 1 failed: (?:exit code 5|killed by SIGABRT); .*restart 1 of 1 follows", line)
            for line in told
        ),
    )
    other = {"localhost": "127.0.0.1", "127.0.0.1": "localhost"}[failed[1]]  # which has rank 1 is as they have met
    assert f"[{failed[1]}] restart 1 of 1: the ranks of this host start again" in told
    assert any(line.startswith(f"[{other}] restart") for line in told)


def test_failed_ranks_start_again_on_this_host(place):
    done = place.run("-n", "2", "--max-restarts", "1", what="train.py alive restart")
    assert done.exitcode == 0, done.stderr
    assert sorted(done.stdout) == ["[0] total 4", "[1] total 4"]
    why, restart = [line for line in done.stderr if "restart" in line]
    # gloo may abort a process whose peers it still has; that is an end, too
    assert re.match(r"\[launcher\] .*rank 1 failed: (exit code 5|killed by SIGABRT); .*restart 1 of 1 follows", why)
    assert restart == "[launcher] restart 1 of 1: the ranks of this host start again"


def test_under_slurm_every_node_takes_part(place):
    place.environment.update(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="127.0.0.[1-2]")
    done = place.run("--slurm", "-n", "2", *place.meeting, what="train.py alive show")
    assert done.exitcode == 0, done.stderr
    assert sorted(line[:3] for line in done.stdout if "of 4" in line) == ["[0]", "[1]", "[2]", "[3]"]


def test_a_rank_of_mpirun_becomes_the_program(place):
    place.environment.update(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
    done = place.run(what="train.py alive show -x")
    threads = max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // 2))
    assert done.stdout[0] == f"args ['-x'] of 2 threads {threads}"


def invoke(*options: str) -> typer_testing.Result:
    return typer_testing.CliRunner().invoke(app, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("trian.py",), r"There is no trian.py in .*; did you mean train.py\?"),
        (("nonesuch",), "nonesuch is neither a file .py nor a command"),
        (("hosts",), r"hosts is a file that is not executed as it is named; chmod \+x hosts"),
        (("bin/../go",), r"bin/../go is a file .*; chmod \+x bin/../go"),
        (("go.sh",), r"go.sh is a file that is not executed as it is named; did you mean ./go.sh\?"),
        (("--include", "a", "train.py"), "give one with --hostfile"),
        (("--hostfile", "nofile", "train.py"), "The hostfile nofile cannot be read: No such file or directory."),
        (("--hostfile", "hosts", "--slurm", "train.py"), "expected one of them: SLURM knows its hosts"),
        (("--slurm", "train.py"), "SLURM_JOB_ID is not set"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(place, monkeypatch, options, message):
    monkeypatch.chdir(place.path)
    (place.path / "go").touch(0o644)
    (place.path / "go.sh").touch(0o755)
    error = invoke(*options).exception
    assert isinstance(error, ConfigError)
    assert re.search(message, str(error))


def test_ranks_within_a_rank_are_refused(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "ranks within a rank" in str(invoke("-n", "2", "train.py").exception)


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        (("-n", "2"), [f"{sys.executable} -P -m zcore.comm.launch.agent --rdzv-backend=c10d"]),
        (
            ("--hostfile", "hosts"),
            ["ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 a 'cd ", "ssh "],
        ),
    ],
)
def test_a_dry_run_prints_what_a_shell_would_run_and_imports_no_torch(place, options, starts):
    program = f"{FRONT.strip()[:-1]}, standalone_mode=False)\nprint('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "--dry-run", *options, "train.py", "--lr", "3"]
    done = subprocess.run(command, cwd=place.path, env=place.environment, capture_output=True, text=True, check=True)
    *lines, has_torch = done.stdout.splitlines()
    assert has_torch == "False"
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
