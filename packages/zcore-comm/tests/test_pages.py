"""A process's file: regions are cut, reused and given back; exhausted memory is an error that says so."""

import mmap
import os
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch

from zcore.comm.memory import pages as pages_module
from zcore.comm.memory.pages import OutOfPagesError, Pages, file_bytes_for, map_file

MIB = 1 << 20


@pytest.fixture
def pages():
    return Pages(256 * MIB)


def test_a_region_that_is_given_back_serves_the_next_of_its_size(pages):
    first = pages.take(3 * MIB)
    pages.give_back(first)
    assert pages.take(2 * MIB) is first
    assert pages.take(2 * MIB) is not first
    assert pages.held_bytes == 5 * MIB


def test_a_region_that_is_still_read_is_not_reused(pages):
    first = pages.take(MIB)
    is_read = [True]
    first.readers["a group"] = lambda: is_read[0]
    pages.give_back(first)
    assert pages.take(MIB) is not first
    is_read[0] = False
    assert pages.take(MIB) is first


def test_the_smallest_region_that_fits_is_taken(pages):
    regions = [pages.take(size * MIB) for size in (8, 2, 4)]
    for region in regions:
        pages.give_back(region)
    assert [pages.take(3 * MIB), pages.take(MIB)] == [regions[2], regions[1]]


def test_pages_of_free_regions_go_back_to_the_system_when_a_larger_one_is_needed(pages):
    small = [pages.take(MIB) for _ in range(4)]
    for region in small:
        pages.tensor(region, MIB, torch.uint8).fill_(1)
        pages.give_back(region)
    held_before = os.fstat(pages.file).st_blocks * 512
    pages.take(32 * MIB)
    assert held_before == 4 * MIB
    assert os.fstat(pages.file).st_blocks * 512 == 32 * MIB == pages.held_bytes
    again = pages.take(MIB)  # has no pages left, and gets some
    assert pages.tensor(again, MIB, torch.uint8).sum() == 0


def test_memory_of_a_storage_is_given_back_with_its_last_tensor(pages):
    tensor = torch.empty(0).set_(pages.storage(MIB), 0, (MIB // 4,), (1,))
    region, place = pages.find(tensor[3:])
    assert place == region.offset + 12
    view = tensor[5:].view(-1)
    del tensor
    assert pages.take(MIB) is not region
    del view
    assert pages.take(MIB) is region
    assert pages.find(torch.empty(3)) is None


def test_another_mapping_of_the_file_sees_what_is_written(pages):
    region = pages.take(MIB)
    pages.tensor(region, 5, torch.int32).copy_(torch.arange(5))
    theirs = map_file(os.getpid(), pages.file, file_bytes=pages.file_bytes)
    assert torch.frombuffer(theirs, dtype=torch.int32, count=5, offset=region.offset).tolist() == [0, 1, 2, 3, 4]


def test_used_up_addresses_are_an_error_with_both_figures(pages):
    pages.take(128 * MIB)
    pages.take(64 * MIB)
    with pytest.raises(OutOfPagesError, match=r"of 0\.125 GiB was asked for, and all 0\.25 GiB of addresses"):
        pages.take(128 * MIB)


def test_memory_that_the_system_does_not_have_is_an_error_and_nothing_is_lost(pages):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    os.ftruncate(pages.file, 0)  # so that new pages make the file longer, which this limit forbids
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        kept = pages.take(MIB)
        with pytest.raises(OutOfPagesError, match=r"(?s)needs 1 MiB, and the system has not got them .* holds 1 MiB"):
            pages.take(MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    pages.take(MIB)
    assert pages.tensor(kept, MIB, torch.uint8).numel() == MIB


@pytest.mark.parametrize(("memory_bytes", "expected"), [(1, 2), (24 << 30, 64 << 30), (1 << 42, 1 << 42)])
def test_a_file_has_addresses_for_twice_the_memory_of_the_machine(memory_bytes, expected):
    assert file_bytes_for(memory_bytes) == expected
    assert file_bytes_for(24 << 30) % mmap.PAGESIZE == 0


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/user/job", "user/job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/user/job",
            "memory/user/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_what_a_control_group_has_left_counts_what_its_files_hold(tmp_path, monkeypatch, line, folder, names):
    limit, used, unused = names
    for group, most in ((folder, "unlimited"), (str(Path(folder).parent), str(100 * MIB))):  # the outer one binds
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / limit).write_text(f"{most if most != 'unlimited' else 1 << 50}\n")
        (tmp_path / group / used).write_text(f"{90 * MIB}\n")
        (tmp_path / group / "memory.stat").write_text(f"anon 1\n{unused} {30 * MIB}\n")
    own = tmp_path / "own"
    own.write_text(f"9:cpu:/elsewhere\n{line}\n")
    monkeypatch.setattr(pages_module, "OWN_GROUPS", own)
    monkeypatch.setattr(pages_module, "CGROUP", tmp_path)
    assert pages_module.available_bytes() == 40 * MIB


def files_of_threads():
    """How many files threads get that ask for this process's at the same time."""
    sys.setswitchinterval(1e-6)
    gate, found = threading.Barrier(8), []

    def ask():
        gate.wait()
        found.append(pages_module.own_pages())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return len(set(found))


def test_threads_that_come_together_get_the_file_of_their_process():
    for _ in range(8):  # without care one process in two went wrong
        child = os.fork()
        if not child:
            try:
                os._exit(files_of_threads())
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
