"""Train a small GPT on the sources of Python's standard library, with its states sharded over the ranks.

    export OMP_NUM_THREADS=1                                            # cores / ranks
    torchrun --nproc-per-node 2 docs/examples/train_gpt.py              # ZeRO-3, some 4 minutes on 2 cores
    torchrun --nproc-per-node 2 docs/examples/train_gpt.py --resume --steps 600  # the run goes on where it was saved
    torchrun --nproc-per-node 2 docs/examples/train_gpt.py --stage 1 --out runs/stage1  # same numbers, other memory

Beside this file lie the model (gpt.py), the data (text.py), what is shown at the end (report.py) and the settings
(ds_config.json, DeepSpeed's keys). The lines that shard are marked [zero]; the rest is an ordinary training program.
"""

import argparse
import math
import time
from itertools import islice
from pathlib import Path

import report
import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig, generate
from report import print_once
from safetensors.torch import save_file
from text import IGNORED, Corpus, held_out_batches, load_corpus, train_batches
from torch.nn import functional as F

from zcore import zero
from zcore.core.device import device_in_use_bytes
from zcore.core.events import progress

DEFAULTS = Path(__file__).with_name("ds_config.json"), Path("runs/gpt")  # of --config and --out
SAVE_EVERY = 100  # optimizer steps
PROMPT = "def read_lines(path"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULTS[0], help="JSON settings")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage, instead of the config's")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--steps", type=int, help="stop after so many optimizer steps; default: the schedule's end")
    parser.add_argument("--out", type=Path, default=DEFAULTS[1], help="folder for checkpoint, weights and curve")
    return parser.parse_args()


def main() -> None:
    """Build, train, judge, save."""
    args = parse_arguments()
    config = zero.TrainingConfig.read(args.config).to_dict()  # [zero] every key, with defaults
    if args.stage is not None:
        config["zero_optimization"]["stage"] = args.stage
    steps = args.steps or ((config["scheduler"] or {}).get("params", {})).get("total_num_steps")
    if steps is None:
        raise SystemExit(f"{args.config} has no scheduler that says for how long to train: pass --steps.")

    zero.init_distributed()  # [zero] joins torchrun's ranks; alone without torchrun
    torch.manual_seed(args.seed)
    with zero.Init(config=config):  # [zero] takes no memory: each rank computes only its own part of every parameter
        model = GPT(GPTConfig())
    engine = zero.initialize(model, config=config)  # [zero] shards; brings optimizer, schedule and clipping

    history = {"losses": [], "bits_per_byte": {}}
    if args.resume:
        history = engine.load_checkpoint(args.out)["history"]  # [zero] states, schedule and counters, bit for bit
        if engine.global_steps >= steps:
            print_once(f"{args.out} has its {engine.global_steps} steps already: pass --steps with a larger number.")
            dist.destroy_process_group()
            return
    print_once("reading the standard library and training a tokenizer on it ...")
    corpus = load_corpus(vocab_size=GPTConfig().vocab_size)
    if not args.resume:
        print_once("judging the untrained model on held-out files ...")
        history["bits_per_byte"]["start"] = bits_per_byte(engine, corpus)
    started_s = time.monotonic()
    train(engine, corpus, history, steps=steps, seed=args.seed, out=args.out)
    train_s = time.monotonic() - started_s
    print_once("judging the held-out files, and writing a sample ...")
    history["bits_per_byte"]["end"] = bits_per_byte(engine, corpus)

    model.eval()
    prompt = torch.tensor(corpus.tokenizer.encode(PROMPT).ids, device=engine.device)
    sample = corpus.tokenizer.decode(generate(model, prompt, num_tokens=160, temperature=0.7, seed=args.seed).tolist())
    memory = engine.memory_report()  # [zero] measured, of every rank
    weights = engine.consolidated_state_dict()  # [zero] whole tensors on rank 0, for plain torch
    if engine.global_rank == 0:
        save_file(weights, args.out / "model.safetensors")
        corpus.tokenizer.save(str(args.out / "tokenizer.json"))
        steps, stage = engine.global_steps, engine.config.zero_optimization.stage
        given = {f"--{name}": getattr(args, name) for name in ("config", "stage", "seed", "out", "steps")}
        options = {name: value for name, value in given.items() if value not in (None, 0, *DEFAULTS)}
        report.show(
            corpus, history, memory, sample, stage=stage, options=options, out=args.out, steps=steps, train_s=train_s
        )
    dist.destroy_process_group()


def train(engine: zero.Engine, corpus: Corpus, history: dict, *, steps: int, seed: int, out: Path) -> None:
    """Take optimizer steps until there were `steps` of them, saving now and then and at the end."""
    micro_batch, num_micro = engine.config.train_micro_batch_size_per_gpu, engine.config.gradient_accumulation_steps
    context, ranks = engine.module.config.context, {"rank": engine.dp_rank, "dp_size": engine.dp_size}
    batches = train_batches(
        corpus.train, context=context, batch_size=micro_batch, seed=seed, first=engine.micro_steps, **ranks
    )
    engine.train()
    where = "on the device" if engine.device.type == "cuda" else "in the whole process"
    with progress("training", total=steps, rank=engine.global_rank) as bar:
        bar.update(engine.global_steps)
        while engine.global_steps < steps:
            step_started_s, losses = time.monotonic(), torch.zeros(())
            for tokens, targets in islice(batches, num_micro):
                loss = engine(tokens.to(engine.device), targets=targets.to(engine.device))
                engine.backward(loss)  # [zero] gradients are reduced to the rank that owns their part
                engine.step()  # [zero] steps the optimizer after the last micro-batch
                losses += loss.detach().cpu()
            dist.all_reduce(losses)
            history["losses"].append(losses.item() / (num_micro * engine.dp_size))
            tokens_per_s = engine.config.train_batch_size * context / (time.monotonic() - step_started_s)
            memory = f"{device_in_use_bytes(engine.device) / 2**20:,.0f} MiB {where}"
            loss = f"{history['losses'][-1]:.4f}"  # the mean over all ranks
            bar.update(loss=loss, tokens_per_s=tokens_per_s, memory=memory)
            if engine.global_steps % SAVE_EVERY == 0 or engine.global_steps == steps:
                engine.save_checkpoint(out, tag="last", client_state={"history": history})  # [zero] each rank its part


@torch.no_grad()
def bits_per_byte(engine: zero.Engine, corpus: Corpus) -> float:
    """How many bits the model needs for each byte of the held-out text; the ranks share the work."""
    engine.eval()
    batch_size = engine.config.train_micro_batch_size_per_gpu
    context, ranks = engine.module.config.context, {"rank": engine.dp_rank, "dp_size": engine.dp_size}
    nats = torch.zeros((), dtype=torch.float64)
    for tokens, targets in held_out_batches(corpus.held_out, context=context, batch_size=batch_size, **ranks):
        logits = engine(tokens.to(engine.device)).float()
        nats += F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(engine.device), ignore_index=IGNORED, reduction="sum"
        ).cpu()
    dist.all_reduce(nats)
    return nats.item() / math.log(2) / len(corpus.held_out_text)


if __name__ == "__main__":
    main()
