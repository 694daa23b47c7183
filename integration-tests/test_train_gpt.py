"""The training program of docs/examples on two ranks: it learns, it resumes at the exact step, its report draws."""

import io
import sys
from pathlib import Path

import pytest
import torch

for needed in ("zcore.zero", "matplotlib", "rich", "tokenizers"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import report  # noqa: E402 - found on the path above
import train_gpt  # noqa: E402
from gpt import GPT, GPTConfig, generate  # noqa: E402
from rich.console import Console  # noqa: E402
from text import Corpus, encode, train_tokenizer  # noqa: E402

from zcore import zero  # noqa: E402
from zcore.core.testing import run_ranks  # noqa: E402

SIZES = GPTConfig(vocab_size=300, context=16, layers=2, width=32, heads=2)
CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 20, "warmup_num_steps": 2, "warmup_type": "linear"},
    },
    "zero_optimization": {"stage": 3},
}


def small_corpus() -> Corpus:
    source = "".join(f"def add_{n}(x):\n    return x + {n}\n\n\n" for n in range(40))
    tokenizer = train_tokenizer([source], vocab_size=SIZES.vocab_size)
    held_out = "def add_7(y):\n    return y + 7\n"
    train = encode(tokenizer, [source])
    return Corpus(tokenizer, train, encode(tokenizer, [held_out]), held_out.encode(), len(source) / len(train))


def run(out: Path, steps: int, *, resume: bool = False) -> tuple[dict, zero.MemoryReport, list[int]]:
    torch.manual_seed(0)
    with zero.Init(config=CONFIG):
        model = GPT(SIZES)
    engine, corpus = zero.initialize(model, config=CONFIG), small_corpus()
    history: dict = {"losses": [], "bits_per_byte": {"start": train_gpt.bits_per_byte(engine, corpus)}}
    if resume:
        history = engine.load_checkpoint(out)["history"]
    train_gpt.train(engine, corpus, history, steps=steps, seed=0, out=out)
    history["bits_per_byte"]["end"] = train_gpt.bits_per_byte(engine, corpus)
    sample = generate(model, torch.tensor([5]), num_tokens=4, temperature=1.0, seed=0)
    return history, engine.memory_report(), sample.tolist()


def test_training_lowers_the_bits_per_byte_and_all_ranks_agree(tmp_path):
    one, other = run_ranks(2, run, tmp_path, 20)
    assert one == other
    assert one[0]["bits_per_byte"]["end"] < one[0]["bits_per_byte"]["start"] * 0.8


def test_a_resumed_run_takes_the_same_steps_bit_for_bit(tmp_path):
    (whole, _, sample), _ = run_ranks(2, run, tmp_path / "whole", 4)
    run_ranks(2, run, tmp_path / "halves", 2)
    (resumed, _, sample_after), _ = run_ranks(2, run, tmp_path / "halves", 4, resume=True)
    assert resumed["losses"] == whole["losses"]
    assert resumed["bits_per_byte"]["end"] == whole["bits_per_byte"]["end"]
    assert sample_after == sample


def test_the_report_shows_every_rank_and_draws_the_curve(tmp_path, capsys):
    held = zero.RankMemory(2**20, 2**20, 2**21, 2**19)
    memory = zero.MemoryReport((held, held), zero.RankMemory(2**21, 2**21, 2**22, 0))
    history = {"losses": [5.0, 4.0, 3.5], "bits_per_byte": {"start": 6.0, "end": 4.0}}
    options = {"--seed": 7, "--steps": 3}
    report.show(small_corpus(), history, memory, "x = 1", stage=3, options=options, out=tmp_path, steps=3, train_s=1.0)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("rank 0", "rank 1", "plain DDP ", "peak gathered", "gzip -9", "xz -9"))
    assert "--resume --seed 7 --steps 203" in shown
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("out", ["runs/gpt", "runs/stage1", "runs/stage3", "runs/gpt-stage1"])
def test_no_command_that_is_proposed_overwrites_the_run(stage, out):
    options = {"--stage": stage, "--out": out, "--steps": 20}
    lines = report.files_and_next_commands(Path(out), Path(out) / "curve.png", 20, stage, options)
    (resume,) = (line for line in lines if "# train on" in line)
    (other,) = (line for line in lines if "# the same losses" in line)
    assert f"--resume --stage {stage} --out {out} --steps 220 " in resume
    assert f"--out {out} " not in other and f"--stage {stage} " not in other
    assert "--steps 20 " in other


def test_the_memory_table_fits_a_terminal_of_80_columns():
    held = zero.RankMemory(*(987 * 2**20 for _ in range(4)))
    console = Console(width=80, file=io.StringIO())
    console.print(report.memory_table(zero.MemoryReport((held, held), held), stage=3))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 9  # nothing is wrapped
    assert max(map(len, lines)) <= 80
