"""The picture of tools/bench/zero_step.py: a row for each model, and in it time, memory and bytes of each contender."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steps.names import DDP, NO_COMMUNICATION

__all__ = ["draw"]

OURS, PEER, LIMIT = "#2ca02c", "#bbbbbb", "#eeeeee"
MEBIBYTE = 2**20


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = report["models"]
    most = max(len(model["contenders"]) for model in models.values())
    figure = Figure(figsize=(15.0, (0.24 * most + 1.1) * len(models) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    machine, versions = report["machine"], report["versions"]
    figure.suptitle(
        f"A training step on {report['world_size']} ranks of one host, one thread each: {machine['processor']}, "
        f"{machine['cores']} cores, torch {versions['torch']}, fp32, AdamW{_warning(report)}",
        fontsize=10,
    )
    for panels, (name, model) in zip(figure.subplots(len(models), 3, squeeze=False), models.items(), strict=True):
        contenders = dict(reversed(model["contenders"].items()))
        _draw_times(panels[0], contenders, rounds=model["rounds"])
        alone = {each: row for each, row in contenders.items() if "memory" in row}
        _draw_memory(panels[1], alone)
        _draw_sent(panels[2], alone)
        shown = f"{model['parameters'] / 1e6:.3g} M parameters, {model['tokens_per_rank']} tokens a rank"
        panels[0].set_title(f"{name}: {shown}", fontsize=9)
        for panel in panels:
            panel.tick_params(labelsize=7)

    figure.savefig(path, dpi=110, metadata={"Software": None})


def _warning(report: Mapping[str, Any]) -> str:
    return "" if report["is_benchmark"] else ". TEST SIZE, NO BENCHMARK"


def _draw_times(panel: Any, contenders: Mapping[str, Any], *, rounds: int) -> None:
    rows = list(contenders.values())
    medians = [row["time_s"]["median"] * 1e3 for row in rows]
    low = [median - row["time_s"]["low"] * 1e3 for median, row in zip(medians, rows, strict=True)]
    high = [row["time_s"]["high"] * 1e3 - median for median, row in zip(medians, rows, strict=True)]
    panel.barh(
        list(contenders),
        medians,
        xerr=[low, high],
        color=_colours(contenders),
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    _label(panel, [f"{row['times_ddp']['median']:.2f} x DDP" for row in rows], medians, high)
    panel.set_xlabel(f"ms a step; median and quartiles of {rounds} interleaved rounds", fontsize=8)


def _draw_memory(panel: Any, contenders: Mapping[str, Any]) -> None:
    memory = [row["memory"] for row in contenders.values()]
    peaks = [each["peak_bytes"] / MEBIBYTE for each in memory]
    panel.barh(list(contenders), peaks, color=_colours(contenders))
    panel.plot([each["formula_bytes"] / MEBIBYTE for each in memory], list(contenders), "k|", markersize=9)
    ddp = contenders[DDP]["memory"]["peak_bytes"] / MEBIBYTE
    _label(panel, [f"{peak / ddp:.2f} x DDP" for peak in peaks], peaks, [0.0] * len(peaks))
    panel.set_xlabel("MiB a rank at the peak of a step; | states by the formula", fontsize=8)


def _draw_sent(panel: Any, contenders: Mapping[str, Any]) -> None:
    sent = [row["sent"] for row in contenders.values()]
    values = [each["in_parameters"] for each in sent]
    panel.barh(list(contenders), values, color=_colours(contenders))
    over_sockets = [f"{each['loopback_bytes'] / MEBIBYTE:,.0f} MiB" for each in sent]
    _label(panel, over_sockets, values, [0.0] * len(values))
    panel.set_xlabel("bytes in collectives / of parameters; right: over sockets", fontsize=8)


def _label(panel: Any, texts: Sequence[str], values: Sequence[float], beyond: Sequence[float]) -> None:
    reach = max(value + more for value, more in zip(values, beyond, strict=True)) or 1.0
    for at, text in enumerate(texts):
        panel.text(reach * 1.02, at, text, va="center", fontsize=7)
    panel.set_xlim(0, reach * 1.25)


def _colours(contenders: Mapping[str, Any]) -> list[str]:
    return [OURS if name.startswith("zcore") else LIMIT if name == NO_COMMUNICATION else PEER for name in contenders]
