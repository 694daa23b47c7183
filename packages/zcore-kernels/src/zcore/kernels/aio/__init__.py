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

from zcore.kernels.aio.file import File, open_file
from zcore.kernels.aio.memory import aligned_empty, crc32c, crc32c_combine
from zcore.kernels.aio.queue import FileQueue
from zcore.kernels.aio.request import Request

__all__ = ["File", "FileQueue", "Request", "aligned_empty", "crc32c", "crc32c_combine", "open_file"]
