"""`zcore comm bench`: what it measures is right, and told whole. No test looks at a time: machines are noisy."""

import io
import json
import os

import pytest
import torch
import torch.distributed as dist

from zcore.comm.bench.contenders import COPY, OPS, SOCKETS, Case, Contender, build_contenders
from zcore.comm.bench.measure import Plan, Report, leave_out_too_large, measure, rows_of, sizes_up_to
from zcore.comm.bench.table import tables_of
from zcore.core.errors import CollectiveError, ConfigError
from zcore.core.tables import draw_tables, write_tables
from zcore.core.testing import RankFailed

CPU = torch.device("cpu")
PLAN = Plan(sizes_bytes=(1000, 200_000), rounds=2, slice_s=1e-4)  # below and above what is copied in shared memory
KINDS = {
    2: ["torch gloo", "core", "pairwise", "shared memory", "shared memory, plain tensors", SOCKETS, COPY],
    4: ["torch gloo", "core", "pairwise", "shared memory", "shared memory, plain tensors", "two levels", COPY],
}


def report_of(plan):
    return measure(dist.group.WORLD, plan, device=CPU, command="test").to_json()


@pytest.mark.parametrize("world_size", list(KINDS))
def test_every_collective_of_every_implementation_has_a_row_on_every_rank(ranks, world_size):
    texts = ranks(world_size, report_of, PLAN)
    reports = [Report.from_json(text) for text in texts]
    assert all(each.rows == reports[0].rows for each in reports)
    rows = {(row.op, row.payload_bytes, row.implementation): row for row in reports[0].rows}
    expected = {
        (op, size, kind) for op in OPS if op != "barrier" for size in (992, 200_000) for kind in KINDS[world_size]
    }
    expected |= {("barrier", 0, kind) for kind in KINDS[world_size] if kind != COPY}
    assert {(op, size - size % 16, kind) for op, size, kind in rows} == expected
    for row in rows.values():
        assert 0 < row.time_s.low <= row.time_s.median <= row.time_s.high
        assert (row.bus_bytes_per_s is None) == (row.of_copy is None) == (row.op == "barrier")
        if row.implementation == "torch gloo":
            assert row.speedup is not None and row.speedup.low == row.speedup.high == 1


def test_a_report_survives_its_file_and_says_on_what_it_was_measured(ranks):
    (text, _) = ranks(2, report_of, Plan(ops=("broadcast",), sizes_bytes=(64,), rounds=1, slice_s=1e-4))
    told, report = json.loads(text), Report.from_json(text)
    assert report.to_json() == text
    assert told["schema"] == 1 and told["world_size"] == 2 and told["backend"] == "gloo"
    assert {"processor", "cores", "memory_bytes"} <= set(told["machine"])
    assert {"python", "torch"} <= set(told["versions"])
    shown = write_tables(tables_of(report))
    assert "64 B  torch gloo" in shown
    with pytest.raises(ConfigError, match="no report"):
        Report.from_json("{}")


def wrong_contender():
    case = Case(lambda: None, lambda: dist.get_rank() != 1)  # one rank's result is wrong
    plan = Plan(ops=("broadcast",), sizes_bytes=(64,), rounds=1, slice_s=1e-4)
    broken = [Contender("broken", lambda op, size: case)]
    with pytest.raises(CollectiveError, match="broadcast of 64 bytes by broken gave a wrong result on 1 rank"):
        measure(dist.group.WORLD, plan, device=CPU, command="test", contenders=broken)


def test_an_implementation_with_a_wrong_result_has_no_times(ranks):
    ranks(2, wrong_contender)


def environment_after_building():
    os.environ["ZCORE_COMM_HOST"] = "mine"
    build_contenders(dist.group.WORLD, CPU)
    return os.environ["ZCORE_COMM_HOST"]


def test_ranks_set_apart_for_two_levels_are_put_back(ranks):
    assert ranks(4, environment_after_building) == ["mine"] * 4


def test_ratios_are_of_the_same_round():
    plain, fast, copy = rows_of(
        "reduce_scatter",
        4000,
        2,
        {"torch gloo": [4.0, 40.0], "fast": [1.0, 10.0], COPY: [0.5, 5.0]},
        plain="torch gloo",
    )
    assert plain.speedup is not None and plain.speedup.median == 1
    assert fast.speedup is not None and (fast.speedup.low, fast.speedup.high) == (4, 4)
    assert fast.of_copy is not None and fast.of_copy.median == 0.5
    assert copy.bus_bytes_per_s is not None and copy.bus_bytes_per_s.high == pytest.approx(3100)


def test_what_cannot_be_measured_is_refused():
    assert sizes_up_to(1 << 30)[-1] == 1 << 30
    with pytest.raises(ConfigError, match="Did you mean all_gather"):
        Plan(ops=("all_gahter",))
    with pytest.raises(ConfigError, match="measures nothing"):
        Plan(sizes_bytes=())


def plan_for_more_than_there_is(sizes_bytes):
    return leave_out_too_large(Plan(sizes_bytes=sizes_bytes), CPU).sizes_bytes


def test_payloads_for_which_there_is_no_memory_are_left_out(ranks):
    assert ranks(2, plan_for_more_than_there_is, (64, 1 << 40)) == [(64,)] * 2
    with pytest.raises(RankFailed, match="ConfigError: Every payload is too large"):
        ranks(2, plan_for_more_than_there_is, (1 << 40,))


def a_report(ops, sizes_bytes, *, rounds=2):
    """What a bench of 2 ranks may find, without one."""
    times_s = {name: [1e-4 * (at + 1)] * rounds for at, name in enumerate(KINDS[2])}
    rows = []
    for op in ops:
        for size in (0,) if op == "barrier" else sizes_bytes:
            ran = {name: each for name, each in times_s.items() if size or name != COPY}
            rows += rows_of(op, size, 2, ran, plain="torch gloo")
    machine = {"processor": "EPYC 7B13 64-Core Processor at 2.45 GHz", "cores": 64, "accelerator": None}
    plan = Plan(ops=ops, sizes_bytes=sizes_bytes, rounds=rounds)
    versions = {"torch": "2.13.0+cpu"}
    return Report("test", "2026", machine, versions, (0.0, 0.0), "gloo", 2, 1, plan, tuple(rows))


@pytest.mark.parametrize("ops", [("all_gather",), ("all_gather", "all_reduce", "barrier"), OPS])
@pytest.mark.parametrize("sizes_bytes", [(1024,), (1024, 4096, 16384)])
def test_a_plot_holds_all_its_words_and_lines(tmp_path, ops, sizes_bytes):
    image_of = pytest.importorskip("matplotlib.image").imread
    from zcore.comm.bench.plot import STYLES, draw_plot

    draw_plot(a_report(ops, sizes_bytes), tmp_path / "plot.png")
    image = image_of(tmp_path / "plot.png")[:, :, :3]
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 1).all()  # white: nothing is cut off
    panels = image[: image.shape[0] * 3 // 4]
    for name in KINDS[2]:
        if name in STYLES:
            colour = [int(STYLES[name][0][at : at + 2], 16) / 255 for at in (1, 3, 5)]
            assert (abs(panels - colour) < 0.01).all(axis=-1).sum() > 10, name


def test_a_table_keeps_its_numbers_where_it_is_narrow():
    console = pytest.importorskip("rich.console")
    report = a_report(("all_gather",), (1024, 1 << 30))
    for width in (80, 60):
        stream = io.StringIO()
        console.Console(file=stream, width=width).print(draw_tables(tables_of(report)[1:]))
        lines = stream.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert lines[1].split()[2:] == ["latency", "spread", "bus", "of", "copy", "speedup"]
        assert "0.50x" in lines[3] and "5.1M" in lines[2]


def test_a_single_round_has_no_spread():
    assert "-" in tables_of(a_report(("broadcast",), (64,), rounds=1))[1].rows[0]
    assert "0%" in tables_of(a_report(("broadcast",), (64,), rounds=2))[1].rows[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json", "nofolder/x.json"), "nofolder/x.json cannot be written: there is no folder nofolder. Make it"),
        (("--plot", "nofolder/x.png"), "nofolder/x.png cannot be written: there is no folder nofolder. Make it"),
        (("--json", "."), ". is a folder; expected a file"),
        (("--plot", "x.txt"), "--plot x.txt is no PNG file; expected a name that ends in .png."),
        (("--plot", "x.png", "--ops", "barrier"), "a barrier has none. Leave --plot out, or add an op."),
        (("--max-bytes", "1MB"), "'1MB' is no size; expected one such as 4KiB, 64MiB or 1GiB. Did you mean 1MiB?"),
        (("--max-bytes", "12 parsecs"), "'12 parsecs' is no size; expected one such as 4KiB, 64MiB or 1GiB."),
    ],
)
def test_what_could_not_be_written_or_drawn_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, options, message
):
    testing = pytest.importorskip("typer.testing")
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    from zcore.comm.bench.command import app

    monkeypatch.chdir(tmp_path)
    error = testing.CliRunner().invoke(app, ["bench", *options]).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_may_not_be_written_is_refused(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from zcore.comm.bench.command import app

    tmp_path.chmod(0o555)
    error = testing.CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "x.json")]).exception
    assert isinstance(error, ConfigError) and "permission denied" in str(error)


def test_the_command_starts_ranks_and_writes_table_file_and_plot(tmp_path):
    testing = pytest.importorskip("typer.testing")
    from zcore.comm.bench.command import app

    options = ["bench", "-n", "2", "--ops", "all_gather,barrier", "--max-bytes", "1KiB", "--rounds", "1"]
    try:
        import matplotlib as mpl  # noqa: F401

        options += ["--plot", str(tmp_path / "plot.png")]
    except ModuleNotFoundError:
        pass
    done = testing.CliRunner().invoke(app, [*options, "--json", str(tmp_path / "bench.json")])
    assert done.exit_code == 0, done.output
    assert "all_gather" in done.output and "shared memory" in done.output
    report = Report.from_json((tmp_path / "bench.json").read_text())
    assert {row.payload_bytes for row in report.rows} == {0, 1024}
    if "--plot" in options:
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
