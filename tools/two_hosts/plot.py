"""Draws docs/benchmarks/two-hosts.png from two-hosts.json: times over the least time that the link allows."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"torch gloo": "#9a9a9a", "core": "#9a9a9a", "pairwise": "#e08a3c", "two levels": "#2f6fb0"}
KIB = 1024
Bars = Mapping[str, Sequence[tuple[float, float, float]]]  # by contender: middle, and quartiles


def draw(report: Mapping[str, Any], file: Path) -> None:
    """One row of panels for each number of ranks: three ops, and the training step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = report["runs"]
    rates = list(dict.fromkeys(run["rate"] for run in runs))
    worlds = sorted({run["num_ranks"] for run in runs})
    ops = list(dict.fromkeys(row["op"] for row in runs[0]["collectives"]))
    figure, rows = plt.subplots(len(worlds), len(ops) + 1, figsize=(19, 4.4 * len(worlds)), squeeze=False)
    for num_ranks, axes in zip(worlds, rows, strict=True):
        of_world = {run["rate"]: run for run in runs if run["num_ranks"] == num_ranks}
        for op, axis in zip(ops, axes, strict=False):
            cases = [(rate, row) for rate in rates for row in of_world[rate]["collectives"] if row["op"] == op]
            labels = [f"{_size(row['payload_bytes'])}\n{rate}" for rate, row in cases]
            _panel(axis, f"{op}, {num_ranks} ranks", labels, cases, report)
        steps = [(rate, of_world[rate]["zero_step"]) for rate in rates]
        size = f"{steps[0][1]['parameters'] / 1e6:.1f} M parameters"
        _panel(axes[-1], f"ZeRO-3 step, {num_ranks} ranks, {size}", [rate for rate, _ in steps], steps, report)
        axes[0].set_ylabel("time / least time that the link allows")
    figure.suptitle("Two hosts and one slow link: medians and quartiles; no call can be faster than the dashed line")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _panel(
    axis: Any, title: str, labels: Sequence[str], cases: Sequence[tuple[str, Any]], report: Mapping[str, Any]
) -> None:
    names = list(cases[0][1]["by"])
    names.sort(key=list(COLOURS).index)
    width = 0.8 / len(names)
    for step, name in enumerate(names):
        scale = [report["rates_bytes_per_s"][rate] / row["crossing_bytes"] for rate, row in cases]
        figures = [row["by"][name] for _, row in cases]
        middle = [each["median_s"] * by for each, by in zip(figures, scale, strict=True)]
        below = [(each["median_s"] - each["low_s"]) * by for each, by in zip(figures, scale, strict=True)]
        above = [(each["high_s"] - each["median_s"]) * by for each, by in zip(figures, scale, strict=True)]
        places = [at + (step - (len(names) - 1) / 2) * width for at in range(len(cases))]
        axis.bar(places, middle, width, yerr=(below, above), label=name, color=COLOURS[name], capsize=2)
    axis.axhline(1, color="black", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(cases)), labels, fontsize=7)
    axis.set_title(title, fontsize=11)
    axis.margins(y=0.18)  # room for the legend
    axis.legend(fontsize=8)


def _size(num_bytes: int) -> str:
    return f"{num_bytes // KIB} KiB" if num_bytes < KIB * KIB else f"{num_bytes // KIB**2} MiB"


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".png"))
