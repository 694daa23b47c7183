"""The launcher seen from a test: results, failures, deaths and hangs of real ranks, and that nothing is left."""

import ctypes
import os
import signal
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from zcore.core.errors import ConfigError
from zcore.core.testing import RankFailed, process
from zcore.core.torch_collectives import TorchCollectives

runs_in_this_process = 0


def sum_over_ranks(value, *, scale):
    tensor = torch.full((3,), value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor * scale


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_by_rank(ranks, world_size):
    results = ranks(world_size, sum_over_ranks, 1.0, scale=2.0)
    assert [rank for rank, _ in results] == list(range(world_size))
    total = 2.0 * sum(range(1, world_size + 1))
    assert all(tensor.tolist() == [total] * 3 for _, tensor in results)


@dataclass
class Point:
    x: int


def shift(point):
    return Point(point.x + dist.get_rank())


def test_classes_of_the_test_module_travel_both_ways(ranks):
    assert ranks(2, shift, Point(5)) == [Point(5), Point(6)]


def count_runs():
    global runs_in_this_process  # noqa: PLW0603 - the point of the test
    runs_in_this_process += 1
    return runs_in_this_process, os.getpid()


def test_every_call_gets_fresh_processes(ranks):
    first, second = ranks(1, count_runs), ranks(1, count_runs)
    assert first[0][0] == second[0][0] == 1
    assert first[0][1] != second[0][1]


def surroundings():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "ZCORE_TEST"]
    return [os.environ.get(name) for name in names], torch.get_num_threads(), sys.path


def test_ranks_have_the_environment_of_torchrun_and_the_path_of_the_caller(ranks, monkeypatch):
    monkeypatch.setenv("ZCORE_TEST", "set after the fork server started")
    monkeypatch.syspath_prepend("/nowhere")
    results = ranks(2, surroundings, init_process_group=False)
    for rank, (variables, num_threads, path) in enumerate(results):
        assert variables == [str(rank), "2", str(rank), "2", "127.0.0.1", "1", os.environ["ZCORE_TEST"]]
        assert num_threads == 1
        assert path[0] == "/nowhere"


def start_the_group():
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    ranks = torch.empty(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(ranks, torch.tensor([int(os.environ["RANK"])]))
    return ranks.tolist()


def test_a_body_may_start_the_process_group_itself(ranks):
    assert ranks(2, start_the_group, init_process_group=False) == [[0, 1], [0, 1]]


def warn():
    warnings.warn("only a warning", UserWarning, stacklevel=1)
    return "went on"


def test_a_warning_that_is_an_error_here_is_a_warning_in_a_rank(ranks):
    assert ranks(1, warn) == ["went on"]


def fail_on_rank_1():
    sys.stdout.write("one line\n" * 100 + f"the end of rank {dist.get_rank()}")
    if dist.get_rank() == 1:
        count = 2
        assert count == 3
    dist.all_reduce(torch.ones(1))


def test_the_failing_rank_is_reported_with_its_traceback_and_output(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, fail_on_rank_1)
    first = caught.value.first
    assert (first.rank, first.type_name, first.exitcode) == (1, "AssertionError", None)
    assert "assert 2 == 3" in first.message  # rewritten, as pytest does here
    assert "in fail_on_rank_1" in first.traceback
    assert "child.py" not in first.traceback
    report = str(caught.value)
    assert report.startswith("rank 1 of 2 failed first: AssertionError: assert 2 == 3")
    assert "\nrank 0: RuntimeError: " in report
    assert "the end of rank 1" in report
    assert "the end of rank 0" not in report  # it failed as a consequence only
    assert report.count("one line") < 50


def fail_one_after_the_other():
    if dist.get_rank() == 0:
        dist.barrier()
        raise ValueError("this came first")
    dist.barrier()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        raise KeyError("this came second") from error


def test_of_two_failures_the_earlier_is_told_in_full(ranks):
    with pytest.raises(RankFailed, match="rank 0 of 2 failed first: ValueError: this came first") as caught:
        ranks(2, fail_one_after_the_other)
    assert [failure.type_name for failure in caught.value.failures] == ["ValueError", "KeyError"]
    assert "\nrank 1: KeyError: 'this came second'" in str(caught.value)


def die_on_rank_1(how):
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL) if how == "SIGKILL" else os._exit(3)
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1))
    return "noticed"


@pytest.mark.parametrize(("how", "exitcode"), [("SIGKILL", -9), ("exit", 3)])
def test_a_rank_that_dies_is_reported_and_the_others_run_on(ranks, how, exitcode):
    message = "killed by SIGKILL" if exitcode == -9 else "exit code 3"
    with pytest.raises(RankFailed, match=f"rank 1 of 2 failed first: Died: {message}") as caught:
        ranks(2, die_on_rank_1, how)
    assert caught.value.first.exitcode == exitcode
    assert caught.value.results == {0: "noticed"}
    assert "\nrank 0: returned" in str(caught.value)


def wait_for_what_never_comes():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))
    threading.Event().wait()


def test_hung_ranks_are_killed_and_tell_where_they_stand(ranks):
    with pytest.raises(RankFailed, match=r"still running at the deadline of 0\.5 s") as caught:
        ranks(2, wait_for_what_never_comes, deadline_s=0.5)
    in_collective, in_event = caught.value.failures
    assert "dist.all_reduce(torch.ones(1))" in in_collective.traceback
    assert "threading.Event().wait()" in in_event.traceback
    assert in_collective.traceback.rstrip() in str(caught.value).replace("\n  ", "\n")


def hold_the_gil():
    ctypes.PyDLL(None).sleep(600)


def test_a_rank_that_cannot_answer_still_leaves_its_stacks(ranks, monkeypatch):
    monkeypatch.setattr(process, "ANSWER_S", 0.2)
    with pytest.raises(RankFailed) as caught:
        ranks(1, hold_the_gil, deadline_s=1.0)
    assert "in hold_the_gil" in caught.value.first.traceback


def fail_beside_a_hang():
    if dist.get_rank() == 1:
        raise ValueError("alone")
    threading.Event().wait()


def test_after_a_failure_the_others_have_the_grace_period(ranks):
    with pytest.raises(RankFailed, match="rank 1 of 2 failed first: ValueError: alone") as caught:
        ranks(2, fail_beside_a_hang, grace_s=0.2)
    hung, _ = caught.value.failures
    assert hung.message == "still running 0.2 s after another rank failed"
    assert "threading.Event().wait()" in hung.traceback


def reduce_then_wait():
    collectives = TorchCollectives(dist.group.WORLD, name="dp")
    collectives.all_reduce(torch.ones(8), label="grads.0").wait()
    if dist.get_rank() == 1:
        collectives.all_reduce(torch.ones(8), label="grads.1").wait()


def test_a_hang_names_the_last_collective_of_every_rank(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, reduce_then_wait, deadline_s=0.5)
    assert "grads.1" in caught.value.first.last_collective
    returned = next(line for line in str(caught.value).splitlines() if line.startswith("rank 0: returned after "))
    assert "grads.0" in returned


def join_only_on_rank_0():
    if dist.get_rank() == 0:
        dist.barrier()


def test_the_process_group_has_the_timeout_asked_for(ranks):
    with pytest.raises(RankFailed, match="300ms"):
        ranks(2, join_only_on_rank_0, group_timeout_s=0.3)


def interrupt_the_launcher(launcher, folder):
    (folder / str(os.getpid())).touch()
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(launcher, signal.SIGINT)
    threading.Event().wait()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_leaves_no_process_and_no_file(ranks, monkeypatch, tmp_path):
    temporary, pids = tmp_path / "temporary", tmp_path / "pids"
    temporary.mkdir()
    pids.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            ranks(2, interrupt_the_launcher, os.getpid(), pids)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(list(pids.iterdir())) == 2
    assert not any(is_running(path.name) for path in pids.iterdir())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("body", [lambda: None, Point(1), threading.Event().set])
def test_a_body_that_no_other_process_could_find_is_refused(ranks, body):
    with pytest.raises(ConfigError, match="function at the top level"):
        ranks(2, body)


def test_a_world_has_at_least_one_rank(ranks):
    with pytest.raises(ConfigError, match="Cannot run 0 ranks"):
        ranks(0, warn)
