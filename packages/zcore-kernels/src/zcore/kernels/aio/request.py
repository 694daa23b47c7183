"""One read or write: whether it is done, how it ended, and what it keeps alive until then."""

import os
from pathlib import Path
from typing import Literal

from torch import Tensor

from zcore.core.errors import FileError, StateError
from zcore.kernels import _aio
from zcore.kernels.aio.remedies import remedy

__all__ = ["SIGNALS_S", "Request", "Verb"]

Verb = Literal["Reading", "Writing"]

SIGNALS_S = 0.2  # how long a wait may keep Python from handling Ctrl-C


class Request:
    """A read or a write under way, made by `FileQueue.read` and `write`."""

    __slots__ = ("__weakref__", "_checksum", "_native", "_path", "_tensor", "_untold", "_verb", "nbytes", "offset")

    def __init__(
        self,
        native: _aio.Request,
        untold: "dict[Request, None]",
        *,
        path: Path,
        verb: Verb,
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
        error = self.settle()
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

    def release(self) -> None:
        """Let go of the tensor. To be called when it is done."""
        self._tensor = None

    def _check_done(self, asked: str) -> None:
        if not self.is_done:
            raise StateError(f"`{asked}` was asked of a request under way; expected one that is done. Wait for it.")

    def settle(self) -> FileError | None:
        """Wait, and give the failure rather than raise it; the queue then knows it as told."""
        try:
            while not self._native.wait_for(SIGNALS_S):
                pass
        except RuntimeError as error:
            raise StateError(str(error)) from error
        self._untold.pop(self, None)
        self.release()
        return self.failure()

    def failure(self) -> FileError | None:
        """How it failed; None where it did not. To be asked when it is done."""
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
        return FileError(code, f"{doing} failed at offset {at}: {os.strerror(code)}. {remedy(code)}")
