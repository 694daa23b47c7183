"""A language model of a few hundred elements and what tests of refusals, faults, checkpoints and the engine share."""

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import ZcoreError

VOCABULARY, WIDTH, LENGTH = 17, 8, 5


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class TinyModel(nn.Module):
    """Embedding, blocks, head: under `settings` three buckets that are gathered and one of small parameters."""

    def __init__(self, *, seed: int = 0, num_blocks: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("num_forwards", torch.zeros(()))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.num_forwards += 1
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


class Product(torch.autograd.Function):
    """A product whose weight autograd is given by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def settings(zero_stage: int = 3, **changes: Any) -> dict[str, Any]:
    """A config under which the blocks of a TinyModel are really gathered; a change of None leaves the key out."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 16},
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def batch(step: int, rank: int | None = None) -> dict[str, Tensor]:
    """The micro-batch of one rank in one step."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def train_step(engine: zero.Engine, step: int) -> float:
    """One micro-batch from forward to step; its loss."""
    loss = engine(**batch(step))
    engine.backward(loss)
    engine.step()
    return loss.item()


def train_steps(engine: zero.Engine, steps: range) -> list[float]:
    return [train_step(engine, step) for step in steps]


def states(engine: zero.Engine) -> dict[str, Any]:
    """Everything that training changes on this rank, copied."""
    kept: dict[str, Any] = {
        f"parameter {name}": fragment.detach().as_subclass(Tensor).clone()
        for name, fragment in engine.sharding.fragments.items()
    }
    kept |= {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    if engine.optimizer is not None:
        for name, fragment in engine.sharding.fragments.items():
            for key, value in engine.optimizer.state.get(fragment, {}).items():
                kept[f"{key} of {name}"] = value.clone() if isinstance(value, Tensor) else value
        kept["lr"] = engine.get_lr()
    if engine.lr_scheduler is not None:
        kept["last_epoch"] = engine.lr_scheduler.last_epoch
    kept["counters"] = (engine.global_steps, engine.micro_steps)
    return kept


def digest(engine: zero.Engine, *, without: tuple[str, ...] = ()) -> str:
    """`states` but those named, in one word: equal exactly when every bit is."""
    total = hashlib.sha256()
    for name, value in sorted(states(engine).items()):
        if name in without:
            continue
        data = (
            bytes(value.reshape(-1).view(torch.uint8).tolist()) if isinstance(value, Tensor) else repr(value).encode()
        )
        total.update(name.encode())
        total.update(data)
    return total.hexdigest()


class Records(logging.Handler):
    """Keeps what is logged, a line each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def listen() -> Records:
    """All that zcore logs on this rank from now on."""
    records = Records()
    logger = logging.getLogger("zcore")
    logger.setLevel(logging.INFO)
    logger.addHandler(records)
    return records


def refusal(act: Callable[[], object]) -> str:
    """`ConfigError: its message` of what `act` refuses; a sentence that no test takes for one where it does not."""
    try:
        act()
    except ZcoreError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - told to the test, with its type
        return f"not ours: {type(error).__name__}: {error}"
    return "nothing was refused"


def is_paragraph(message: str) -> bool:
    """One block of text of at most a dozen lines of 100 letters that ends as a sentence does."""
    text = message.strip()
    return "\n" not in text and 40 <= len(text) <= 1200 and text[-1] in ".)?"
