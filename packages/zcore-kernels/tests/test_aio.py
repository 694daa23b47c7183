"""Files and queues of requests against os.pread and os.pwrite, through both backends, well and with faults."""

import errno
import gc
import os
import resource
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zcore.core.errors import ConfigError, FileError, LayoutError, StateError, ZcoreError
from zcore.kernels.aio import FileQueue, aligned_empty, crc32c, crc32c_combine, open_file

Backend = Literal["io_uring", "threads"]

PAGE = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]


def can_ring() -> bool:
    try:
        FileQueue(backend="io_uring").close()
    except FileError:
        return False
    return True


CAN_RING = can_ring()


@pytest.fixture(
    params=[
        pytest.param("io_uring", marks=pytest.mark.skipif(not CAN_RING, reason="io_uring is refused here")),
        "threads",
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture
def queue(backend: Backend) -> Iterator[FileQueue]:
    with FileQueue(queue_depth=4, block_bytes=4 * PAGE, threads=2, backend=backend, checksum=True) as queue:
        yield queue


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def at_address(tensor: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy of the bytes of `tensor` that begins `shift` bytes behind the beginning of a page."""
    copy = aligned_empty(tensor.numel() + shift, torch.uint8)[shift:]
    return copy.copy_(tensor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 20 * PAGE),
    offset=st.sampled_from([0, 1, 100, PAGE - 1, PAGE, 3 * PAGE, 5000]),
    shift=st.sampled_from([0, 8, 100]),
    block_pages=st.integers(1, 5),
    queue_depth=st.integers(1, 5),
    direct=st.booleans(),
)
@pytest.mark.parametrize("name", ["io_uring", "threads"] if CAN_RING else ["threads"])
def test_what_is_written_and_read_is_what_the_system_writes_and_reads(
    *, name: Backend, count: int, offset: int, shift: int, block_pages: int, queue_depth: int, direct: bool
) -> None:
    expected = at_address(random_bytes(count), shift)
    before = random_bytes(30 * PAGE).flip(0).numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        ours.write_bytes(before)
        theirs.write_bytes(before)
        descriptor = os.open(theirs, os.O_RDWR)
        os.pwrite(descriptor, expected.numpy().tobytes(), offset)
        with (
            open_file(ours, "r+", direct="auto" if direct else False) as file,
            FileQueue(
                queue_depth=queue_depth, block_bytes=block_pages * PAGE, threads=2, backend=name, checksum=True
            ) as queue,
        ):
            written = queue.write(file, expected, offset=offset)
            written.wait()
            assert ours.read_bytes() == theirs.read_bytes()
            found = at_address(torch.zeros_like(expected), shift)
            read = queue.read(file, found, offset=offset)
            read.wait()
        assert found.numpy().tobytes() == os.pread(descriptor, count, offset)
        os.close(descriptor)
    assert written.crc32c == read.crc32c == crc32c(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_any_dtype_and_shape_come_back(queue: FileQueue, tmp_path: Path, dtype: torch.dtype) -> None:
    source = random_bytes(7 * 123 * 8).remainder(2).view(torch.int8).to(dtype)[: 7 * 123].view(7, 123)
    found = torch.empty_like(source)
    with open_file(tmp_path / "file", "w+") as file:
        queue.write(file, source, offset=5).wait()
        queue.read(file, found, offset=5).wait()
        assert file.nbytes == 5 + source.nbytes
    assert torch.equal(source, found)


def test_many_requests_of_many_files_each_find_their_place(queue: FileQueue, tmp_path: Path) -> None:
    parts = random_bytes(200 * 1001).view(200, 1001)
    found = torch.zeros_like(parts)
    files = [open_file(tmp_path / str(index), "w+") for index in range(3)]
    for index, part in enumerate(parts):  # no one waits for these: the queue does
        queue.write(files[index % 3], part, offset=index // 3 * 1001)
    queue.wait_all()
    requests = [queue.read(files[index % 3], part, offset=index // 3 * 1001) for index, part in enumerate(found)]
    for request in reversed(requests):
        request.wait()
        assert request.is_done
    assert torch.equal(parts, found)


def test_what_is_aligned_goes_past_the_page_cache_and_files_say_so(queue: FileQueue, tmp_path: Path) -> None:
    with open_file(tmp_path / "cached", "w+", direct=False) as file:
        assert not file.is_direct
        assert file.why_buffered
        request = queue.write(file, aligned_empty(PAGE, torch.uint8))
        request.wait()
        assert request.direct_nbytes == 0
    with open_file(tmp_path / "direct", "w+") as file:
        if not file.is_direct:
            pytest.skip(file.why_buffered)
        bucket = aligned_empty(4 * file.alignment + 7, torch.uint8)
        request = queue.write(file, bucket)
        request.wait()
        assert request.direct_nbytes == 4 * file.alignment


def test_where_o_direct_is_refused_it_is_told() -> None:
    with open_file("/proc/self/status") as file:
        assert not file.is_direct
        assert "O_DIRECT" in file.why_buffered
    with pytest.raises(FileError, match=r"with O_DIRECT failed.*direct=\"auto\"") as caught:
        open_file("/proc/self/status", direct=True)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("numel", [0, 1, 7, 123, 100_000])
def test_aligned_memory_begins_on_a_page_and_is_as_long_as_asked(numel: int) -> None:
    tensor = aligned_empty(numel, torch.bfloat16)
    assert (tensor.numel(), tensor.dtype, tensor.data_ptr() % PAGE) == (numel, torch.bfloat16, 0)
    assert not tensor.any()


def test_checksums_are_those_of_the_standard_and_combine() -> None:
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    assert crc32c(digits) == 0xE3069283
    data = random_bytes(100_003)
    for cut in (0, 1, 50_000, 100_003):
        first, second = data[:cut], data[cut:]
        assert crc32c(second, crc32c(first)) == crc32c(data)
        assert crc32c_combine(crc32c(first), crc32c(second), second.nbytes) == crc32c(data)


def test_room_is_allocated_and_never_taken_back(tmp_path: Path) -> None:
    with open_file(tmp_path / "file", "w+") as file:
        file.allocate(1_000_001)
        file.allocate(0)
        file.sync()
        assert file.nbytes == 1_000_001
        assert (tmp_path / "file").stat().st_blocks * 512 >= 1_000_001
        with pytest.raises(FileError, match="Allocating"):
            file.allocate(1 << 62)


# Faults


def test_a_file_that_ends_too_soon_fails_that_read_alone(queue: FileQueue, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50_001))
    with open_file(tmp_path / "file") as file:
        cut = queue.read(file, torch.empty(60_000, dtype=torch.uint8), offset=10)
        whole = queue.read(file, torch.empty(50_001, dtype=torch.uint8))
        whole.wait()
        with pytest.raises(FileError, match=r"file at offset 10 met the end of the file at offset 50001") as caught:
            cut.wait()
        with pytest.raises(FileError):  # again
            cut.wait()
        with pytest.raises(StateError, match="no checksum"):
            _ = cut.crc32c
    assert caught.value.errno is None
    assert isinstance(caught.value, ZcoreError)


def test_a_missing_path_and_a_folder_are_told_at_once(tmp_path: Path) -> None:
    for mode in ("r", "r+"):
        with pytest.raises(FileError, match=r"missing with mode .* failed: No such file.*w\+") as caught:
            open_file(tmp_path / "missing", mode)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileError, match="Is a directory"):
        open_file(tmp_path, "r+")


def test_what_is_open_to_read_is_not_written(queue: FileQueue, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"as it was")
    with open_file(tmp_path / "file") as file:
        for write in (lambda: queue.write(file, torch.zeros(3)), lambda: file.allocate(100)):
            with pytest.raises(StateError, match=r'opened with mode "r"'):
                write()
    assert (tmp_path / "file").read_bytes() == b"as it was"


def test_a_full_device_fails_each_request_and_close_tells_those_that_nobody_waited_for(backend: Backend) -> None:
    queue = FileQueue(backend=backend)
    with open_file("/dev/full", "r+", direct=False) as file:
        first = queue.write(file, torch.ones(100_000))
        with pytest.raises(FileError, match=r"Writing 400000 bytes to /dev/full at offset 0.*No space left") as caught:
            first.wait()
        assert caught.value.errno == errno.ENOSPC
        queue.write(file, torch.ones(1))
        queue.write(file, torch.ones(2))
    with pytest.raises(FileError, match="Writing 4 bytes to /dev/full") as caught:
        queue.close()
    assert len(caught.value.__notes__) == 1
    assert "Writing 8 bytes" in caught.value.__notes__[0]
    queue.close()  # told once


def test_faults_under_way_do_not_hide_what_ended_the_block(backend: Backend) -> None:
    def fail_beside_a_fault() -> None:
        with FileQueue(backend=backend) as queue, open_file("/dev/full", "r+", direct=False) as file:
            queue.write(file, torch.ones(3))
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        fail_beside_a_fault()
    assert "No space left" in caught.value.__notes__[0]


def in_forked_child(work: Callable[[], str]) -> str:
    """What `work` returns, or the error it ends with, in a child that does nothing else."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads is the point
        child = os.fork()
    if child == 0:
        try:
            told = work()
        except BaseException as error:  # noqa: BLE001 - nothing may leave the child but by the pipe
            told = repr(error)
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:  # noqa: PTH123 - a descriptor
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return told


def test_a_write_past_the_limit_of_file_sizes_says_so(backend: Backend, tmp_path: Path) -> None:
    def write_too_much() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with open_file(tmp_path / "file", "w+") as file, FileQueue(block_bytes=4 * PAGE, backend=backend) as queue:
            queue.write(file, torch.ones(200_000, dtype=torch.uint8)).wait()
        return "written"

    told = in_forked_child(write_too_much)
    assert told.startswith("FileError(27, 'Writing 200000 bytes")
    assert "File too large. Raise the limit" in told


def test_closed_queues_and_files_refuse_by_name(backend: Backend, tmp_path: Path) -> None:
    file = open_file(tmp_path / "file", "w+")
    with FileQueue(backend=backend) as queue:
        writing = queue.write(file, torch.ones(1_000_000))
        file.close()  # goes on all the same
        with pytest.raises(StateError, match=r"file was closed"):
            queue.read(file, torch.empty(1))
    assert writing.is_done
    assert (tmp_path / "file").stat().st_size == 4_000_000
    with open_file(tmp_path / "file") as again, pytest.raises(StateError, match="FileQueue was closed"):
        queue.read(again, torch.empty(1))


def test_what_cannot_be_moved_is_refused_before_anything_is(queue: FileQueue, tmp_path: Path) -> None:
    with open_file(tmp_path / "file", "w+") as file:
        with pytest.raises(LayoutError, match="contiguous"):
            queue.write(file, torch.ones(4, 4).t())
        with pytest.raises(LayoutError, match="on meta"):
            queue.read(file, torch.empty(4, device="meta"))
        with pytest.raises(LayoutError, match="got a ndarray; expected a tensor"):
            queue.write(file, torch.ones(4).numpy())  # type: ignore[arg-type]
        for offset in (-1, 1 << 63, (1 << 63) - 8, 1.0):
            with pytest.raises(ConfigError):
                queue.write(file, torch.ones(4), offset=offset)  # type: ignore[arg-type]
        assert file.nbytes == 0


def test_bytes_that_are_not_the_values_or_not_there_are_refused_by_name(queue: FileQueue, tmp_path: Path) -> None:
    conjugated = torch.tensor([1 + 2j]).conj()
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with open_file(tmp_path / "file", "w+") as file:
        for move in (queue.write, queue.read):
            with pytest.raises(LayoutError, match="is conjugated lazily"):
                move(file, conjugated)
            with pytest.raises(LayoutError, match="is negated lazily"):
                move(file, conjugated.imag[:1].view(1))
            with pytest.raises(LayoutError, match=r"has no memory \(address 0\)"):
                move(file, freed)
        assert file.nbytes == 0
    with pytest.raises(LayoutError, match=r"crc32c: the tensor, of shape .* is conjugated"):
        crc32c(conjugated)


def test_a_backward_pass_over_what_was_read_into_since_is_refused(queue: FileQueue, tmp_path: Path) -> None:
    weight, saved = torch.ones(3, requires_grad=True), torch.ones(3)
    with open_file(tmp_path / "file", "w+") as file:
        queue.write(file, torch.full((3,), 5.0)).wait()
        loss = (weight * saved).sum()
        queue.read(file, saved).wait()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with torch.inference_mode():
            queue.read(file, torch.ones(3)).wait()  # which nothing saves


def test_a_read_into_what_requires_grad_is_refused_as_torch_refuses_to_write_there(
    queue: FileQueue, tmp_path: Path
) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    with open_file(tmp_path / "file", "w+") as file:
        queue.write(file, torch.full((3,), 5.0)).wait()
        for into in (param, param * 2.0):
            with pytest.raises(StateError, match=r"requires grad; .*torch\.no_grad\(\)"):
                queue.read(file, into)
        with torch.no_grad():
            queue.read(file, param).wait()
        queue.write(file, param, offset=12).wait()
        assert file.nbytes == 24
    assert torch.equal(param, torch.full((3,), 5.0))


def test_paths_that_the_system_would_take_for_others_are_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one without NUL"):
        open_file(f"{tmp_path}/made\0file", "w+")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match=r'with mode "r" failed: Is a directory\. Give the path of a file') as caught:
        open_file(tmp_path, "r")
    assert caught.value.errno == errno.EISDIR


@pytest.mark.parametrize(
    "setting",
    [
        *({"queue_depth": 0}, {"queue_depth": 1 << 40}, {"block_bytes": 1000}, {"block_bytes": 0}),
        *({"threads": 0}, {"threads": 2000}, {"backend": "libaio"}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} is .*expected"):
        FileQueue(**setting)


def test_checksums_and_results_are_not_to_be_had_too_early(tmp_path: Path) -> None:
    with FileQueue() as queue, open_file(tmp_path / "file", "w+") as file:
        request = queue.write(file, torch.ones(3))
        request.wait()
        with pytest.raises(StateError, match="checksum=True"):
            _ = request.crc32c


def test_a_dropped_queue_ends_what_is_under_way_and_lets_tensors_go(backend: Backend, tmp_path: Path) -> None:
    queue = FileQueue(queue_depth=1, block_bytes=PAGE, backend=backend)
    tensor = torch.full((100_000,), 7, dtype=torch.uint8)
    kept = weakref.ref(tensor)
    with open_file(tmp_path / "file", "w+") as file:
        queue.write(file, tensor)
    del tensor
    assert kept() is not None  # the kernel may read it
    del queue
    gc.collect()
    assert kept() is None
    assert (tmp_path / "file").read_bytes() == bytes([7]) * 100_000


def test_requests_that_nobody_waits_for_do_not_keep_their_tensors_for_ever(backend: Backend, tmp_path: Path) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    with FileQueue(backend=backend) as queue, open_file(tmp_path / "file", "w+") as file:
        for _ in range(500):
            tensor = torch.ones(1)
            kept.append(weakref.ref(tensor))
            request = queue.write(file, tensor)
            while not request.is_done:
                pass
        del tensor
        assert sum(each() is not None for each in kept) < 200


def test_a_forked_process_is_refused_the_queue_of_its_parent_by_name(backend: Backend, tmp_path: Path) -> None:
    tensor = torch.ones(1000)
    with open_file(tmp_path / "file", "w+") as file, FileQueue(backend=backend) as queue:
        queue.write(file, tensor).wait()

        def use_both() -> str:
            with FileQueue(backend=backend) as own:
                own.write(file, tensor, offset=4000).wait()
            for use in (queue.wait_all, lambda: queue.write(file, tensor)):
                with pytest.raises(StateError, match=r"forked process. Make one there"):
                    use()
            return "refused"

        assert in_forked_child(use_both) == "refused"
        queue.write(file, tensor, offset=8000).wait()
    assert (tmp_path / "file").read_bytes() == torch.ones(3000).numpy().tobytes()


UNCLOSED = """
import sys, torch
from zcore.kernels.aio import FileQueue, open_file
queue = FileQueue(queue_depth=1, block_bytes=4096)
queue.write(open_file(sys.argv[1], "w+"), torch.ones(1_000_000))
queue.write(open_file("/dev/full", "r+", direct=False), torch.ones(1))
"""


def test_the_end_of_python_waits_for_what_is_under_way_and_tells_its_faults(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNCLOSED, str(tmp_path / "file")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr
    assert (tmp_path / "file").read_bytes() == torch.ones(1_000_000).numpy().tobytes()
    assert "Writing 4 bytes to /dev/full" in told
