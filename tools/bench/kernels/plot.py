"""The picture of tools/bench/kernels_cpu.py: the share of memory's speed that each step and each op reaches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

ROW_IN = 0.21  # inches
LIMIT = "memory"

Rows = dict[str, dict[str, Mapping[str, float]]]  # by what is done, by who does it: a median and quartiles


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {title: rows for title, rows in _panels(report).items() if rows}
    heights = [ROW_IN * len(rows) + 0.9 for rows in panels.values()]
    figure = Figure(figsize=(11.0, sum(heights) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    warning = "" if report["is_benchmark"] else ". TEST SIZE, NO BENCHMARK"
    machine, torch_version = report["machine"], report["versions"]["torch"]
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores, torch {torch_version}{warning}", fontsize=10)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, rows) in zip(axes, panels.items(), strict=True):
        _draw(panel, rows)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(f"of memory's speed; median and quartiles of {report['rounds']} rounds", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _panels(report: Mapping[str, Any]) -> dict[str, Rows]:
    panels: dict[str, Rows] = {}
    for part, title in (("states", "AdamW, fp32 gradient"), ("update", "AdamW, bf16 gradient in and bf16 copy out")):
        panels[title] = {
            f"{row['numel'] / 1e6:g} M in {row['pieces']}, threads {row['threads']}": {
                name: each["of_memory"] for name, each in row[part].items()
            }
            for row in report["steps"]
        }
    ops: Rows = {}
    for row in report["ops"]:
        if row["contender"] != LIMIT:
            ops.setdefault(f"{row['op']}, {row['dtype']}", {})[row["contender"]] = row["of_limit"]
    return panels | {"Ops": ops}


def _draw(panel: Any, rows: Rows) -> None:
    """A row for each thing, a colour for each contender."""
    names = list(dict.fromkeys(name for each in rows.values() for name in each))
    for colour, name in enumerate(names):
        points = [(at, each[name]) for at, each in enumerate(rows.values()) if name in each]
        medians = [spread["median"] for _, spread in points]
        beside = [
            [each["median"] - each["low"] for _, each in points],
            [each["high"] - each["median"] for _, each in points],
        ]
        panel.errorbar(
            medians, [at for at, _ in points], xerr=beside, fmt="o", ms=4, elinewidth=1, color=f"C{colour}", label=name
        )
    panel.set_yticks(range(len(rows)), list(rows), fontsize=7)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.axvline(1.0, color="black", linewidth=0.6)
    panel.set_xlim(left=0.0)
    panel.grid(axis="x", linewidth=0.3)
    panel.tick_params(axis="x", labelsize=7)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
