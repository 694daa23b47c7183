"""The picture of tools/bench/zero_step.py: a bar for each kind, its quartiles, and how many times DDP's step it takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"zcore, shared memory": "#2ca02c", "zcore, pairwise": "#1f77b4", "zcore, core": "#9467bd"}
PEER, LIMIT = "#bbbbbb", "#eeeeee"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = report["models"]
    figure = Figure(figsize=(6.2 * len(models) + 1, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    machine, versions = report["machine"], report["versions"]
    figure.suptitle(
        f"A training step on {report['world_size']} ranks, one thread each: {machine['processor']}, "
        f"{machine['cores']} cores, torch {versions['torch']}, fp32",
        fontsize=10,
    )
    for panel, (name, model) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        kinds = list(model["kinds"])[::-1]
        rows = [model["kinds"][kind] for kind in kinds]
        medians = [row["time_s"]["median"] * 1e3 for row in rows]
        low = [median - row["time_s"]["low"] * 1e3 for median, row in zip(medians, rows, strict=True)]
        high = [row["time_s"]["high"] * 1e3 - median for median, row in zip(medians, rows, strict=True)]
        colours = [COLOURS.get(kind, LIMIT if kind == "no communication" else PEER) for kind in kinds]
        panel.barh(kinds, medians, xerr=[low, high], color=colours, error_kw={"elinewidth": 1, "capsize": 2})
        reach = max(median + up for median, up in zip(medians, high, strict=True))
        for at, row in enumerate(rows):
            panel.text(reach * 1.02, at, f"{row['times_ddp']['median']:.2f} x DDP", va="center", fontsize=8)
        panel.set_xlim(0, reach * 1.22)
        panel.set_xlabel(f"ms a step; median and quartiles of {model['rounds']} interleaved rounds", fontsize=8)
        shown = f"{model['parameters'] / 1e6:.0f} M parameters, {model['tokens_per_rank']} tokens a rank"
        panel.set_title(f"{name}: {shown}", fontsize=9)
        panel.tick_params(labelsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
