"""`zcore comm tune`: a table that all ranks agree on, that is read again, and that does not follow noise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from zcore.comm.bench.tune import Choice, Found, TunePlan, choose_algorithm, merge_rules, table_of, tune, write_table
from zcore.comm.pairs.algorithms import ALGORITHMS, ANY_BYTES, DEFAULT_TABLE, Rule, Table, read_table

SIZES = (256, 65_536)


def tuned():
    return tune(dist.group.WORLD, TunePlan(sizes_bytes=SIZES, rounds=2, slice_s=1e-4)).to_json()


def test_all_ranks_find_one_table_that_covers_every_size(ranks):
    texts = ranks(3, tuned)
    assert len(set(texts)) == 1
    found = Found.from_json(texts[0])
    rivals = {op for op, names in ALGORITHMS.items() if len(names) > 1}
    assert {(each.op, each.payload_bytes) for each in found.choices} == {(op, size) for op in rivals for size in SIZES}
    for each in found.choices:
        assert set(each.median_s) == set(ALGORITHMS[each.op])
        beyond = each.payload_bytes if each.payload_bytes < SIZES[-1] else 1 << 40
        assert found.table.choose(each.op, size=3, num_bytes=beyond) == each.after


def test_what_is_known_of_other_world_sizes_is_kept():
    choices = [
        Choice("all_gather", 1024, "exchange", "ring", {}),
        Choice("all_gather", 4096, "exchange", "exchange", {}),
    ]
    table = merge_rules(choices, DEFAULT_TABLE, world_size=3)
    assert Rule("all_gather", 3, 1024, "ring") in table.rules
    assert Rule("all_gather", 3, ANY_BYTES, "exchange") in table.rules
    assert set(DEFAULT_TABLE.rules) <= set(table.rules)
    for size in (2, 4, 8):
        for num_bytes in (4, 1 << 20, 1 << 30):
            for op in ALGORITHMS:
                asked = {"size": size, "num_bytes": num_bytes}
                assert table.choose(op, **asked) == DEFAULT_TABLE.choose(op, **asked)
    again = merge_rules([Choice("all_gather", 1024, "ring", "exchange", {})], table, world_size=3)
    assert [rule for rule in again.rules if rule.max_size == 3] == [Rule("all_gather", 3, ANY_BYTES, "exchange")]


@pytest.mark.parametrize(
    ("ring", "chosen"),
    [
        ([0.99, 0.99, 0.99, 0.99], "exchange"),  # faster, and hardly so
        ([0.2, 0.2, 2.0, 2.0], "exchange"),  # now and then
        ([0.5, 0.5, 0.5, 2.0], "ring"),  # three of four
        ([0.5, 0.5, 0.5, 0.5], "ring"),
    ],
)
def test_the_algorithm_in_use_stays_unless_another_wins_by_more_than_chance(ring, chosen):
    assert choose_algorithm({"exchange": [1.0] * 4, "ring": ring}, current="exchange") == chosen


def test_the_table_says_why_what_looked_faster_is_not_taken_and_that_the_machine_was_busy():
    choices = (
        Choice("all_gather", 256, "exchange", "ring", {"exchange": 2e-6, "ring": 1e-6}),
        Choice("all_gather", 512, "exchange", "exchange", {"exchange": 2e-6, "ring": 1.9e-6}),
        Choice("all_gather", 1024, "exchange", "exchange", {"exchange": 2e-6, "ring": 3e-6}),
    )
    found = Found(2, "table.json", choices, DEFAULT_TABLE, load=7.3)
    table = table_of(found)
    assert [row[-2:] for row in table.rows] == [
        ("ring", "was exchange"),
        ("exchange", "ring too unsteady, or too close"),
        ("exchange", ""),
    ]
    assert table.title == "2 ranks: 1 of 3 choices change"
    assert table.notes == ("The machine was busy before (load 7.3): quiet ones are faster, and say more.",)
    assert table_of(replace(found, load=0.5)).notes == ()
    assert Found.from_json(found.to_json()) == found


def test_a_written_table_is_the_one_that_is_read(tmp_path, monkeypatch):
    path = tmp_path / "settings" / "table.json"
    monkeypatch.setenv("ZCORE_COMM_TABLE", str(path))
    table = Table((Rule("broadcast", 2, 64, "scatter"),))
    write_table(table, path)
    read_table.cache_clear()
    assert read_table() == table
    read_table.cache_clear()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_shows_what_changes_and_writes_unless_dry(tmp_path, monkeypatch, dry):
    testing = pytest.importorskip("typer.testing")
    from zcore.comm.bench.command import app

    path = Path(tmp_path / "table.json")
    monkeypatch.setenv("ZCORE_COMM_TABLE", str(path))
    options = ["tune", "-n", "2", "--max-bytes", "256", "--rounds", "1", *(["--dry-run"] if dry else [])]
    done = testing.CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "all_reduce" in done.output
    assert path.exists() != dry
    if not dry:
        assert Table.from_json(json.dumps(json.loads(path.read_text()))).rules
