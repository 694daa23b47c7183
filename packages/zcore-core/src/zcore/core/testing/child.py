"""What runs inside a rank: take on its environment, find the body, run it, tell the launcher what came of it.

    launcher -> rank    None: leave; a text: you are given up because of this, say where you stand;
                        end of file: the launcher is gone, and so is the rank
    rank -> launcher    Returned | RankFailure

A rank that returned stays until it is told to leave: its sockets live while the others still talk to it, and a rank
that waits for a collective the others never join is seen as hung, not as one that lost its connection. A rank that
raised leaves at once, as it would in a real run.
"""

import ast
import faulthandler
import importlib.util
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, ModuleType

from zcore.core.testing.report import RankFailure

__all__ = ["Job", "Returned", "main"]


@dataclass(frozen=True, slots=True)
class Job:
    """All that a rank is told at its start."""

    rank: int
    # The body is found by file: `--import-mode=importlib` gives test modules names that nothing else can import.
    module: str
    path: str
    qualname: str
    rewrite_asserts: bool  # as pytest did in the launcher: a failed `assert a == b` then shows both sides
    arguments: bytes  # pickle of (args, kwargs); needs the body's module to be loaded first
    environment: dict[str, str]
    output_path: str
    backend: str | None  # None: the body starts the process group itself
    group_timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Returned:
    """The body came to its end."""

    value: bytes  # pickle
    last_collective: str | None


def main(job: Job, launcher: Connection) -> None:
    """Run one rank to its end; exits with 1 if the body raised."""
    _enter(job)
    send_lock = threading.Lock()
    may_leave = threading.Event()
    listener = threading.Thread(target=_listen, args=(job.rank, launcher, send_lock, may_leave), daemon=True)
    listener.start()
    outcome: Returned | RankFailure
    try:
        outcome = Returned(_run(job), _last_collective())
    except BaseException as error:  # noqa: BLE001 - whatever it is, SystemExit too, the launcher reports it
        outcome = _failure(job.rank, type(error).__name__, str(error), _traceback(error))
    sys.stdout.flush()  # a last line without an end
    with send_lock:
        launcher.send(outcome)
    if isinstance(outcome, RankFailure):
        sys.exit(1)
    may_leave.wait()


def _enter(job: Job) -> None:
    os.setpgid(0, 0)  # Ctrl-C is for the launcher; and what the body starts can be killed with the rank
    output = os.open(job.output_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - by line: nothing is lost in a killed rank
    faulthandler.enable(2)  # a crash, or SIGABRT from the launcher, writes all stacks even while the GIL is held
    os.environ.clear()
    os.environ.update(job.environment)


def _run(job: Job) -> bytes:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    body = _find(job)
    args, kwargs = pickle.loads(job.arguments)
    if job.backend is not None:
        timeout = None if job.group_timeout_s is None else timedelta(seconds=job.group_timeout_s)
        dist.init_process_group(job.backend, timeout=timeout)
        dist.barrier()  # a rank that fails at once would else break the connecting of slower ones, and hide its error
    return pickle.dumps(body(*args, **kwargs))


def _find(job: Job) -> Callable[..., object]:
    found: object = sys.modules.get(job.module) or _load(job)
    for name in job.qualname.split("."):
        found = getattr(found, name)
    assert callable(found)
    return found


def _load(job: Job) -> ModuleType:
    try:
        spec = importlib.util.find_spec(job.module)
    except ModuleNotFoundError:  # pytest made the name up: there is no such package
        spec = None
    if spec is None or spec.origin != job.path:
        spec = importlib.util.spec_from_file_location(job.module, job.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[job.module] = module  # before it runs, so that its classes can be pickled by name
    for end, dot in enumerate(job.module):  # pickle imports the parents too, and pytest made those up as well
        if dot == ".":
            sys.modules.setdefault(job.module[:end], ModuleType(job.module[:end]))
    if job.rewrite_asserts:
        from _pytest.assertion.rewrite import rewrite_asserts

        source = Path(job.path).read_bytes()
        tree = ast.parse(source, filename=job.path)
        rewrite_asserts(tree, source, job.path)
        exec(compile(tree, job.path, "exec", dont_inherit=True), module.__dict__)
    else:
        spec.loader.exec_module(module)
    return module


def _listen(rank: int, launcher: Connection, send_lock: threading.Lock, may_leave: threading.Event) -> None:
    """Answer the launcher while the main thread runs the body; a wait in C++ does not hold the GIL."""
    while True:
        try:
            reason = launcher.recv()
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # nobody else would ever end this rank
        if reason is None:
            may_leave.set()
        else:
            with send_lock:
                launcher.send(_failure(rank, "Hung", reason, _stacks()))


def _failure(rank: int, type_name: str, message: str, text: str) -> RankFailure:
    # time.monotonic() is one clock for all processes of a machine; the launcher subtracts the start.
    return RankFailure(rank, type_name, message, text, None, time.monotonic(), _last_collective())


def _last_collective() -> str | None:
    collectives = sys.modules.get("zcore.core.collectives")  # not imported: this rank used none of them
    return collectives.last_collective() if collectives else None


def _traceback(error: BaseException) -> str:
    below = error.__traceback__
    while below and below.tb_next and below.tb_frame.f_code.co_filename == __file__:
        below = below.tb_next
    return "".join(traceback.format_exception(type(error), error, below))


def _stacks() -> str:
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread.ident in frames]  # the main thread is the first
    others = [thread for thread in threads if thread is not threading.current_thread()]
    return "\n".join(f"thread {thread.name}:\n{_stack(frames[thread.ident or 0])}" for thread in others)


def _stack(frame: FrameType) -> str:
    stack = traceback.extract_stack(frame)
    own = [index for index, entry in enumerate(stack) if entry.filename == __file__]
    below = stack[own[-1] + 1 :] if own else stack  # from the body on, or all if it never got there
    return "".join(traceback.format_list(below or stack))
