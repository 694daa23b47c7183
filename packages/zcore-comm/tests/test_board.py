"""What a rank writes on its board is what the others read there."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.memory.board import BOARD_BYTES, DTYPE_CODES, OPS, RING_CALLS, Board, Entry

entries = st.builds(
    Entry,
    op=st.sampled_from(OPS),
    dtype=st.sampled_from(sorted(DTYPE_CODES, key=str)),
    numel=st.integers(0, 2**40),
    variant=st.integers(0, 1024),
    label=st.text("abcxyz.[]/ 0123", max_size=60).map(str.strip),
)


@given(st.lists(st.tuples(entries, st.integers(0, 2**40)), min_size=1, max_size=2 * RING_CALLS))
def test_the_last_calls_are_read_as_they_were_written(calls):
    memory = mmap.mmap(-1, 2 * BOARD_BYTES)
    written, read = Board(memory, BOARD_BYTES), Board(memory, BOARD_BYTES)
    for index, (entry, place) in enumerate(calls):
        assert read.started == index
        written.start(index, entry, place=place, slot=index % 7)
    for index in range(max(0, len(calls) - RING_CALLS), len(calls)):
        entry, place = calls[index]
        assert read.is_same(index, entry)
        assert (read.place_of(index), read.slot_of(index), read.stage_of(index)) == (place, index % 7, 0)
        found = read.entry(index)
        assert (found.op, found.dtype, found.numel, found.variant) == (
            entry.op,
            entry.dtype,
            entry.numel,
            entry.variant,
        )
        assert entry.label.startswith(found.label)


@pytest.mark.parametrize(
    "other",
    [
        Entry("all_gather", torch.float32, 9, 0, "a"),
        Entry("all_reduce", torch.float64, 9, 0, "a"),
        Entry("all_reduce", torch.float32, 8, 0, "a"),
        Entry("all_reduce", torch.float32, 9, 1, "a"),
        Entry("all_reduce", torch.float32, 9, 0, "b"),
    ],
)
def test_a_call_that_differs_in_anything_is_another(other):
    board = Board(mmap.mmap(-1, BOARD_BYTES), 0)
    board.start(0, Entry("all_reduce", torch.float32, 9, 0, "a"), place=0)
    assert board.is_same(0, Entry("all_reduce", torch.float32, 9, 0, "a"))
    assert not board.is_same(0, other)


def test_what_is_freed_and_how_far_a_call_has_come_are_told():
    memory = mmap.mmap(-1, BOARD_BYTES)
    written, read = Board(memory, 0), Board(memory, 0)
    written.set_freed(3, 8)
    written.set_stage(5, 2)
    written.finished = 4
    assert (read.freed(3), read.freed(4), read.stage_of(5), read.finished) == (8, 0, 2, 4)


@pytest.mark.parametrize(
    "beginning",
    ["g" * 79, "g" * 200, "\u0436" * 50, "x" + "\u0436" * 50],
    ids=lambda label: f"{len(label.encode())} bytes",
)
def test_labels_longer_than_an_entry_are_told_apart_by_their_ends(beginning):
    board = Board(mmap.mmap(-1, BOARD_BYTES), 0)
    one, other = (Entry("all_reduce", torch.float32, 9, 0, f"{beginning} and 1 more ({end})") for end in "ab")
    board.start(0, one, place=0)
    assert board.is_same(0, one)
    assert not board.is_same(0, other)
    shown, checksum = board.entry(0).label.split("...")
    assert one.label.startswith(shown) and len(shown.encode()) > 60
    assert len(checksum) == 8
