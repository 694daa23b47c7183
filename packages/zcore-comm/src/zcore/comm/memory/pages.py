"""Memory that other processes of this host can map: one anonymous file per process, from which buffers are cut.

    file of rank 0   |region|region      |free  |region| ...            sparse: pages exist once they are used
    file of rank 1   |region|      ...                                  each process maps the files of its peers, whole

The files have no name (memfd), so nothing is left behind when a process ends, however it ends, and /dev/shm may be as
small as it likes. A peer opens a file through /proc/PID/fd. A region that is given back keeps its pages for the next
one, until another size needs them.
"""

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zcore.comm.sizes import check_process
from zcore.core.errors import ZcoreError

__all__ = [
    "MAX_FILE_BYTES",
    "OutOfPagesError",
    "Pages",
    "Region",
    "available_bytes",
    "file_bytes_for",
    "map_file",
    "own_pages",
    "storage_at",
]

MEMINFO, OWN_GROUPS, CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
CHECKED_BYTES = 16 << 20  # smaller regions are not worth a look at what is available
MAX_FILE_BYTES = 1 << 42  # of address space, not of memory; 16 processes that map each other still fit


class OutOfPagesError(ZcoreError, MemoryError):
    """The machine has no memory left for buffers that ranks share."""


def file_bytes_for(memory_bytes: int) -> int:
    """How long a process's file is: twice the machine's memory, as regions are never moved; only used pages count.

    >>> file_bytes_for(24 << 30) == 64 << 30
    True
    """
    return min(1 << (2 * memory_bytes - 1).bit_length(), MAX_FILE_BYTES)


@dataclass(eq=False, slots=True)
class Region:
    """A part of this process's file."""

    offset: int
    num_bytes: int
    populated_bytes: int = 0  # from the start: these have pages
    readers: dict[object, Callable[[], bool]] = field(default_factory=dict)  # group -> whether peers may still read

    def is_read(self) -> bool:
        """Whether a peer may still read what this process showed there."""
        self.readers = {group: reads for group, reads in self.readers.items() if reads()}
        return bool(self.readers)


class Pages:
    """This process's file. A forked child inherits the mapping, and may take nothing of it."""

    def __init__(self, file_bytes: int) -> None:
        self.file_bytes = file_bytes
        self.file = os.memfd_create("zcore", os.MFD_CLOEXEC)
        os.ftruncate(self.file, file_bytes)
        self.mapping = _map(self.file, file_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self._process = os.getpid()
        self._lock = threading.RLock()  # memory is given back whenever Python lets go of a tensor
        self._end = 0
        self._free: list[Region] = []
        self._of_storage: dict[int, Region] = {}  # by address
        self.held_bytes = 0  # with pages, in regions taken and free

    def take(self, num_bytes: int) -> Region:
        """A region of at least `num_bytes`, whose contents are undefined.

        Raises OutOfPagesError where the system has no memory for it.
        """
        check_process(self._process, "Memory that ranks share")
        most_bytes = 2 * _capacity(num_bytes)  # a small one is not to keep a large one from its next use
        with self._lock:
            fitting = [each for each in self._free if num_bytes <= each.num_bytes <= most_bytes and not each.is_read()]
            if fitting:
                region = min(fitting, key=lambda each: (each.num_bytes, each.offset))
                self._free.remove(region)
            else:
                self._release_pages(num_bytes)
                region = self._cut(num_bytes)
            self._populate(region, num_bytes)
        return region

    def give_back(self, region: Region) -> None:
        """Offer `region` to later calls of `take`, once its readers are done."""
        with self._lock:
            self._free.append(region)

    def tensor(self, region: Region, numel: int, dtype: torch.dtype) -> Tensor:
        """The first `numel` elements of `region`; it is not given back with the tensor."""
        return torch.frombuffer(self.mapping, dtype=dtype, count=numel, offset=region.offset)

    def storage(self, num_bytes: int) -> torch.UntypedStorage:
        """Memory of a new region, which is given back when the storage is gone, with all tensors on it."""
        region = self.take(num_bytes)
        address = self._address + region.offset
        self._of_storage[address] = region
        return storage_at(self.mapping, region.offset, num_bytes, when_gone=partial(self._reclaim, address))

    def find(self, tensor: Tensor) -> tuple[Region, int] | None:
        """The region of a tensor in memory from `storage`, and where in the file the tensor begins; else None."""
        region = self._of_storage.get(tensor.untyped_storage().data_ptr())
        return None if region is None else (region, tensor.data_ptr() - self._address)

    def _reclaim(self, address: int) -> None:
        self.give_back(self._of_storage.pop(address))

    def _cut(self, num_bytes: int) -> Region:
        capacity = _capacity(num_bytes)
        if self._end + capacity > self.file_bytes:
            raise OutOfPagesError(
                f"A shared buffer of {num_bytes / 2**30:.3g} GiB was asked for, and all {self.file_bytes / 2**30:.3g} "
                "GiB of addresses that this rank has for such buffers are used up. Free buffers that are not needed."
            )
        region = Region(self._end, capacity)
        self._end += capacity
        return region

    def _populate(self, region: Region, num_bytes: int) -> None:
        """Have the system find the pages now: written to later, memory that is not there would end the process."""
        missing_bytes = num_bytes - region.populated_bytes
        if missing_bytes <= 0:
            return
        try:
            if missing_bytes >= CHECKED_BYTES and missing_bytes > available_bytes():
                raise OSError(errno.ENOMEM, "")  # asked for it, the system would end a process to find it
            os.posix_fallocate(self.file, region.offset + region.populated_bytes, missing_bytes)
        except OSError as error:
            self.give_back(region)
            raise OutOfPagesError(
                f"A shared buffer needs {missing_bytes / 2**20:.4g} MiB, and the system has not got them "
                f"({os.strerror(error.errno or 0)}); this rank holds {self.held_bytes / 2**20:.4g} MiB in such "
                "buffers. Free memory on this host, raise its limit, or start fewer ranks."
            ) from error
        region.populated_bytes = num_bytes
        self.held_bytes += missing_bytes

    def _release_pages(self, wanted_bytes: int) -> None:
        """Give the system pages of regions that no longer fit what is asked for, so that sizes may change over time."""
        for region in sorted(self._free, key=lambda each: -each.populated_bytes):
            if wanted_bytes <= 0:
                return
            if region.populated_bytes and not region.is_read():
                _punch(self.file, region.offset, region.num_bytes)
                wanted_bytes -= region.populated_bytes
                self.held_bytes -= region.populated_bytes
                region.populated_bytes = 0


def _capacity(num_bytes: int) -> int:
    """A power of 2: serves the sizes below it, too."""
    return max(1 << (num_bytes - 1).bit_length(), mmap.PAGESIZE)


def storage_at(
    mapping: mmap.mmap, offset: int, num_bytes: int, *, when_gone: Callable[[], None]
) -> torch.UntypedStorage:
    """Memory of a mapped file as a storage of torch; `when_gone` is called when nothing refers to it any more."""
    memory = (ctypes.c_char * num_bytes).from_buffer(mapping, offset)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()  # holds `memory`, as nobody else does
    weakref.finalize(memory, when_gone).atexit = False
    return storage


def map_file(process: int, file: int, *, file_bytes: int) -> mmap.mmap:
    """Map the file of another process of this host, given its number there. Raises OSError if that is not allowed."""
    opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(opened, file_bytes)
    finally:
        os.close(opened)


def _map(file: int, file_bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(file, file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    mapping.madvise(mmap.MADV_DONTDUMP)  # a core dump has no use for it, and would take its length
    return mapping


def _punch(file: int, offset: int, num_bytes: int) -> None:
    keep_size, punch_hole = 1, 2  # FALLOC_FL_*; Python offers no fallocate with flags
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_longlong
    if libc.fallocate(file, keep_size | punch_hole, length(offset), length(num_bytes)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def available_bytes() -> int:
    """What the system, and each control group that this process is in, could give without ending a process.

    As much as there are addresses, where the system does not say.
    """
    if not MEMINFO.exists():
        return MAX_FILE_BYTES
    (line,) = (line for line in MEMINFO.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable:"))
    return min([int(line.split()[1]) << 10, *(_left_in(group) for group in _control_groups())])


def _control_groups() -> Iterator[Path]:
    """Folders of the groups that count this process's memory, of both versions, as far as a container sees them."""
    for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUP / controllers
        group = root / path.lstrip("/")
        yield from (each for each in [group, *group.parents] if each == root or root in each.parents)


def _left_in(group: Path) -> int:
    """What a group has left; what its files hold in memory can be had, too."""
    for limit, used, unused in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = (
                (group / limit).read_text(encoding="ascii").strip(),
                (group / used).read_text(encoding="ascii"),
            )
            stat = dict(each.split() for each in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except FileNotFoundError:  # of the other version, or not seen from inside a container
            continue
        if most != "max":
            return int(most) - int(taken) + int(stat.get(unused, 0))
    return MAX_FILE_BYTES


_own: dict[int, Pages] = {}  # by process: a forked child gets one of its own
_making = threading.Lock()  # two threads that meet two groups at a time would each get a file, and show it of one


def own_pages() -> Pages:
    """This process's file, made on the first call. Raises OSError where the system refuses one."""
    process = os.getpid()
    if process not in _own:
        with _making:
            if process not in _own:
                _own[process] = Pages(file_bytes_for(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return _own[process]
