"""Memory for transfers, and the checksum of what lies there."""

import contextlib
import mmap

import torch
from torch import Tensor

from zcore.core.errors import LayoutError, StateError
from zcore.kernels import _aio
from zcore.kernels.ops.memory import require_memory

__all__ = ["aligned_empty", "check_filled", "check_flat", "crc32c", "crc32c_combine"]

HUGE_PAGE_BYTES = 2 << 20


def aligned_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """A flat CPU tensor of `numel` zeros that begins on a page of its own, as transfers without a copy need it.

    Its last page belongs to it alone too. Pages take memory when they are first written.

    >>> aligned_empty(5, torch.bfloat16).data_ptr() % 4096
    0
    """
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    pages = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if len(pages) >= HUGE_PAGE_BYTES:
        # The kernel pins each page for the time of a transfer: with huge ones 512 MiB were read at 2.9 GB/s rather than
        # 2.5, and written at 6.0 rather than 5.0. A hint; a kernel built without huge pages refuses it.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)  # keeps the mapping alive


def crc32c(tensor: Tensor, before: int = 0) -> int:
    """CRC32C (Castagnoli) of the bytes of `tensor`, contiguous and on the CPU, behind bytes whose checksum is `before`.

    >>> hex(crc32c(torch.frombuffer(bytearray(b"123456789"), dtype=torch.uint8)))
    '0xe3069283'
    """
    check_flat("crc32c", tensor)
    return _aio.crc32c(tensor.data_ptr(), tensor.nbytes, before)


def crc32c_combine(first: int, second: int, second_nbytes: int) -> int:
    """The checksum of two pieces end to end, from those of each and the length of the second in bytes."""
    return _aio.crc32c_combine(first, second, second_nbytes)


def check_filled(what: str, tensor: Tensor) -> None:
    """Raise StateError where autograd would not know that `tensor` is filled; `what` begins the message."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise StateError(
            f"{what} got a tensor of shape {tuple(tensor.shape)} that requires grad; expected one that does not, since "
            "a read has no gradient. Read under torch.no_grad(), or into `tensor.detach()`."
        )


def check_flat(what: str, tensor: Tensor) -> None:
    """Raise LayoutError unless `tensor` is contiguous memory of the CPU; `what` begins the message."""
    if not isinstance(tensor, Tensor):
        raise LayoutError(
            f"{what} got a {type(tensor).__name__}; expected a tensor. `torch.from_numpy` makes one of an array, of "
            "the same memory."
        )
    if not tensor.is_cpu:
        raise LayoutError(f"{what} got a tensor on {tensor.device}; expected one on the CPU. Copy it there.")
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{what} got a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected contiguous "
            "memory. Use a contiguous one, and copy from or to it."
        )
    require_memory(f"{what}: the tensor", tensor)
