"""The doctor's words on zcore-comm are those of this machine, and follow what is set."""

import pytest

from zcore.comm.findings import find
from zcore.comm.memory import pages
from zcore.comm.pairs import algorithms
from zcore.comm.ranks import meeting


@pytest.fixture(autouse=True)
def _no_table(tmp_path, monkeypatch):
    monkeypatch.setenv("ZCORE_COMM_TABLE", str(tmp_path / "table.json"))
    algorithms.read_table.cache_clear()
    yield
    algorithms.read_table.cache_clear()


def found():
    return {each.case: each for each in find()}


def test_shared_memory_serves_one_host_and_pairs_what_is_uneven():
    assert found()["one host"].served_by.startswith("shared memory (")
    assert "built-in table" in found()["other ranks"].served_by


def test_memory_is_not_told_where_the_system_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MEMINFO", tmp_path / "none")
    assert found()["one host"].served_by == "shared memory"


def test_a_machine_that_cannot_share_says_why(monkeypatch):
    monkeypatch.setattr(meeting, "is_store_order_kept", lambda: False)
    assert found()["one host"].served_by.startswith("pairs")
    assert "does not keep the order of stores" in found()["one host"].otherwise


def test_ranks_set_apart_are_told(monkeypatch):
    monkeypatch.setenv("ZCORE_COMM_HOST", "left")
    assert "$ZCORE_COMM_HOST is set" in found()["one host"].otherwise


def test_a_measured_table_is_named_and_a_broken_one_too(tmp_path):
    path = algorithms.table_path()
    path.write_text(algorithms.DEFAULT_TABLE.to_json())
    assert str(path) in found()["other ranks"].served_by
    path.write_text("{")
    algorithms.read_table.cache_clear()
    assert found()["other ranks"].served_by.startswith("nothing: all refuse their table")
