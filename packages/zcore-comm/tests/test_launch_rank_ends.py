"""Looks at the ranks of one host: what is told of each end, when, and of whom nothing is told.

Ranks are real processes, that end as they are told; the test makes each look itself. Only torch's rendezvous is left
out: no host is to be met.
"""

import logging
import os
import signal
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from zcore.comm.launch.lines import Ended, LineReader, Restarted, Said
from zcore.comm.launch.rank_ends import EndingAgent
from zcore.comm.launch.rank_streams import RankStreams

# Each rank reads what to do from a FIFO of its own: an exit code, or the end of another rank to wait for.
PROGRAM = """
case "$1" in deaf*) trap '' TERM;; sorry*) trap 'exit 7' TERM;; esac
read -r act number < "$0/$RANK"
if [ "$act" = mutter ]; then printf 'cannot open data' >&2; exit "$number"; fi
if [ "$act" = after ]; then while kill -0 "$number" 2>/dev/null; do sleep 0.01; done; exit 4; fi
exit "$act"
"""


class Rendezvous:
    """Of one host, which has met."""

    use_agent_store = False

    def get_run_id(self):
        return "run"

    def get_backend(self):
        return "static"


class Host:
    """Ranks of this host under an agent that looks at them when it is told to."""

    def __init__(self, folder, num_ranks, *, max_restarts=0, temper="obedient", logs=None):
        self.folder, self.orders = folder, []
        spec = WorkerSpec(
            role="default",
            local_world_size=num_ranks,
            rdzv_handler=Rendezvous(),
            entrypoint="/bin/sh",
            args=("-c", PROGRAM, str(folder), temper),
            max_restarts=max_restarts,
        )
        self.agent = EndingAgent(spec, logs or DefaultLogsSpecs(log_dir=str(folder / "logs")))
        self.group = self.agent.get_worker_group()
        self.group.store, self.group.group_rank = HashStore(), 0
        self.group.master_addr, self.group.master_port = "127.0.0.1", 1
        for rank, worker in enumerate(self.group.workers):
            worker.global_rank = worker.role_rank = rank
            worker.world_size = worker.role_world_size = num_ranks
            os.mkfifo(folder / str(rank))
        self.start()

    def start(self):
        """Start all ranks, or start them again; return when each of them reads."""
        self.close()  # first, or a new rank would read the end of what the old one was told
        for local_rank, pid in self.agent._start_workers(self.group).items():
            self.group.workers[local_rank].id = pid
        self.orders = [(self.folder / str(rank)).open("w") for rank in range(len(self.group.workers))]

    def close(self):
        for each in self.orders:
            each.close()

    def pid(self, rank):
        return self.group.workers[rank].id

    def tell(self, rank, act):
        print(act, file=self.orders[rank], flush=True)

    def end(self, rank, exitcode):
        """Return when the rank has ended by itself, which the agent has not seen yet."""
        self.tell(rank, exitcode)
        os.waitid(os.P_PID, self.pid(rank), os.WEXITED | os.WNOWAIT)

    def look(self):
        return self.agent._monitor_workers(self.group).state


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Make a host; no rank is left behind."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    monkeypatch.setattr("zcore.comm.launch.rank_ends.SETTLE_S", 0.05)
    logging.disable(logging.ERROR)  # what torch says, as in a launcher
    made = []

    def make(num_ranks, **options):
        made.append(Host(tmp_path, num_ranks, **options))
        return made[0]

    yield make
    for each in made:
        each.agent._shutdown(signal.SIGKILL)
        each.close()
    logging.disable(logging.NOTSET)


@contextmanager
def told(capfd):
    """What is told meanwhile, as the front reads it; notes as their text."""
    found = []
    capfd.readouterr()
    yield found
    for each in LineReader().feed(capfd.readouterr().err.encode(), now_s=0.0):
        match each:
            case Ended(rank, exitcode, _):
                found.append((rank, exitcode))
            case Restarted(rank):
                found.append(("again", rank))
            case Said(rank, text):
                found.append(text if rank is None else f"[{rank}] {text}")


def test_each_look_tells_the_ends_that_are_new(host, capfd):
    ranks = host(4)
    for ended in ([], [2], [], [0, 3]):
        for rank in ended:
            ranks.end(rank, 0)
        with told(capfd) as found:
            assert ranks.look() is WorkerState.HEALTHY
        assert found == [(rank, 0) for rank in ended]
    ranks.end(1, 0)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.SUCCEEDED
    assert found == [(1, 0)]


def test_of_ends_between_two_looks_those_that_went_well_are_told_before_a_failure(host, capfd):
    ranks = host(3)
    ranks.end(0, 3)
    for rank in (1, 2):
        ranks.end(rank, 0)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
    assert found == [(1, 0), (2, 0), (0, 3)]  # the front says of 1 and 2 that they had ended by then


def test_a_rank_that_fails_for_another_ones_failure_is_told_after_it(host, capfd, monkeypatch):
    monkeypatch.setattr("zcore.comm.launch.rank_ends.SETTLE_S", 20.0)  # it returns when both have ended
    ranks = host(2)
    ranks.tell(0, f"after {ranks.pid(1)}")
    ranks.end(1, 3)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
    assert found == [(1, 3), "rank 1 failed: exit code 3; ending the others, up to 5 s", (0, 4)]


@pytest.mark.parametrize("temper", ["obedient", "sorry", "deaf"])
def test_nothing_is_told_of_ranks_that_were_ended_for_the_failure_of_another(host, capfd, monkeypatch, temper):
    if temper == "deaf":
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    ranks = host(3, temper=temper)
    ranks.end(0, 0)
    pid = ranks.pid(2)
    ranks.end(1, 3)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
        ranks.agent._stop_workers(ranks.group)  # as torch does then
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    *ends, note = found[:3]
    assert ends == [(0, 0), (1, 3)]
    assert note.startswith("rank 1 failed: exit code 3; ending the others")
    assert found[3:] == (["rank 2 did not end within 0 s: killed"] if temper == "deaf" else [])


def test_nothing_is_told_of_ranks_that_a_signal_to_the_launcher_has_ended(host, capfd):
    ranks = host(2)
    with told(capfd) as found:
        ranks.agent._shutdown(signal.SIGINT)
    assert found == []


def test_with_restarts_left_a_failure_is_a_note_and_the_last_one_is_told_with_its_end(host, capfd):
    ranks = host(2, max_restarts=1)
    ranks.end(0, 0)
    ranks.end(1, 3)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
        ranks.agent._remaining_restarts -= 1  # as torch does then
        ranks.start()
    assert found == [
        "rank 1 failed: exit code 3; restart 1 of 1 follows",
        "restart 1 of 1: the ranks of this host start again",
        ("again", 0),
        ("again", 1),
    ]
    ranks.end(1, 5)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
    assert found == [(1, 5), "rank 1 failed: exit code 5; ending the others, up to 5 s"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # torch's ends of the pipes, which are let go of
def test_what_is_left_of_a_line_when_a_rank_ends_comes_before_the_mark_of_its_next_life(host, capfd):
    ranks = host(2, max_restarts=1, logs=RankStreams())
    ranks.end(0, 0)
    ranks.end(1, "mutter 3")
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
        ranks.agent._remaining_restarts -= 1  # as torch does then
        ranks.start()
    assert found[-3:] == ["[1] cannot open data", ("again", 0), ("again", 1)], found


def test_a_rank_that_had_ended_before_another_host_asked_for_a_restart_is_told_of_again(host, capfd):
    ranks = host(2)
    ranks.end(0, 0)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.HEALTHY
    assert found == [(0, 0)]
    ranks.agent._stop_workers(ranks.group)  # as torch does when another host starts its ranks again
    ranks.start()
    ranks.end(0, 3)
    with told(capfd) as found:
        assert ranks.look() is WorkerState.FAILED
    assert (0, 3) in found
