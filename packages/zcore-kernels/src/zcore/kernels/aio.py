"""Reads and writes between tensors and files, many at a time, while the program goes on.

    with open_file("bucket.bin", "w+") as file, FileQueue(queue_depth=32, checksum=True) as queue:
        file.allocate(bucket.nbytes)
        request = queue.write(file, bucket)     # returns at once; `bucket` is to be left alone until wait()
        ...
        request.wait()                          # raises FileError, which says what failed where
        request.crc32c

    request    |head|block_bytes|block_bytes|...|tail|     as native/include/zcore/file_queue.hpp draws it
    under way        [ up to queue_depth blocks ]

A request keeps its tensor alive until it is done, and the queue keeps each request until then: both may be dropped.
What is aligned goes past the page cache without a copy where the file system allows it: `aligned_empty` makes tensors
that are. Faults are raised by `Request.wait`, and those of requests that nobody waited for by `wait_all` and `close`.
"""

import errno
import logging
import mmap
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, FileError, LayoutError, StateError
from zcore.kernels import _aio

__all__ = ["File", "FileQueue", "Request", "aligned_empty", "crc32c", "crc32c_combine", "open_file"]

logger = logging.getLogger(__name__)

Mode = Literal["r", "r+", "w+"]
BackendName = Literal["auto", "io_uring", "threads"]

# As zcore::Access, zcore::Caching and zcore::Backend count them.
ACCESS = {"r": 0, "r+": 1, "w+": 2}
CACHING: dict[bool | str, int] = {False: 0, "auto": 1, True: 2}
BACKENDS = {"auto": 0, "io_uring": 1, "threads": 2}

SIGNALS_S = 0.2  # how long a wait may keep Python from handling Ctrl-C
MOST_DONE = 64  # requests that were not waited for are looked through when there are twice as many as last time

REMEDIES = {
    errno.ENOENT: 'Check the path; mode "w+" makes a file.',
    errno.EACCES: "Check the permissions of the file and of its folders.",
    errno.EROFS: "Its file system is mounted read-only; choose another path.",
    errno.ENOSPC: "Free space there, or choose another path; `File.allocate` reserves room before work begins.",
    errno.EDQUOT: "Free some of the quota there, or choose another path.",
    errno.EFBIG: "Raise the limit of file sizes (`ulimit -f`), or use a file system with longer files.",
    errno.EIO: "The device failed; the kernel's log (dmesg) says how.",
    errno.EMFILE: "Close files, or raise the limit of open ones (`ulimit -n`).",
    errno.EINVAL: 'Its file system may lack O_DIRECT: pass direct="auto" or False.',
}


def _remedy(code: int) -> str:
    return REMEDIES.get(code, f"errno is {errno.errorcode.get(code, code)}; see `man 2 pread` and `man 2 pwrite`.")


def aligned_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """A flat CPU tensor of `numel` zeros that begins on a page of its own, as transfers without a copy need it.

    Its last page belongs to it alone too. Pages take memory when they are first written.

    >>> aligned_empty(5, torch.bfloat16).data_ptr() % 4096
    0
    """
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    pages = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)  # keeps the mapping alive


def crc32c(tensor: Tensor, before: int = 0) -> int:
    """CRC32C (Castagnoli) of the bytes of `tensor`, contiguous and on the CPU, behind bytes whose checksum is `before`.

    >>> hex(crc32c(torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8)))
    '0xe3069283'
    """
    _check_flat("crc32c", tensor)
    return _aio.crc32c(tensor.data_ptr(), tensor.nbytes, before)


def crc32c_combine(first: int, second: int, second_nbytes: int) -> int:
    """The checksum of two pieces end to end, from those of each and the length of the second in bytes."""
    return _aio.crc32c_combine(first, second, second_nbytes)


def _check_flat(what: str, tensor: Tensor) -> None:
    if not tensor.is_cpu:
        raise LayoutError(f"{what} got a tensor on {tensor.device}; expected one on the CPU. Copy it there.")
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{what} got a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected contiguous "
            "memory. Use a contiguous one, and copy from or to it."
        )


class File:
    """A file for FileQueue, made by `open_file`; closed by `close` or the end of `with`, once its requests are done."""

    __slots__ = ("_native", "mode", "path")

    def __init__(self, path: Path, mode: Mode, native: _aio.File) -> None:
        self.path = path
        self.mode = mode
        self._native: _aio.File | None = native

    @property
    def native(self) -> _aio.File:
        """The compiled file. Raises StateError when closed."""
        if self._native is None:
            raise StateError(f"{self.path} was closed; expected an open file. Open it again, or close it later.")
        return self._native

    @property
    def is_direct(self) -> bool:
        """Whether what is aligned goes past the page cache (O_DIRECT)."""
        return self.native.is_direct

    @property
    def why_buffered(self) -> str:
        """Why it is not direct; empty where it is."""
        return self.native.why_buffered

    @property
    def alignment(self) -> int:
        """Bytes; address, offset and length that are multiples of it go direct. 1 where the file is not direct."""
        return self.native.alignment

    @property
    def nbytes(self) -> int:
        """Its length now."""
        return self.native.size()

    def allocate(self, nbytes: int) -> None:
        """Reserve room for `nbytes` from the beginning, so that writes there cannot meet a full disk.

        The file is then at least so long; new bytes are zero. Writes into allocated room are faster also, since they
        do not move the end of the file. Raises FileError, such as for a full disk.
        """
        self._check_writable()
        if nbytes < 0:
            raise ConfigError(f"{self.path} was to be allocated {nbytes} bytes; expected 0 or more.")
        try:
            self.native.allocate(nbytes)
        except OSError as error:
            raise self._fault(f"Allocating {nbytes} bytes of {self.path}", error) from error

    def sync(self) -> None:
        """Return when all that was written is on the device (fdatasync). Wait for its requests before."""
        try:
            self.native.sync()
        except OSError as error:
            raise self._fault(f"Syncing {self.path}", error) from error

    def close(self) -> None:
        """Close; requests under way go on, and the file descriptors with them."""
        self._native = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._native is None else "direct" if self.is_direct else "page cache"
        return f"File({str(self.path)!r}, {self.mode!r}, {state})"

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise StateError(f'{self.path} was opened with mode "r"; expected "r+" or "w+" to write.')

    def _fault(self, doing: str, error: OSError) -> FileError:
        code = error.errno or errno.EIO
        return FileError(code, f"{doing} failed: {os.strerror(code)}. {_remedy(code)}")


def open_file(path: str | os.PathLike[str], mode: Mode = "r", *, direct: bool | Literal["auto"] = "auto") -> File:
    """Open a file for FileQueue: "r" reads, "r+" reads and writes, "w+" makes it or cuts it to nothing first.

    direct: past the page cache (O_DIRECT) where its file system has that ("auto"; `File.is_direct` says), always, or
    never. Raises FileError where it cannot be opened so.
    """
    name = Path(path)
    if mode not in ACCESS:
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(map(repr, ACCESS))}.")
    if direct not in CACHING:
        raise ConfigError(f'direct is {direct!r}; expected True, False or "auto".')
    try:
        native = _aio.File.open(os.fsencode(name), ACCESS[mode], CACHING[direct])
    except OSError as error:
        code = error.errno or errno.EIO
        how = " with O_DIRECT" if direct is True else ""
        raise FileError(
            code, f'Opening {name} with mode "{mode}"{how} failed: {os.strerror(code)}. {_remedy(code)}'
        ) from error
    return File(name, mode, native)


class Request:
    """A read or a write under way, made by `FileQueue.read` and `write`."""

    __slots__ = ("__weakref__", "_checksum", "_native", "_path", "_tensor", "_untold", "_verb", "nbytes", "offset")

    def __init__(
        self,
        native: _aio.Request,
        untold: "dict[Request, None]",
        *,
        path: Path,
        verb: Literal["Reading", "Writing"],
        offset: int,
        tensor: Tensor,
        checksum: bool,
    ) -> None:
        self.nbytes = tensor.nbytes
        self.offset = offset  # bytes, in the file
        self._native = native
        self._untold = untold
        self._path = path
        self._verb = verb
        self._tensor: Tensor | None = tensor  # kept alive while the kernel uses its memory
        self._checksum = checksum

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not; does not wait."""
        return self._native.is_done

    def wait(self) -> None:
        """Return when it is done. Raises FileError where it failed, each time it is called.

        Ctrl-C interrupts the wait, not the request.
        """
        error = self._wait()
        if error is not None:
            raise error

    @property
    def crc32c(self) -> int:
        """CRC32C of all bytes that it moved. Raises StateError before it is done or where none was asked for."""
        if not self._checksum:
            raise StateError("This queue computes no checksums; expected FileQueue(checksum=True).")
        self._check_done("crc32c")
        if self._native.error != 0:
            raise StateError(f"{self._verb} {self._path} failed, so there is no checksum; `wait` says how.")
        return self._native.crc32c

    @property
    def direct_nbytes(self) -> int:
        """How many bytes went past the page cache, without a copy. Raises StateError before it is done."""
        self._check_done("direct_nbytes")
        return self._native.direct_nbytes

    def _check_done(self, asked: str) -> None:
        if not self.is_done:
            raise StateError(f"`{asked}` was asked of a request under way; expected one that is done. Wait for it.")

    def _wait(self) -> FileError | None:
        try:
            while not self._native.wait_for(SIGNALS_S):
                pass
        except RuntimeError as error:
            raise StateError(str(error)) from error
        self._untold.pop(self, None)
        self._tensor = None
        return self._failure()

    def _failure(self) -> FileError | None:
        code, at = self._native.error, self._native.failed_offset
        if code == 0:
            return None
        way = "from" if self._verb == "Reading" else "to"
        doing = f"{self._verb} {self.nbytes} bytes {way} {self._path} at offset {self.offset}"
        if code == _aio.END_OF_FILE:
            return FileError(
                f"{doing} met the end of the file at offset {at}; expected {self.offset + self.nbytes} bytes or more. "
                "It was cut short or never written to its end: write it again, or read less."
            )
        return FileError(code, f"{doing} failed at offset {at}: {os.strerror(code)}. {_remedy(code)}")


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

        Raises LayoutError and ConfigError for what cannot be moved so, StateError where queue or file are closed.
        """
        return self._submit(file, "Reading", into, offset)

    def write(self, file: File, source: Tensor, *, offset: int = 0) -> Request:
        """Begin to write `source`, contiguous on the CPU, of any dtype, into `file` from `offset` (bytes) on.

        It is to stay as it is until the request is done. On the device it is after `File.sync`. Raises as `read`.
        """
        file._check_writable()
        return self._submit(file, "Writing", source, offset)

    def wait_all(self) -> None:
        """Return when nothing is under way. Raises the first FileError that no `wait` raised, with others as its notes."""
        native = self._opened()
        _wait_all(native)
        failures = [failure for request in list(self._untold) if (failure := request._wait()) is not None]
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

    def _submit(self, file: File, verb: Literal["Reading", "Writing"], tensor: Tensor, offset: int) -> Request:
        native, target, name = self._opened(), file.native, f"{verb} {file.path}"
        _check_flat(name, tensor)
        if not 0 <= offset < 1 << 63:
            raise ConfigError(f"{name}: offset is {offset}; expected 0 to 2^63 bytes.")
        try:
            moving = native.submit(target, verb == "Writing", offset, tensor.data_ptr(), tensor.nbytes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except RuntimeError as error:
            raise StateError(str(error)) from error
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
            if request.is_done and request._native.error == 0:
                self._untold.pop(request, None)
                request._tensor = None
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
        failure = request._failure()
        if failure is not None:
            logger.error("%s Nobody waited for it.", failure)
    untold.clear()
