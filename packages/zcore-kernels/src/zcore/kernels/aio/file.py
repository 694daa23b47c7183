"""Files for queues: opened, given room, synced and closed. native/include/zcore/file.hpp draws what goes direct."""

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from zcore.core.errors import ConfigError, FileError, StateError
from zcore.kernels import _aio
from zcore.kernels.aio.remedies import remedy

__all__ = ["File", "open_file"]

Mode = Literal["r", "r+", "w+"]

# As zcore::Access and zcore::Caching count them.
ACCESS = {"r": 0, "r+": 1, "w+": 2}
CACHING: dict[bool | str, int] = {False: 0, "auto": 1, True: 2}


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
        self.check_writable()
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

    def check_writable(self) -> None:
        """Raise StateError where it was opened to read only."""
        if self.mode == "r":
            raise StateError(f'{self.path} was opened with mode "r"; expected "r+" or "w+" to write.')

    def _fault(self, doing: str, error: OSError) -> FileError:
        code = error.errno or errno.EIO
        return FileError(code, f"{doing} failed: {os.strerror(code)}. {remedy(code)}")


def open_file(path: str | os.PathLike[str], mode: Mode = "r", *, direct: bool | Literal["auto"] = "auto") -> File:
    """Open a file for FileQueue: "r" reads, "r+" reads and writes, "w+" makes it or cuts it to nothing first.

    direct: past the page cache (O_DIRECT) where its file system has that ("auto"; `File.is_direct` says), always, or
    never. Raises FileError where it cannot be opened so, and for a folder; ConfigError for a path that cannot be one.
    """
    name = Path(path)
    if "\0" in str(name):
        raise ConfigError(f"path is {str(name)!r}; expected one without NUL, which ends a path for the system.")
    if mode not in ACCESS:
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(map(repr, ACCESS))}.")
    if direct not in CACHING:
        raise ConfigError(f'direct is {direct!r}; expected True, False or "auto".')
    try:
        if name.is_dir():  # the system would open it to read, and refuse each read
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        native = _aio.File.open(os.fsencode(name), ACCESS[mode], CACHING[direct])
    except OSError as error:
        code = error.errno or errno.EIO
        how = " with O_DIRECT" if direct is True else ""
        raise FileError(
            code, f'Opening {name} with mode "{mode}"{how} failed: {os.strerror(code)}. {remedy(code)}'
        ) from error
    return File(name, mode, native)
