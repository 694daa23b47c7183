"""The queue: takes requests, keeps them until they are done, and tells each fault once."""

import errno
import logging
import os
import weakref
from operator import index
from types import TracebackType
from typing import Literal, Self, SupportsIndex

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, FileError, StateError
from zcore.kernels import _aio
from zcore.kernels.aio.file import File
from zcore.kernels.aio.memory import check_filled, check_flat
from zcore.kernels.aio.request import SIGNALS_S, Request, Verb

__all__ = ["FileQueue"]

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "io_uring", "threads"]

BACKENDS = {"auto": 0, "io_uring": 1, "threads": 2}  # as zcore::Backend counts them
MOST_DONE = 64  # requests that were not waited for are looked through when there are twice as many as last time


class FileQueue:
    """Reads and writes of any number of files, at most `queue_depth` blocks of `block_bytes` at a time.

    queue_depth: 1 to 4096. block_bytes: a multiple of the page size, up to 1 GiB. threads: None is 1 for io_uring,
    which waits for many blocks at a time, and 4 for threads, which wait for a block each; never above `queue_depth`.
    backend: "auto" is io_uring where the kernel and its policy allow it, else threads: see `backend` and `why_threads`.
    checksum: compute the CRC32C of each request on the way, block by block while others are under way.

    Requests for one file begin in order, files take turns, and all end in any order. Requests that touch the same
    bytes are the caller's to order, by waiting. Any thread may call. A process forked later needs a queue of its own.

    Raises ConfigError for values out of range, FileError where io_uring is asked for by name and refused.
    """

    __slots__ = ("__weakref__", "_end", "_native", "_swept", "_untold", "block_bytes", "checksum", "queue_depth")

    def __init__(
        self,
        *,
        queue_depth: int = 32,
        block_bytes: int = 1 << 20,
        threads: int | None = None,
        backend: BackendName = "auto",
        checksum: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}.")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; expected 1 to 1024, or None for as many as the backend needs.")
        for name, value in (("queue_depth", queue_depth), ("block_bytes", block_bytes), ("threads", threads or 0)):
            if not 0 <= value < 1 << 31:
                raise ConfigError(f"{name} is {value}; expected a positive number that is much smaller.")
        self.queue_depth = queue_depth
        self.block_bytes = block_bytes
        self.checksum = checksum
        try:
            native = _aio.FileQueue(queue_depth, block_bytes, threads or 0, BACKENDS[backend], checksum)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            code = error.errno or errno.EIO
            raise FileError(
                code, f'io_uring is refused here: {error.strerror}. Use backend="auto" or "threads".'
            ) from error
        self._native: _aio.FileQueue | None = native
        self._untold: dict[Request, None] = {}  # requests that nobody has waited for, in order
        self._swept = 0
        # Also where the queue is dropped or the interpreter ends: the kernel must not write to memory that is freed.
        self._end = weakref.finalize(self, _drain, native, self._untold, os.getpid())
        if native.why_threads:
            logger.info("Files are read and written by %d threads: %s", native.threads, native.why_threads)

    @property
    def backend(self) -> Literal["io_uring", "threads"]:
        """What serves it."""
        return "io_uring" if self._opened().is_io_uring else "threads"

    @property
    def why_threads(self) -> str:
        """Why the system refused io_uring; empty where it did not or was not asked."""
        return self._opened().why_threads

    @property
    def threads(self) -> int:
        """How many threads it has; with io_uring each has a ring and a share of `queue_depth`."""
        return self._opened().threads

    def read(self, file: File, into: Tensor, *, offset: int = 0) -> Request:
        """Begin to fill `into`, contiguous on the CPU, of any dtype, with bytes of `file` from `offset` (bytes) on.

        To autograd it is changed in place by this call: a backward pass that needs what stood there is refused. Raises
        LayoutError and ConfigError for what cannot be moved so, StateError where queue or file are closed, and for a
        tensor that requires grad, outside torch.no_grad().
        """
        return self._submit(file, "Reading", into, offset)

    def write(self, file: File, source: Tensor, *, offset: int = 0) -> Request:
        """Begin to write `source`, contiguous on the CPU, of any dtype, into `file` from `offset` (bytes) on.

        It is to stay as it is until the request is done. On the device it is after `File.sync`. Raises as `read`.
        """
        file.check_writable()
        return self._submit(file, "Writing", source, offset)

    def wait_all(self) -> None:
        """Return when nothing is under way. Raises the first FileError that no `wait` raised, others as its notes."""
        native = self._opened()
        _wait_all(native)
        failures = [failure for request in list(self._untold) if (failure := request.settle()) is not None]
        if failures:
            for other in failures[1:]:
                failures[0].add_note(str(other))
            raise failures[0]

    def close(self) -> None:
        """Wait for all as `wait_all` does, raising as it does, and end the threads. Closing again does nothing."""
        if self._native is None:
            return
        try:
            self.wait_all()
        finally:
            self._native = None
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except FileError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what is under way out of the block is told first

    def __repr__(self) -> str:
        state = "closed" if self._native is None else f"{self.backend}, {self.threads} threads"
        return f"FileQueue(queue_depth={self.queue_depth}, block_bytes={self.block_bytes}, {state})"

    def _opened(self) -> _aio.FileQueue:
        if self._native is None:
            raise StateError("This FileQueue was closed; expected an open one. Make another, or close it later.")
        return self._native

    def _submit(self, file: File, verb: Verb, tensor: Tensor, offset: int) -> Request:
        native, target, name = self._opened(), file.native, f"{verb} {file.path}"
        check_flat(name, tensor)
        if verb == "Reading":
            check_filled(name, tensor)
        if not isinstance(offset, SupportsIndex) or not 0 <= index(offset) < 1 << 63:
            raise ConfigError(f"{name}: offset is {offset!r}; expected a whole number of bytes, 0 to 2^63.")
        try:
            moving = native.submit(target, verb == "Writing", index(offset), tensor.data_ptr(), tensor.nbytes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except RuntimeError as error:
            raise StateError(str(error)) from error
        if verb == "Reading" and not tensor.is_inference():
            torch.autograd.graph.increment_version([tensor])
        request = Request(
            moving, self._untold, path=file.path, verb=verb, offset=offset, tensor=tensor, checksum=self.checksum
        )
        self._untold[request] = None
        self._sweep()
        return request

    def _sweep(self) -> None:
        """Forget requests that ended well and that nobody waits for, now and then, so that their tensors can go."""
        if len(self._untold) < 2 * self._swept + MOST_DONE:
            return
        for request in list(self._untold):
            if request.is_done and request.failure() is None:
                self._untold.pop(request, None)
                request.release()
        self._swept = len(self._untold)


def _wait_all(native: _aio.FileQueue) -> None:
    try:
        while not native.wait_all_for(SIGNALS_S):
            pass
    except RuntimeError as error:
        raise StateError(str(error)) from error


def _drain(native: _aio.FileQueue, untold: dict[Request, None], owner: int) -> None:
    """The end of a queue, closed or dropped. Logs what nobody was told."""
    if os.getpid() != owner:
        return  # a forked child: its parent waits
    _wait_all(native)
    for request in list(untold):
        failure = request.failure()
        if failure is not None:
            logger.error("%s Nobody waited for it.", failure)
    untold.clear()
