"""A collective on its way, and what is left to do with its result: done once, by whoever waits first.

stream 1   wait: behind the call, then `finish`, then an event
stream 2   wait: behind the call ..................... and behind the event
"""

import threading
from collections.abc import Callable

import torch

from zcore.comm.progress import in_mode_of_caller
from zcore.core.collectives import Pending
from zcore.core.errors import CollectiveError

__all__ = ["Work"]


class Work:
    """A collective on its way, as `torch.distributed.Work` to whoever waits for it."""

    __slots__ = ("_device", "_failure", "_finish", "_finished", "_lock", "_pending")

    def __init__(
        self, pending: Pending, finish: Callable[[], object] | None = None, *, device: torch.device | None = None
    ) -> None:
        """`device`: of CUDA, where the stream that is current in the first wait does what `finish` asks for, later."""
        self._pending = pending
        self._finish = finish and in_mode_of_caller(finish)
        self._device = device if device is not None and device.type == "cuda" else None
        self._finished: torch.cuda.Event | None = None
        self._failure: Exception | None = None  # that ended the call or `finish`, to be raised by every wait
        self._lock = threading.RLock()  # of several threads that wait none returns before the result is there

    def wait(self) -> bool:
        """Return True when the result is there (on CUDA: when the current stream is ordered behind it).

        Until then nobody reads or writes the tensors. Every rank waits for every call. Waiting twice is allowed. Raises
        CollectiveError if a rank died, left, or did not come before the group's timeout; MismatchError where ranks
        made different calls and that can be seen; StateError inside the block of `coalescing` that collects the call.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._pending.wait()  # each time: it orders the stream that is the current one then
            if self._finish is not None:
                self._finish_once(self._finish)
            elif self._finished is not None:
                torch.cuda.current_stream(self._device).wait_event(self._finished)
        return True

    def _finish_once(self, finish: Callable[[], object]) -> None:
        """A mean that is divided in place is not divided again, however far the first division came."""
        try:
            finish()
            if self._device is not None:  # which need not be the thread's current one
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
                self._finished = event
            self._finish = None
        except Exception as error:
            self._failure = error
            raise
        except BaseException as error:  # an interrupt, perhaps of a division that is done
            self._failure = CollectiveError(
                "This wait was interrupted when what was received was turned into the result, which is undefined. "
                "Restart."
            )
            self._failure.__cause__ = error
            raise
