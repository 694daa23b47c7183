"""From what ranks have recorded to a report: counts, bandwidths as nccl-tests defines them, who comes last."""

import io
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.recording.comm_report import SHOWN_RANKS, CommReport, build_report, bus_factor
from zcore.comm.recording.totals import CallRecord, Group, Kind, RankTotals, Totals, size_class
from zcore.core.quantities import shown_bytes
from zcore.core.tables import shown_rate, shown_seconds

MIB = 2**20


def group_of(size, name="dp"):
    return Group(name, tuple(range(size)))


def a_rank(rank, group, waits_s, *, span_s=0.010, held_s=0.010, op="all_gather", num_bytes=MIB, algorithm="pairwise"):
    """A rank with one call for each wait; each takes `span_s`, in which the program was held for `held_s`."""
    calls = len(waits_s)
    totals = Totals(
        num_calls=calls,
        payload_bytes=calls * num_bytes,
        num_done=calls,
        done_bytes=calls * num_bytes,
        start_s=calls * held_s - sum(waits_s),
        wait_s=sum(waits_s),
        max_wait_s=max(waits_s),
        span_s=calls * span_s,
    )
    kind = Kind(group, op, algorithm, size_class(num_bytes))
    return RankTotals(
        rank, f"host{rank // 8}", 2.0, {kind: totals}, {(op, "w"): totals}, {group: dict(enumerate(waits_s))}
    )


def drawn(report, width=80):
    """As Rich shows it, where the extra `cli` is installed."""
    console = pytest.importorskip("rich.console")
    stream = io.StringIO()
    console.Console(file=stream, width=width).print(report)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("op", "size", "factor"),
    [
        ("all_reduce", 1, 0.0),
        ("all_reduce", 2, 1.0),
        ("all_reduce", 8, 1.75),
        ("all_gather", 8, 0.875),
        ("reduce_scatter", 2, 0.5),
        ("all_to_all", 4, 0.75),
        ("broadcast", 8, 1.0),
        ("send", 8, 1.0),
        ("recv", 8, 1.0),
    ],
)
def test_the_bus_carries_what_nccl_tests_says(op, size, factor):
    assert bus_factor(op, size) == pytest.approx(factor)


def test_bandwidth_is_of_the_rank_that_took_least_and_waited_for_nobody():
    group = group_of(4)
    slow = [a_rank(rank, group, [0.009], span_s=0.020, held_s=0.020) for rank in range(3)]
    report = build_report([*slow, a_rank(3, group, [0.001], span_s=0.010, held_s=0.010)])
    (row,) = report.ops
    assert row.algorithm_bandwidth == pytest.approx(MIB / 0.010)
    assert row.bus_bandwidth == pytest.approx(0.75 * MIB / 0.010)
    assert not row.is_lower_bound
    assert row.mean_wait_s == pytest.approx((3 * 0.009 + 0.001) / 4)
    assert row.max_wait_s == 0.009
    assert row.mean_span_s == pytest.approx(0.0175)


def test_a_broadcast_takes_as_long_as_it_takes_those_who_receive():
    group = group_of(2)
    ranks = [a_rank(rank, group, [0.001], span_s=(rank + 1) * 0.01, op="broadcast") for rank in range(2)]
    assert build_report(ranks).ops[0].algorithm_bandwidth == pytest.approx(MIB / 0.02)


def test_bandwidth_is_a_lower_bound_where_the_program_computed_meanwhile():
    group = group_of(2)
    report = build_report([a_rank(rank, group, [0.001], span_s=0.010, held_s=0.002) for rank in range(2)])
    assert report.ops[0].is_lower_bound
    assert ">105M" in str(report)


def test_calls_of_one_kind_are_a_row_and_sizes_algorithms_and_groups_are_told_apart():
    one, two = group_of(2, "one"), group_of(2, "two")
    ranks = []
    for rank in range(2):
        parts = [
            a_rank(rank, one, [0.001] * 3),
            a_rank(rank, one, [0.001], num_bytes=3 * MIB),
            a_rank(rank, one, [0.001], algorithm="ring"),
            a_rank(rank, two, [0.001], op="all_reduce"),
        ]
        kinds = {kind: totals for part in parts for kind, totals in part.kinds.items()}
        ranks.append(replace(parts[0], kinds=kinds))
    rows = build_report(ranks).ops
    assert [(row.group, row.algorithm, row.op, row.size_bytes, row.num_calls, row.payload_bytes) for row in rows] == [
        ("one", "pairwise", "all_gather", 4 * MIB, 1, 3 * MIB),
        ("one", "pairwise", "all_gather", MIB, 3, 3 * MIB),
        ("one", "ring", "all_gather", MIB, 1, MIB),
        ("two", "pairwise", "all_reduce", MIB, 1, MIB),
    ]


def test_groups_of_one_name_are_one_row_and_are_compared_each_by_itself():
    left, right = Group("dp_shard", (0, 1)), Group("dp_shard", (2, 3))
    ranks = [
        a_rank(0, left, [0.030, 0.030]),
        a_rank(1, left, [0.010, 0.010]),
        a_rank(2, right, [0.001, 0.001]),
        a_rank(3, right, [0.001, 0.002]),
    ]
    report = build_report(ranks)
    (row,) = report.ops
    assert (row.num_calls, row.payload_bytes) == (2, 2 * MIB)
    assert report.num_compared == 4
    assert [rank.num_last for rank in report.ranks] == [0, 2, 1, 0]


def test_the_rank_for_which_the_others_wait_is_named():
    group = group_of(4)
    waits = {0: 0.012, 1: 0.012, 2: 0.002, 3: 0.009}
    report = build_report([a_rank(rank, group, [wait_s] * 50) for rank, wait_s in waits.items()])
    assert report.straggler == 2
    assert [rank.num_last for rank in report.ranks] == [0, 0, 50, 0]
    assert report.ranks[2].delay_s == pytest.approx(50 * 0.009)
    assert "The others wait for rank 2: last in 50 of 50 calls, by 9 ms each." in str(report)
    assert report.ranks[2].wait_share == pytest.approx(0.05)


def test_ranks_that_take_turns_in_being_last_are_no_stragglers():
    group = group_of(2)
    report = build_report([a_rank(0, group, [0.010, 0.001] * 9), a_rank(1, group, [0.001, 0.010] * 9)])
    assert report.straggler is None
    assert [rank.num_last for rank in report.ranks] == [9, 9]
    assert "No rank stands out" in str(report)


def test_what_chance_makes_is_not_called_late():
    group = group_of(2)
    report = build_report([a_rank(0, group, [0.00105] * 5), a_rank(1, group, [0.001] * 5)])
    assert report.straggler is None
    assert "No rank came last by more than 100 us in any of 5 calls." in str(report)


def test_only_calls_that_every_rank_still_knows_are_compared():
    group = group_of(2)
    first = replace(a_rank(0, group, [0.001]), waits={group: {4: 0.1, 5: 0.2, 6: 0.3}})
    second = replace(a_rank(1, group, [0.001]), waits={group: {5: 0.1, 6: 0.1, 7: 0.9}})
    report = build_report([first, second])
    assert report.num_compared == 2
    assert report.ranks[1].delay_s == pytest.approx(0.3)


def test_one_rank_alone_has_nothing_to_compare():
    report = build_report([a_rank(0, group_of(2), [0.001])])
    assert (report.num_compared, report.straggler) == (0, None)
    text = str(report)
    assert "Of this rank only, and its waits for the others count in B/s;" in text
    assert "`recording.report(dist.group.WORLD)` on every rank compares them." in text
    assert "Nothing to compare" not in text
    assert re.search(r"^ *0 +host0 +2 s +0.1% +0.5% +- +-$", text, re.MULTILINE), text  # others waited, came last


def test_calls_that_nobody_waited_for_of_all_ranks_are_not_compared():
    ranks = [replace(a_rank(rank, group_of(2), [0.001]), waits={}) for rank in range(2)]
    assert "Nothing to compare between ranks." in str(build_report(ranks))


def test_calls_that_nobody_waited_for_are_told():
    group = group_of(2)
    kind = Kind(group, "all_reduce", "ring", 4)
    ranks = [RankTotals(rank, "a", 1.0, {kind: Totals(num_calls=3, payload_bytes=12)}) for rank in range(2)]
    report = build_report(ranks)
    assert report.ops[0].num_open == 6
    assert "6 of all ranks' calls were not waited for." in str(report)


@pytest.mark.parametrize("as_shown", [str, drawn])
def test_nothing_recorded_is_said(as_shown):
    report = build_report([RankTotals(0, "a", 1.0, {})])
    assert as_shown(report).rstrip() == "No collective was recorded. Between one rank and itself there is none."


def test_the_longest_waits_are_named_by_what_they_were_for():
    group = group_of(1)
    labels = {
        ("all_gather", f"layers.{index}"): Totals(2, 8, 2, 8, wait_s=index, max_wait_s=index) for index in range(9)
    }
    report = build_report([replace(a_rank(0, group, [0.001]), labels=labels)])
    assert [row.label for row in report.labels] == [f"layers.{index}" for index in reversed(range(9))]
    assert "layers.8" in str(report) and "layers.1" not in str(report)


@pytest.mark.parametrize("as_shown", [str, drawn])
def test_the_report_reads_at_80_columns(as_shown):
    group = group_of(2, "dp_shard gather")
    ops = ("all_reduce", "reduce_scatter")
    sizes = (0, 3, 1000, 2**19 - 1, 999 * MIB)
    ranks = []
    for rank in range(2):
        parts = [a_rank(rank, group, [0.123] * 4096, span_s=0.3, op=op, num_bytes=size) for op in ops for size in sizes]
        kinds = {kind: totals for part in parts for kind, totals in part.kinds.items()}
        labels = {("reduce_scatter", "model.layers.10.mlp"): next(iter(kinds.values()))}
        ranks.append(replace(parts[0], kinds=kinds, labels=labels))
    lines = as_shown(build_report(ranks)).splitlines()
    assert max(map(len, lines)) <= 80
    for word in ("reduce_scatter", "512 KiB", "3.9 TiB", "123 ms", "model.layers.10.mlp"):
        assert any(word in line for line in lines), word


def test_of_many_ranks_those_are_shown_for_which_others_wait():
    group = group_of(1024)
    ranks = [a_rank(rank, group, [0.001 if rank == 700 else 0.010] * 3) for rank in range(1024)]
    text = str(build_report(ranks))
    assert "700  host87" in text
    assert f"and {1024 - SHOWN_RANKS} more ranks" in text
    assert "The others wait for rank 700" in text


def test_the_numbers_are_there_as_plain_data():
    report = build_report([a_rank(rank, group_of(2), [0.001]) for rank in range(2)])
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ops"][0]["num_calls"] == 1
    assert [rank["global_rank"] for rank in plain["ranks"]] == [0, 1]
    assert plain["straggler"] is None


seconds = st.floats(0, 10, allow_nan=False)
rank_totals = st.builds(
    RankTotals,
    global_rank=st.integers(0, 7),
    host=st.text(max_size=3),
    elapsed_s=seconds,
    kinds=st.dictionaries(
        st.builds(
            Kind,
            st.builds(Group, st.sampled_from("ab"), st.lists(st.integers(0, 7), min_size=1, unique=True).map(tuple)),
            st.sampled_from(["all_reduce", "send"]),
            st.text(max_size=3),
            st.sampled_from([0, 1, 1024]),
        ),
        st.builds(Totals, *([st.integers(0, 9)] * 4), *([seconds] * 4)),
    ),
    labels=st.dictionaries(st.tuples(st.sampled_from("ab"), st.text(max_size=3)), st.builds(Totals)),
    waits=st.dictionaries(
        st.builds(Group, st.sampled_from("ab"), st.just((0, 1))), st.dictionaries(st.integers(0, 9), seconds)
    ),
)


@given(rank_totals)
def test_what_a_rank_tells_arrives_as_it_was(totals):
    assert RankTotals.from_plain(json.loads(json.dumps(totals.to_plain()))) == totals


@given(st.lists(rank_totals, min_size=1, max_size=4, unique_by=lambda each: each.global_rank))
def test_whatever_ranks_tell_makes_a_report_in_any_order(ranks):
    report = build_report(ranks)
    assert isinstance(report, CommReport)
    assert str(report)
    assert sorted(row.global_rank for row in report.ranks) == [row.global_rank for row in report.ranks]
    assert build_report(ranks[::-1]) == report


@given(st.integers(0, 2**50))
def test_a_size_class_holds_its_payloads_and_no_smaller_one_does(num_bytes):
    size_bytes = size_class(num_bytes)
    assert num_bytes <= size_bytes
    assert size_bytes == 0 or size_bytes < 2 * num_bytes or size_bytes == num_bytes == 1


@given(st.floats(0, 999), st.floats(0, 1e15))
def test_units_keep_numbers_short(num_seconds, num_bytes):
    assert len(shown_seconds(num_seconds)) <= 6
    assert len(shown_rate(min(num_bytes, 999e9))) <= 5
    assert num_bytes < 0.05 or float(shown_rate(num_bytes).rstrip("kMG"))  # never as nothing
    assert len(shown_bytes(num_bytes)) <= 7


def test_totals_count_calls_and_time_those_that_are_done():
    record = CallRecord(group_of(2), "all_gather", "w", "", "float32", 100, "ring", 0, started_s=1.0)
    totals = Totals()
    totals.add_start(record)
    totals.add_start(record)
    record.issued_s, record.wait_began_s, record.done_s = 1.5, 3.0, 3.25
    totals.add_done(record)
    assert totals == Totals(2, 200, 1, 100, start_s=0.5, wait_s=0.25, max_wait_s=0.25, span_s=2.25)
    assert record.kind == Kind(group_of(2), "all_gather", "ring", 128)
