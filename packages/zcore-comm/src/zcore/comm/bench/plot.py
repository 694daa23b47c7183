"""The report of `zcore comm bench` as a picture: latency and bus bandwidth of every op over the payload, log-log."""

import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from zcore.comm.bench.contenders import COPY, SOCKETS
from zcore.comm.bench.measure import Plan, Report, Row
from zcore.core.errors import ConfigError, NotInstalledError
from zcore.core.quantities import shown_bytes
from zcore.core.tables import shown_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plot", "draw_plot", "plan_columns"]

# By implementation: told apart by those who see no colours, too (line and marker).
STYLES = {
    "core": ("#9467bd", "-", "s"),
    "pairwise": ("#1f77b4", "-", "o"),
    "shared memory": ("#2ca02c", "-", "D"),
    "shared memory, plain tensors": ("#2ca02c", "--", "d"),
    "two levels": ("#ff7f0e", "-", "^"),
    SOCKETS: ("#777777", "--", "v"),
    COPY: ("#777777", ":", "P"),
}
PLAIN_STYLE = ("#d62728", "-", "x")


# Inches. A letter's is that of matplotlib's own font at its sizes for a title and a legend, on average and a bit more.
PANEL_WIDTH, LEAST_WIDTH, HEIGHT = 3.9, 9.0, 8.2
TITLE_LETTER, LEGEND_LETTER, LEGEND_MARK = 0.095, 0.08, 0.6


def check_plot(plan: Plan, path: Path) -> None:
    """Raise ConfigError or NotInstalledError if a plot cannot be drawn: before minutes of measuring, not after."""
    if find_spec("matplotlib") is None:
        raise NotInstalledError("A plot needs matplotlib: pip install 'zcore-comm[bench]'")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path} is no PNG file; expected a name that ends in .png.")
    if set(plan.ops) == {"barrier"}:
        raise ConfigError("A plot is drawn over payloads, and a barrier has none. Leave --plot out, or add an op.")


def draw_plot(report: Report, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row.op for row in report.rows if row.payload_bytes))
    width = max(LEAST_WIDTH, PANEL_WIDTH * len(ops))
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    machine = report.machine
    title = (
        f"{report.world_size} ranks, {machine['accelerator'] or machine['processor']}, {machine['cores']} cores, "
        f"torch {report.versions['torch']}, {report.backend}, fp32; median of {report.plan.rounds} interleaved rounds"
    )
    lines = [
        line for text in (title, _told_barriers(report)) for line in textwrap.wrap(text, int(width / TITLE_LETTER))
    ]
    figure.suptitle("\n".join(lines))
    panels = figure.subplots(2, max(1, len(ops)), squeeze=False, sharex=True, sharey="row")
    for op, latency, bandwidth in zip(ops, panels[0], panels[1], strict=False):
        for name in report.implementations:
            rows = [row for row in report.rows if (row.op, row.implementation) == (op, name)]
            if rows:
                _draw_line(latency, bandwidth, rows, STYLES.get(name, PLAIN_STYLE))
        latency.set_title(op)
        bandwidth.set_xlabel("payload")
        for panel in (latency, bandwidth):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
        sizes = [row.payload_bytes for row in report.rows if row.op == op and row.implementation == report.plain]
        bandwidth.set_xticks(sizes[::2], [shown_bytes(each) for each in sizes[::2]], rotation=35)
    if ops:
        panels[0][0].set_ylabel("latency, us")
        panels[1][0].set_ylabel("bus bandwidth, GB/s")
        handles, names = panels[0][0].get_legend_handles_labels()  # every op that has a payload has them all
        ncols = plan_columns(names, width)
        figure.legend(handles, names, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # no version: the file changes only with the figures


def plan_columns(names: Sequence[str], width: float) -> int:
    """How many columns a legend of `names` may have in `width` inches; matplotlib fills one after the other.

    >>> plan_columns(["torch gloo", "core", "pairwise"], 9.0), plan_columns(["torch gloo", "core", "pairwise"], 3.0)
    (3, 2)
    """
    for ncols in range(len(names), 1, -1):
        shortest, longer = divmod(len(names), ncols)
        starts = list(accumulate([shortest + (at < longer) for at in range(ncols)], initial=0))
        columns = [names[start:end] for start, end in pairwise(starts)]
        if sum(LEGEND_MARK + LEGEND_LETTER * max(map(len, column)) for column in columns) <= width:
            return ncols
    return 1


def _draw_line(latency: "Axes", bandwidth: "Axes", rows: list[Row], style: tuple[str, str, str]) -> None:
    """One implementation: medians as a line, quartiles as a band."""
    colour, line, marker = style
    sizes = [row.payload_bytes for row in rows]
    times_s = [row.time_s for row in rows]
    rates = [row.bus_bytes_per_s for row in rows if row.bus_bytes_per_s]
    for panel, spreads, unit in ((latency, times_s, 1e6), (bandwidth, rates, 1e-9)):
        if spreads:
            medians = [each.median * unit for each in spreads]
            panel.plot(
                sizes,
                medians,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                label=rows[0].implementation,
            )
            low, high = [each.low * unit for each in spreads], [each.high * unit for each in spreads]
            panel.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)


def _told_barriers(report: Report) -> str:
    told = [
        f"{row.implementation} {shown_seconds(row.time_s.median)}"
        for row in report.rows
        if row.op == "barrier" and "plain" not in row.implementation
    ]
    return f"barrier: {', '.join(told)}" if told else ""
