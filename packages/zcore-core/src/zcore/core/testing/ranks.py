"""Run a function on several ranks: fresh processes with a process group, a deadline, and one failure for all of them.

The processes are forked from a server that has imported torch once (multiprocessing's forkserver), so two ranks cost
about 0.05 s and share no state with the caller, with each other, or with an earlier test. As under torchrun, the store
that ranks meet at lives in the launcher: its port is real and free, and outlives any rank.

    start --> all ranks returned ------------------------------> results
      |---- one failed: the others have `grace_s` to notice ---> RankFailed
      `---- `deadline_s` over: stacks asked for, ranks killed -> RankFailed
"""

import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Protocol, TypeVar

from zcore.core.errors import ConfigError
from zcore.core.testing.child import Body, Job, Raised, Returned, Stacks, main
from zcore.core.testing.report import RankFailed, RankFailure, describe_exit

__all__ = ["RunRanks", "run_ranks"]

T = TypeVar("T")

# An optimizer's first step imports torch._dynamo (3 s); the rest is what tests of training import anyway.
_PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "torch.distributed.checkpoint", "zcore.core.testing.child"]
_ANSWER_S = 2.0  # for stacks; a rank that holds the GIL never answers


class RunRanks(Protocol):
    """The type of `run_ranks` and of the fixture `ranks`."""

    def __call__(
        self,
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
        """Run `body` on every rank; return what each returned, by rank."""


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

    Once a rank failed, the others get `grace_s` seconds to notice; after `deadline_s` seconds all are killed.

    Raises RankFailed if a rank raised, died or was killed at the deadline.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    if world_size < 1:
        raise ConfigError(f"Cannot run {world_size} ranks; world_size must be 1 or more.")
    where = _locate(body)
    arguments = pickle.dumps((args, kwargs))
    with tempfile.TemporaryDirectory(prefix="zcore-ranks-") as folder, _store() as port:
        jobs = [
            Job(
                body=where,
                arguments=arguments,
                environment=_environment(rank, world_size, port),
                output_path=f"{folder}/rank{rank}",
                backend=backend if init_process_group else None,
                group_timeout_s=group_timeout_s,
            )
            for rank in range(world_size)
        ]
        outcomes = _run(jobs, deadline_s=deadline_s, grace_s=grace_s)
    results = {rank: pickle.loads(said.value) for rank, said in enumerate(outcomes) if isinstance(said, Returned)}
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]
    if failures:
        raise RankFailed(failures, results, world_size=world_size)
    return list(results.values())


class _Rank:
    """One process and what is known of it."""

    def __init__(self, rank: int, job: Job) -> None:
        context = multiprocessing.get_context("forkserver")
        self.rank = rank
        self.outcome: Returned | RankFailure | None = None  # None while the body runs
        self.stacks: Stacks | None = None
        self.exited = False
        self.may_leave = False
        self._output_path = Path(job.output_path)
        self._control, theirs = context.Pipe()
        self._listening = True
        self._process = context.Process(target=main, args=(job, theirs), name=f"rank{rank}")
        self._process.start()
        theirs.close()

    @property
    def handles(self) -> list[connection.Connection | int]:
        """What becomes ready when the rank says something or ends."""
        return [self._process.sentinel, *([self._control] if self._listening else [])]

    def tell(self, request: str) -> None:
        """Send `stacks` or `leave`; a rank that is gone hears nothing."""
        with suppress(OSError):
            self._control.send(request)

    def read(self, started_s: float) -> None:
        """Take in what the rank said, and its end."""
        exitcode = self._process.exitcode  # looked at before the pipe: what a rank says precedes its end
        try:
            while self._listening and self._control.poll():
                self._take(self._control.recv(), started_s)
        except (EOFError, OSError):
            self._listening = False
        self.exited = exitcode is not None
        if exitcode is not None and self.outcome is None:
            self.outcome = RankFailure(
                rank=self.rank,
                type_name="Died",
                message=describe_exit(exitcode),
                traceback="",
                exitcode=exitcode,
                after_s=time.monotonic() - started_s,
                output=self._output(),
            )

    def _take(self, said: Returned | Raised | Stacks, started_s: float) -> None:
        if isinstance(said, Stacks):
            self.stacks = said
        elif isinstance(said, Returned):
            self.outcome = said
        else:
            self.outcome = RankFailure(
                rank=self.rank,
                type_name=said.type_name,
                message=said.message,
                traceback=said.traceback,
                exitcode=None,
                after_s=max(0.0, said.at_s - started_s),
                last_collective=said.last_collective,
                output=self._output(),
            )

    def give_up(self, reason: str, started_s: float) -> None:
        """Record the rank as hung; where it did not answer, faulthandler writes its stacks as it aborts."""
        after_s = time.monotonic() - started_s
        if self.stacks is None:
            self._signal(signal.SIGABRT)
            self._process.join(_ANSWER_S)
            stacks = Stacks(self._output().rpartition("Fatal Python error: Aborted")[2].strip(), None)
        else:
            stacks = self.stacks
        self.outcome = RankFailure(
            rank=self.rank,
            type_name="Hung",
            message=reason,
            traceback=stacks.text,
            exitcode=None,
            after_s=after_s,
            last_collective=stacks.last_collective,
            output=self._output(),
        )

    def kill(self) -> None:
        """End the rank, and what it started if it still ran; nothing of it is left afterwards."""
        if self._process.is_alive():
            self._signal(signal.SIGKILL)
            self._process.join()
        self._process.close()
        self._control.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        for send in (os.killpg, os.kill):  # its group first; a rank killed at its start has none yet
            with suppress(ProcessLookupError):
                send(self._process.pid, number)

    def _output(self) -> str:
        return self._output_path.read_text(errors="replace") if self._output_path.exists() else ""


def _run(jobs: Sequence[Job], *, deadline_s: float, grace_s: float) -> list[Returned | RankFailure]:
    _start_server()
    ranks: list[_Rank] = []
    try:
        for rank, job in enumerate(jobs):
            ranks.append(_Rank(rank, job))
        _watch(ranks, deadline_s=deadline_s, grace_s=grace_s)
        return [rank.outcome for rank in ranks if rank.outcome is not None]
    finally:  # also on Ctrl-C
        for started in ranks:
            started.kill()


def _watch(ranks: Sequence[_Rank], *, deadline_s: float, grace_s: float) -> None:
    """Return when every rank has its outcome."""
    started_s = time.monotonic()  # after the first rank is there, and so after the server's import of torch
    limit_s, reason = started_s + deadline_s, f"still running at the deadline of {deadline_s:g} s"
    has_failure = False
    while running := [rank for rank in ranks if not rank.exited]:
        if all(rank.outcome for rank in running):
            for rank in running:
                rank.tell("leave")
                rank.may_leave = True
        handles = [handle for rank in running for handle in rank.handles]
        if not connection.wait(handles, max(0.0, limit_s - time.monotonic())):
            break
        for rank in running:
            rank.read(started_s)
        if not has_failure and any(isinstance(rank.outcome, RankFailure) for rank in running):
            has_failure = True
            if time.monotonic() + grace_s < limit_s:
                limit_s, reason = time.monotonic() + grace_s, f"still running {grace_s:g} s after a rank failed"

    hung = [rank for rank in running if rank.outcome is None]
    hung += [rank for rank in running if isinstance(rank.outcome, Returned) and rank.may_leave]  # but did not exit
    for rank in hung:
        rank.tell("stacks")
    answer_by_s = time.monotonic() + _ANSWER_S
    while (silent := [rank for rank in hung if not rank.stacks]) and (left_s := answer_by_s - time.monotonic()) > 0:
        connection.wait([handle for rank in silent for handle in rank.handles], left_s)
        for rank in silent:
            rank.read(started_s)
    for rank in hung:
        rank.give_up(reason, started_s)


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


@contextmanager
def _store() -> Iterator[int]:
    """Hold the store where ranks meet and give its port; freed at the end even if a traceback keeps the caller."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in its __all__

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


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


def _locate(body: Callable[..., object]) -> Body:
    module = inspect.getmodule(body)
    path = getattr(module, "__file__", None)
    qualname = getattr(body, "__qualname__", "<no name>")
    if module is None or path is None or "<" in qualname:
        raise ConfigError(
            f"Cannot run {body!r} on ranks: other processes find it by its file and name. Make it a function at the "
            f"top level of a module and hand it its data as arguments."
        )
    rewrite_asserts = type(module.__loader__).__name__ == "AssertionRewritingHook"
    return Body(module=module.__name__, path=path, qualname=qualname, rewrite_asserts=rewrite_asserts)
