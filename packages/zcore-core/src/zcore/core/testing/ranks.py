"""Run a function on several ranks: fresh processes with a process group, a deadline, and one failure for all of them.

The processes are forked from a server that has imported torch once (multiprocessing's forkserver), so two ranks cost
about 0.05 s and share no state with the caller, with each other, or with an earlier test. As under torchrun, the store
where ranks meet lives in the launcher: its port is real and free, and it outlives any rank.

    start --> all ranks returned -------------------------------> results
      |---- one failed: the others have `grace_s` to notice ----> RankFailed
      `---- `deadline_s` over: stacks asked for, ranks killed --> RankFailed
"""

import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from typing import TypeVar

from zcore.core.errors import ConfigError
from zcore.core.testing.child import Job, Returned
from zcore.core.testing.process import RankProcess, give_up
from zcore.core.testing.report import RankFailed, RankFailure

__all__ = ["run_ranks"]

T = TypeVar("T")

# An optimizer's first step imports torch._dynamo (3 s); the rest is what tests of training import anyway.
_PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "torch.distributed.checkpoint", "zcore.core.testing.child"]


def run_ranks(
    world_size: int,
    body: Callable[..., T],
    /,
    *args: object,
    deadline_s: float = 60.0,
    grace_s: float = 10.0,
    backend: str = "gloo",
    init_process_group: bool = True,
    group_timeout_s: float | None = None,
    **kwargs: object,
) -> list[T]:
    """Run `body(*args, **kwargs)` in `world_size` fresh processes and return what each rank returned, by rank.

    `body` is a function at the top level of a module; arguments and results are pickled: plain data, CPU tensors.
    Each rank has the environment of torchrun, one thread, a process group over `backend` (its own timeout is
    `group_timeout_s`, torch's default if None), and `sys.path` and working folder of the caller. With
    `init_process_group=False` the body calls `torch.distributed.init_process_group` itself.

    Once a rank failed, the others have `grace_s` seconds to notice; after `deadline_s` seconds all are killed.

    Raises RankFailed if a rank raised, died or was killed at the deadline.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    if world_size < 1:
        raise ConfigError(f"Cannot run {world_size} ranks; world_size must be 1 or more.")
    module, path = _locate(body)
    arguments = pickle.dumps((args, kwargs))
    with tempfile.TemporaryDirectory(prefix="zcore-ranks-") as folder, _store() as port:
        jobs = [
            Job(
                rank=rank,
                module=module,
                path=path,
                qualname=body.__qualname__,
                rewrite_asserts=type(sys.modules[module].__loader__).__name__ == "AssertionRewritingHook",
                arguments=arguments,
                environment=_environment(rank, world_size, port),
                output_path=f"{folder}/rank{rank}",
                backend=backend if init_process_group else None,
                group_timeout_s=group_timeout_s,
            )
            for rank in range(world_size)
        ]
        outcomes = _run(jobs, deadline_s=deadline_s, grace_s=grace_s)
    returned = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Returned)}
    results = {rank: pickle.loads(outcome.value) for rank, outcome in returned.items()}
    if failures := [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]:
        last_collectives = {rank: outcome.last_collective for rank, outcome in returned.items()}
        raise RankFailed(failures, results, last_collectives=last_collectives)
    return list(results.values())


def _locate(body: Callable[..., object]) -> tuple[str, str]:
    module = inspect.getmodule(body)
    path = getattr(module, "__file__", None)
    if module is None or path is None or not inspect.isfunction(body) or "<" in body.__qualname__:  # <lambda>, <locals>
        raise ConfigError(
            f"Cannot run {body!r} on ranks: other processes find it by its file and name. Make it a function at the "
            f"top level of a module and hand it its data as arguments."
        )
    return module.__name__, path


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// then joins the launcher's store, as under torchrun
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def _store() -> Iterator[int]:
    """Hold the store where ranks meet, and give its port; gone at the end even if a traceback keeps the caller."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in its __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def _start_server() -> None:
    """Start the fork server unless it runs. Warnings that are errors here would break its import of torch."""
    preload = [*_PRELOAD, "pytest"] if "pytest" in sys.modules else _PRELOAD
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    options, in_environment = sys.warnoptions, os.environ.pop("PYTHONWARNINGS", None)
    sys.warnoptions = []
    try:
        forkserver.ensure_running()
    finally:
        sys.warnoptions = options
        if in_environment is not None:
            os.environ["PYTHONWARNINGS"] = in_environment


def _run(jobs: Sequence[Job], *, deadline_s: float, grace_s: float) -> list[Returned | RankFailure]:
    _start_server()
    ranks: list[RankProcess] = []
    try:
        for job in jobs:
            ranks.append(RankProcess(job))  # noqa: PERF401 - if one does not start, those that did are ended
        started_s = time.monotonic()  # after the server's import of torch
        late, reason = _wait(ranks, started_s, deadline_s=deadline_s, grace_s=grace_s)
        give_up(late, reason)
        return [rank.outcome(started_s) for rank in ranks]
    finally:  # also on Ctrl-C
        for rank in ranks:
            rank.end()


def _wait(
    ranks: Sequence[RankProcess], started_s: float, *, deadline_s: float, grace_s: float
) -> tuple[list[RankProcess], str]:
    """Wait for every rank's last word and end; returns those that are late, and by what limit."""
    limit_s, limit = started_s + deadline_s, f"still running at the deadline of {deadline_s:g} s"
    leaving = has_failure = False
    while running := [rank for rank in ranks if not rank.exited]:
        if not leaving and all(rank.said for rank in running):
            leaving = True
            for rank in running:
                rank.tell(None)
        handles = [handle for rank in running for handle in rank.handles]
        if not connection.wait(handles, max(0.0, limit_s - time.monotonic())):
            break
        for rank in running:
            rank.read()
        if not has_failure and any(isinstance(rank.said, RankFailure) for rank in running):
            has_failure = True
            if time.monotonic() + grace_s < limit_s:
                limit_s, limit = time.monotonic() + grace_s, f"still running {grace_s:g} s after another rank failed"
    return [rank for rank in running if leaving or rank.said is None], limit
