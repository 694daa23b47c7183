"""What runs inside a rank: take on its environment, find the body, run it, tell the launcher what came of it.

    launcher -> rank    "stacks" | "leave"; end of file: the launcher is gone, and so is the rank
    rank -> launcher    Returned | Raised | Stacks

A rank that returned stays until it is told to leave: its sockets live while the others still talk to it, and a rank
that waits for a collective the others never join is seen as hung, not as one that lost its connection. A rank that
raised leaves at once, as it would in a real run.
"""

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
from types import CodeType, FrameType, ModuleType

__all__ = ["Body", "Job", "Raised", "Returned", "Stacks", "main"]


@dataclass(frozen=True, slots=True)
class Body:
    """Where a module-level function is found again. By file: `--import-mode=importlib` leaves no importable name."""

    module: str
    path: str
    qualname: str
    rewrite_asserts: bool  # pytest did so in the launcher: `assert a == b` then shows both sides in the rank as well


@dataclass(frozen=True, slots=True)
class Job:
    """All that a rank is told at its start."""

    body: Body
    arguments: bytes  # pickle of (args, kwargs), which needs the body's module to be loaded first
    environment: dict[str, str]
    output_path: str
    backend: str | None  # None: the body starts the process group itself
    group_timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Returned:
    """The body came to its end."""

    value: bytes  # pickle
    at_s: float  # time.monotonic(), which all processes of a machine share


@dataclass(frozen=True, slots=True)
class Raised:
    """The body, or the way to it, raised."""

    type_name: str
    message: str
    traceback: str
    at_s: float
    last_collective: str | None


@dataclass(frozen=True, slots=True)
class Stacks:
    """Where all Python threads of the rank stand."""

    text: str
    last_collective: str | None


def main(job: Job, launcher: Connection) -> None:
    """Run one rank to its end; exits with 1 if the body raised."""
    _enter(job)
    send_lock = threading.Lock()
    may_leave = threading.Event()
    threading.Thread(target=_answer, args=(launcher, send_lock, may_leave), name="zcore-rank", daemon=True).start()
    try:
        outcome: Returned | Raised = Returned(_run(job), time.monotonic())
    except BaseException as error:  # noqa: BLE001 - whatever it is, SystemExit too, the launcher reports it
        outcome = _raised(error)
    sys.stdout.flush()  # a last line without an end
    with send_lock:
        launcher.send(outcome)
    if isinstance(outcome, Raised):
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
    body = _find(job.body)
    args, kwargs = pickle.loads(job.arguments)
    if job.backend is not None:
        timeout = None if job.group_timeout_s is None else timedelta(seconds=job.group_timeout_s)
        dist.init_process_group(job.backend, timeout=timeout)
    return pickle.dumps(body(*args, **kwargs))


def _find(body: Body) -> Callable[..., object]:
    found: object = sys.modules.get(body.module) or _load(body)
    for name in body.qualname.split("."):
        found = getattr(found, name)
    assert callable(found)
    return found


def _load(body: Body) -> ModuleType:
    try:
        spec = importlib.util.find_spec(body.module)
    except ModuleNotFoundError:  # its name was made up by pytest: no such package
        spec = None
    if spec is None or spec.origin != body.path:
        spec = importlib.util.spec_from_file_location(body.module, body.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[body.module] = module  # before it runs, so that its classes can be pickled by name
    if body.rewrite_asserts:
        exec(_compile_with_rewritten_asserts(Path(body.path)), module.__dict__)
    else:
        spec.loader.exec_module(module)
    return module


def _compile_with_rewritten_asserts(path: Path) -> CodeType:
    import ast

    from _pytest.assertion.rewrite import rewrite_asserts

    source = path.read_bytes()
    tree = ast.parse(source, filename=str(path))
    rewrite_asserts(tree, source, str(path))
    return compile(tree, str(path), "exec", dont_inherit=True)


def _answer(launcher: Connection, send_lock: threading.Lock, may_leave: threading.Event) -> None:
    """Answer the launcher while the main thread runs the body; a wait in C++ does not hold the GIL."""
    while True:
        try:
            request = launcher.recv()
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # the launcher is gone: nobody would ever end this rank
        if request == "leave":
            may_leave.set()
        else:
            stacks = Stacks(_stacks(), _last_collective())
            with send_lock:
                launcher.send(stacks)


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    main_ident = threading.main_thread().ident
    idents = sorted(frames.keys() - {threading.get_ident()}, key=lambda ident: ident != main_ident)
    return "\n".join(f"thread {names.get(ident, ident)}:\n{_stack(frames[ident])}" for ident in idents)


def _stack(frame: FrameType) -> str:
    stack = traceback.extract_stack(frame)
    own = [index for index, entry in enumerate(stack) if entry.filename == __file__]
    below = stack[own[-1] + 1 :] if own else stack  # from the body on; all of it if it never got there
    return "".join(traceback.format_list(below or stack))


def _raised(error: BaseException) -> Raised:
    at_s = time.monotonic()
    below = error.__traceback__
    while below and below.tb_next and below.tb_frame.f_code.co_filename == __file__:
        below = below.tb_next
    text = "".join(traceback.format_exception(type(error), error, below))
    return Raised(type(error).__name__, str(error), text, at_s, _last_collective())


def _last_collective() -> str | None:
    collectives = sys.modules.get("zcore.core.collectives")  # not imported: this rank used none of them
    describe = getattr(collectives, "last_collective", None)
    return describe() if describe else None
