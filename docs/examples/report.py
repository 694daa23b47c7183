"""What the examples show: memory per rank, and train_gpt.py's bits per byte, sample, and where everything lies."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from text import Corpus, compressed_bits_per_byte

from zcore.zero import MemoryReport, RankMemory


def print_once(line: str) -> None:
    """Say what takes its time, on one rank."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def show(
    corpus: Corpus,
    history: Mapping,
    memory: MemoryReport,
    sample: str,
    *,
    stage: int,
    options: Mapping[str, object],
    out: Path,
    steps: int,
    train_s: float,
) -> None:
    """Print the whole report and write the loss curve; called on one rank."""
    others = compressed_bits_per_byte(corpus.held_out_text)
    curve = out / "loss_curve.png"
    draw_loss_curve(curve, corpus, history, others)
    console = Console(highlight=False)
    console.print(memory_table(memory, stage=stage))
    console.print(compression_table(history["bits_per_byte"], others, corpus, steps=steps, train_s=train_s))
    console.print(Panel(Syntax(sample, "python", background_color="default"), title="A sample, after its first words"))
    for line in files_and_next_commands(out, curve, steps, stage, options):
        console.print(line, soft_wrap=True)  # what a reader may copy is not cut


def memory_table(memory: MemoryReport, *, stage: int) -> Table:
    """What each rank holds between steps, beside what plain data parallelism would hold on each."""
    table = Table(title=f"Model states per rank at ZeRO stage {stage}, in MiB")
    table.add_column("")
    for name in ("parameters", "gradients", "optimizer", "together", "peak gathered"):
        table.add_column(name, justify="right")
    for rank, held in enumerate(memory.ranks):
        table.add_row(f"rank {rank}", *_in_mib(held), style="green")
    table.add_section()
    table.add_row("plain DDP", *_in_mib(memory.data_parallel)[:-1], "-")
    return table


def _in_mib(held: RankMemory) -> list[str]:
    parts = (
        held.parameters_bytes,
        held.gradients_bytes,
        held.optimizer_bytes,
        held.states_bytes,
        held.gathered_peak_bytes,
    )
    return [f"{part / 2**20:.1f}" for part in parts]


def compression_table(
    model: Mapping[str, float], others: Mapping[str, float], corpus: Corpus, *, steps: int, train_s: float
) -> Table:
    """Validation loss as a compressor would see it: bits for each byte of text that nobody has trained on."""
    table = Table(
        title=f"Held-out files, {len(corpus.held_out_text):,} bytes",
        caption=f"{train_s:.0f} s of training in this run",
    )
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_row("the model, untrained", f"{model['start']:.3f}")
    for name, bits in others.items():
        table.add_row(name, f"{bits:.3f}")
    table.add_row(f"the model after {steps} steps", f"{model['end']:.3f}", style="green")
    return table


def files_and_next_commands(out: Path, curve: Path, steps: int, stage: int, options: Mapping[str, object]) -> list[str]:
    """Where things lie, and what to try: lines with Rich's markup. `options` are those that this run was given."""
    nox = next((parent for parent in Path(sys.prefix).parents if parent.name == ".nox"), None)
    run = "tools/nox -s quickstart --" if nox else "torchrun --nproc-per-node 2 docs/examples/train_gpt.py"
    zcore = f"{Path(sys.prefix).relative_to(nox.parent)}/bin/zcore" if nox else "zcore"
    files = {
        "loss curve": curve,
        "checkpoint": out / "last",
        "weights for plain torch": out / "model.safetensors",
        "tokenizer": out / "tokenizer.json",
    }
    other = 1 if stage == 3 else 3
    beside = out.with_name(f"{out.name.removesuffix(f'-stage{stage}')}-stage{other}")  # this run is not overwritten
    further = _written({**options, "--steps": steps + 200})
    commands = {
        "train on from the checkpoint": f"{run} --resume {further}",
        "the same losses with other memory": f"{run} {_written({**options, '--stage': other, '--out': beside})}",
        "what is installed, and what would be gained by what": f"{zcore} doctor",
    }
    return [
        "\n[bold]Where it lies",
        *(f"  {name:24} {path}" for name, path in files.items()),
        "\n[bold]Next",
        *(f"  {command}  [dim]# {aim}" for aim, command in commands.items()),
    ]


def _written(options: Mapping[str, object]) -> str:
    return " ".join(f"{name} {value}" for name, value in options.items())


def draw_loss_curve(path: Path, corpus: Corpus, history: Mapping, others: Mapping[str, float]) -> None:
    """Write the training loss as bits per byte, with the held-out loss and the compressors' lines, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    scale = 1 / (math.log(2) * corpus.train_bytes_per_token)  # nats per token to bits per byte
    losses = [loss * scale for loss in history["losses"]]
    steps = range(1, len(losses) + 1)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="training, smoothed")
    ends = history["bits_per_byte"]
    axes.plot((0, len(losses)), (ends["start"], ends["end"]), "o", color="tab:red", label="held-out files")
    for step, bits in ((0, ends["start"]), (len(losses), ends["end"])):
        axes.annotate(f"{bits:.3f}", (step, bits), (6, -3), textcoords="offset points")
    for (name, bits), style in zip(others.items(), ("--", ":"), strict=True):
        axes.axhline(bits, color="0.35", linestyle=style, linewidth=1.2, label=f"{name} on held-out files, {bits:.3f}")
    axes.set(xlabel="optimizer step", ylabel="bits per byte", title="A small GPT on Python's standard library")
    axes.set_xlim(right=1.1 * len(losses))
    axes.set_ylim(bottom=min([1.0, *losses]), top=4.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smoothed(losses: Sequence[float], *, reach: int = 12) -> list[float]:
    """Each value's mean with `reach` neighbours on both sides; at the ends with those there are."""
    return [fmean(losses[max(0, at - reach) : at + reach + 1]) for at in range(len(losses))]
