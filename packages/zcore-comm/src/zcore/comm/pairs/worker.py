"""A thread that brings the calls of one group to their end, in the order of their start.

The backend moves bytes by itself, but somebody has to add what has come, and to start the second half of a call of two
steps. Were that left to `wait()`, nothing of it would happen while the program computes. It is also the only way to
look after a missing rank while waiting: gloo's own wait cannot be interrupted, and ends every connection when it
gives up. For the same reason a worker that waits when Python ends has to be freed first, by `abort`.
"""

import atexit
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from functools import partial

from zcore.comm.progress import in_mode_of_caller

__all__ = ["Task", "Worker"]

END_S = 1.0  # how long the end of Python, or of a group, waits for a worker


class Task:
    """Something to be done; `error` is what it raised."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = in_mode_of_caller(act)
        self._claim = threading.Lock()
        self._open = threading.Lock()  # held until it is done; quicker to make than an Event, for each call anew
        self._open.acquire()
        self.error: Exception | None = None

    def run(self) -> None:
        """Do it, in the thread that comes first."""
        with self._claim:
            act, self._act = self._act, None  # what it holds is let go of as soon as it is done
        if act is None:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - passed on to whoever waits
            self.error = error
        del act
        self._open.release()

    def refuse(self, error: Exception) -> None:
        """Have it fail with `error` in place of being done, unless it was begun."""
        with self._claim:
            if self._act is not None:
                self._act = partial(_fail, error)

    def wait(self, timeout_s: float) -> bool:
        """Whether it is done within that time."""
        is_done = self._open.acquire(timeout=timeout_s)
        if is_done:
            self._open.release()  # for whoever else waits
        return is_done


def _fail(error: Exception) -> None:
    raise error


class Worker:
    """The thread. It starts with the first task and ends when nobody holds the worker any more."""

    def __init__(self, name: str, *, abort: Callable[[], None]) -> None:
        self._name = name
        self._abort = abort
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._at_work = threading.Lock()  # held by the thread while it does a task
        self._has_ended = threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def add(self, task: Task) -> None:
        """Have it done after all that was added before, unless somebody else has begun it by then."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._tasks, self._at_work, self._has_ended), name=self._name, daemon=True
            )
            self._thread.start()
            _workers.add(self)
        self._tasks.put(task)

    def abort(self) -> None:
        """End what the thread waits for, and all connections with it; what was added fails.

        What it adds up just now, which is not waiting, comes to its end first; of what is queued nothing is begun.
        """
        if not self._has_ended.is_set():
            self._has_ended.set()
            self._abort()
        if threading.current_thread() is not self._thread and self._at_work.acquire(timeout=END_S):
            self._at_work.release()

    def end(self) -> None:
        """Have the thread end; one that waits for other ranks is freed."""
        if self._thread is None:
            return
        self._tasks.put(None)
        self._thread.join(END_S / 10)
        if self._thread.is_alive():
            self.abort()
            self._thread.join(END_S)


_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()  # of this process


@atexit.register
def _end_all() -> None:
    for worker in tuple(_workers):
        with contextlib.suppress(RuntimeError):  # of gloo, which may be gone
            worker.end()


def _work(tasks: "queue.SimpleQueue[Task | None]", at_work: threading.Lock, has_ended: threading.Event) -> None:
    while (task := tasks.get()) is not None:
        with at_work:
            if has_ended.is_set():
                task.refuse(RuntimeError("gloo: the connections of this group were closed"))
            task.run()
        del task
