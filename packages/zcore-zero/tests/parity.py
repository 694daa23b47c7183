"""One seed, trained in plain single-process torch and in zcore: what the tests of parity, traffic and memory share.

A `Recipe` says what is trained and how, `train_plain` and `train_zero` train it on the same data, a `Run` is what came
of it. `train_plain(recipe, parts=n)` computes gradients over n parts of each batch, one after the other, and adds them
up in the tree order of `zcore.core.collectives`: then it does what n ranks do, and may be compared bit by bit. With one
part it is the loop anyone would write.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core.collectives import tree_sum
from zcore.zero.config import DTYPES

ROWS = 8  # of a micro-batch, over all ranks
SMALL_NUMEL = 100  # the models' biases and norms stay whole under stage 3, their matrices do not


def widen(x: Tensor) -> Tensor:
    """What a loss is computed from: never 16 bits."""
    return x.float() if x.dtype.itemsize == 2 else x


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """Blocks in a ModuleList between an embedding and the head that is tied to it; positions are frozen.

    Sizes divide by nothing.
    """

    def __init__(
        self,
        *,
        vocab: int = 61,
        dim: int = 24,
        num_heads: int = 3,
        num_blocks: int = 2,
        is_tied: bool = True,
        recomputes: bool = False,
    ) -> None:
        super().__init__()
        self.recomputes = recomputes
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(9, dim)
        self.h = nn.ModuleList(Block(dim, num_heads) for _ in range(num_blocks))
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.register_buffer("positions", torch.arange(9))
        self.apply(self._initialize)
        self.wpe.requires_grad_(False)
        if is_tied:
            self.head.weight = self.wte.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens[:, :-1]) + self.wpe(self.positions[: tokens.shape[1] - 1])
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        logits = widen(self.head(self.ln_f(x)))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Odd(nn.Module):
    """What real models have and small ones lack, in one."""

    def __init__(self, second_dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.frozen = nn.Linear(12, 20).requires_grad_(False)
        self.lone_frozen = nn.Parameter(torch.randn(20), requires_grad=False)
        self.twice = nn.Linear(20, 20)
        self.skipped = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
        self.never = nn.Linear(7, 19)
        self.second = nn.Linear(20, 20).to(second_dtype)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.norm = nn.LayerNorm(20)
        self.register_buffer("shift", torch.randn(20))
        self.register_buffer("last_step", torch.tensor(-1))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        hidden = torch.tanh(self.frozen(x)) + self.lone_frozen
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        if step % 2 == 0:
            hidden = hidden + self.skipped(hidden)
        hidden = hidden + torch.tanh(self.second(hidden.to(self.second.weight.dtype))).to(hidden.dtype)
        self.last_step.fill_(step)
        hidden = self.norm(hidden + self.shift.to(hidden.dtype)) * self.scale + self.empty.sum()
        return functional.mse_loss(widen(hidden), widen(y))


class MLP(nn.Module):
    """No blocks: every Linear is used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 33), nn.Linear(33, 37), nn.Linear(37, 20)

    def forward(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        return functional.mse_loss(widen(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))), widen(y))


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 20), nn.Linear(20, 20)
        self.attention = nn.MultiheadAttention(20, 4, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        hidden = self.inner(x)[:, None] * torch.linspace(0.5, 1.5, 5, dtype=x.dtype)[None, :, None]
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return functional.mse_loss(widen(self.outer(hidden.mean(1))), widen(y))


class Encoder(nn.Module):
    """`nn.TransformerEncoder`: layers that are deep copies of one, and attention as above."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 20)
        layer = nn.TransformerEncoderLayer(20, 2, 28, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        hidden = self.inner(x)[:, None] * torch.linspace(0.5, 1.5, 5, dtype=x.dtype)[None, :, None]
        return functional.mse_loss(widen(self.layers(hidden).mean(1)), widen(y))


MODELS = {"gpt": GPT, "odd": Odd, "mlp": MLP, "attention": Attention, "encoder": Encoder}


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Values are plain, so that a recipe travels to ranks and serves as a key."""

    model: str = "gpt"
    model_options: tuple[tuple[str, Any], ...] = ()
    steps: int = 20
    accumulation: int = 1
    clip: float = 0.0
    optimizer: str = "AdamW"
    hyper: tuple[tuple[str, float], ...] = (("lr", 1e-2), ("eps", 1e-3), ("weight_decay", 0.1))
    num_groups: int = 1  # 2: weight decay for matrices only, and a learning rate of their own for the rest
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None  # bf16 or fp16: mixed precision with fp32 masters
    loss_scale: float = 1.0  # of fp16, fixed
    autocast: str | None = None  # bfloat16 or float16: torch's own
    accumulate: str | None = None  # in what gradients accumulate, and travel: fp32, bf16, fp16; None: as by default
    communicate: str | None = None
    predivides: bool = False  # gradients by the number of ranks, before they travel
    seed: int = 0

    def build(self) -> nn.Module:
        """The model, from the seed."""
        torch.manual_seed(self.seed)
        model = MODELS[self.model](**dict(self.model_options))
        return model if self.dtype is torch.float32 else model.to(self.dtype)

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """The rows of one micro-batch over all ranks, as the model's keyword arguments."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + 100 * step + micro + 1)
        if self.model == "gpt":
            return {"tokens": torch.randint(0, 61, (ROWS, 9), generator=generator)}
        x = torch.randn(ROWS, 12, generator=generator, dtype=self.dtype)
        y = torch.tanh(x @ torch.linspace(-1, 1, 240, dtype=self.dtype).view(12, 20))
        return {"x": x, "y": y, "step": step}

    def loss(self, model: Callable[..., Tensor], batch: Mapping[str, Any]) -> Tensor:
        """What is made smaller; `model` may be an engine."""
        return model(**batch)

    def autocasting(self) -> AbstractContextManager[object]:
        """What the forward runs in."""
        return torch.autocast("cpu", dtype=getattr(torch, self.autocast)) if self.autocast else nullcontext()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """What steps the whole model: torch's class, or zcore's where torch has none that steps like it."""
        for name in ("wte", "wpe", "head"):
            if hasattr(model, name):
                getattr(model, name).weight.use_muon = False  # whole parameters do not know what module they are of
        kind = getattr(zero, self.optimizer, None) or getattr(torch.optim, self.optimizer)
        fused = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
        optimizer: torch.optim.Optimizer = kind(self.groups(model), **dict(self.hyper), **fused)
        return optimizer

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups, frozen parameters among them."""
        if self.num_groups == 1:
            return [{"params": list(model.parameters())}]
        params = list(model.parameters())
        matrices = {"params": [each for each in params if each.dim() > 1]}
        return [matrices, {"params": [each for each in params if each.dim() <= 1], "weight_decay": 0.0, "lr": 3e-2}]


def part_of(batch: Mapping[str, Any], *, part: int, parts: int) -> dict[str, Any]:
    """The rows that one of `parts` ranks sees."""
    return {key: value.chunk(parts)[part] if isinstance(value, Tensor) else value for key, value in batch.items()}


@dataclass(frozen=True)
class Run:
    """What a training came to."""

    losses: list[float]  # one per micro-batch
    norms: list[float]  # one per optimizer step, before clipping
    state: dict[str, Tensor]  # whole parameters and buffers by name

    @staticmethod
    def of_ranks(runs: list["Run"]) -> "Run":
        """The run of all ranks together: the mean of their losses, and what they must agree on."""
        for each in runs[1:]:
            assert each.norms == runs[0].norms
            assert each.state.keys() == runs[0].state.keys()
            assert [name for name in each.state if not torch.equal(each.state[name], runs[0].state[name])] == []
        losses = [sum(each) / len(each) for each in zip(*(run.losses for run in runs), strict=True)]
        return Run(losses, runs[0].norms, runs[0].state)


def train_plain(
    recipe: Recipe, *, parts: int = 1, reduces_each: bool = False, clip_norms: Sequence[float] | None = None
) -> Run:
    """The single process. See the header for `parts`. Mixed precision computes in a copy and steps fp32 masters.

    `reduces_each`: the parts are added up for each micro-batch, as stages 2 and 3 do, in place of each step.
    `clip_norms`: what to take for the norms when clipping, one per step; else what torch comes to.
    """
    master = recipe.build()
    built_dtypes = {name: value.dtype for name, value in master.state_dict().items()}
    compute = master
    if recipe.compute is not None:
        compute = copy.deepcopy(master)
        for param in compute.parameters():
            param.data = param.data.to(recipe.compute)
        for param in master.parameters():  # what is frozen has no master apart
            param.data = param.data.to(torch.float32 if param.requires_grad else recipe.compute)
    optimizer = recipe.build_optimizer(master)
    pairs = [pair for pair in zip(master.parameters(), compute.parameters(), strict=True) if pair[0].requires_grad]
    losses, norms = [], []
    for step in range(recipe.steps):
        compute.zero_grad()
        of_parts = [
            [
                _gradients_of_part(recipe, compute, step, micro, part=part, parts=parts, losses=losses)
                for micro in range(recipe.accumulation)
            ]
            for part in range(parts)
        ]  # [part][micro-batch][parameter]
        for index, (param, _) in enumerate(pairs):
            grads = [[of_micro_batch[index] for of_micro_batch in of_part] for of_part in of_parts]
            param.grad = _reduced(recipe, grads, reduces_each=reduces_each, out_dtype=param.dtype)
            if param.grad is not None and recipe.loss_scale != 1.0:
                param.grad.mul_(1.0 / recipe.loss_scale)
        gradients = [param for param, _ in pairs if param.grad is not None]
        norm = nn.utils.get_total_norm([param.grad for param in gradients if param.grad is not None])
        norms.append(float(norm))
        if clip_norms is None:
            nn.utils.clip_grads_with_norm_(gradients, recipe.clip or float("inf"), norm)
        elif recipe.clip:
            _scale(gradients, min(1.0, recipe.clip / (clip_norms[step] + 1e-6)))
        optimizer.step()
        with torch.no_grad():
            for param, computing in pairs:
                computing.copy_(param)
    by_micro_batch = torch.tensor(losses, dtype=torch.float64).view(recipe.steps, parts, recipe.accumulation).mean(1)
    whole = {**compute.state_dict(), **dict(master.named_parameters(remove_duplicate=False))}
    state = {name: value.detach().to(built_dtypes[name]) for name, value in whole.items()}
    return Run(by_micro_batch.flatten().tolist(), norms, state)


def _scale(params: Iterable[nn.Parameter], factor: float) -> None:
    """As `clip_grads_with_norm_` does, but by no tensor: its dtype would count where a gradient has no dimension."""
    for param in params:
        if param.grad is not None:
            param.grad.mul_(factor)


def _gradients_of_part(
    recipe: Recipe, model: nn.Module, step: int, micro: int, *, part: int, parts: int, losses: list[float]
) -> list[Tensor | None]:
    """Gradients of one micro-batch, in the dtype they accumulate in."""
    batch = part_of(recipe.batch(step, micro), part=part, parts=parts)
    if recipe.compute is not None:
        batch = {
            key: value.to(recipe.compute) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in batch.items()
        }
    with recipe.autocasting():
        loss = recipe.loss(model, batch)
    losses.append(loss.item())
    (loss / recipe.accumulation * recipe.loss_scale).backward()
    found: list[Tensor | None] = []
    for param in model.parameters():
        if param.requires_grad:
            grad = param.grad if recipe.compute is None or param.grad is None else param.grad.float()
            found.append(grad.to(DTYPES[recipe.accumulate]) if recipe.accumulate and grad is not None else grad)
            param.grad = None
    return found


def _reduced(
    recipe: Recipe, grads: list[list[Tensor | None]], *, reduces_each: bool, out_dtype: torch.dtype
) -> Tensor | None:
    """One parameter's gradient from those of each part and micro-batch."""
    mean = functools.partial(_mean, recipe=recipe, out_dtype=out_dtype)
    if reduces_each:
        return _sum(mean(list(of_parts)) for of_parts in zip(*grads, strict=True))
    return mean([_sum(of_part) for of_part in grads])


def _sum(grads: Iterable[Tensor | None]) -> Tensor | None:
    """One after the other."""
    given = [each for each in grads if each is not None]
    return functools.reduce(Tensor.add, given) if given else None


def _mean(grads: list[Tensor | None], *, recipe: Recipe, out_dtype: torch.dtype) -> Tensor | None:
    """In the order of the ranks' sums, and in the dtype that travels."""
    given = [each for each in grads if each is not None]
    if not given:
        return None
    dtype, parts = DTYPES.get(recipe.communicate or "", given[0].dtype), len(grads)
    whole = [torch.zeros_like(given[0]) if each is None else each for each in grads]
    sent = [(each / parts if recipe.predivides else each).to(dtype) for each in whole]
    if parts == 1:
        return sent[0].to(out_dtype)
    total = torch.empty_like(sent[0])
    tree_sum([each.view(-1) for each in sent], out=total.view(-1))
    return total.to(out_dtype) if recipe.predivides else total.to(out_dtype).mul_(1.0 / parts)


def config_of(
    recipe: Recipe, *, stage: int, shard_size: int = -1, recompute: dict[str, Any] | None = None, **zero_options: Any
) -> dict[str, Any]:
    """The engine's config for a recipe."""
    return {
        "train_batch_size": ROWS * recipe.accumulation,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.clip,
        "optimizer": {"type": recipe.optimizer, "params": dict(recipe.hyper)},
        "bf16": {"enabled": recipe.compute is torch.bfloat16},
        "torch_autocast": {"enabled": recipe.autocast is not None, "dtype": recipe.autocast},
        "data_types": {"grad_accum_dtype": recipe.accumulate},
        "communication_data_type": recipe.communicate,
        "prescale_gradients": recipe.predivides,
        "fp16": {"enabled": recipe.compute is torch.float16, "loss_scale": recipe.loss_scale},
        "activation_checkpointing": recompute or {},
        "zero_optimization": {
            "stage": stage,
            "mics_shard_size": shard_size,
            "stage3_param_persistence_threshold": SMALL_NUMEL,
            **zero_options,
        },
    }


def build_engine(
    recipe: Recipe, *, stage: int, shard_size: int = -1, is_deferred: bool = False, **zero_options: Any
) -> zero.Engine:
    """An engine on all ranks for a recipe; with `is_deferred` its model is built inside `zero.Init`."""
    with zero.Init(enabled=is_deferred):
        model = recipe.build()
    config = config_of(recipe, stage=stage, shard_size=shard_size, **zero_options)
    return zero.initialize(model, config, model_parameters=recipe.groups(model))


def train_zero(
    recipe: Recipe,
    *,
    stage: int,
    shard_size: int = -1,
    holds_back: bool = False,
    is_deferred: bool = False,
    **zero_options: Any,
) -> Run:
    """A rank's part. `holds_back`: all but the last micro-batch of a step inside `no_sync()`."""
    engine = build_engine(recipe, stage=stage, shard_size=shard_size, is_deferred=is_deferred, **zero_options)
    losses, norms = [], []
    for step in range(recipe.steps):
        for micro in range(recipe.accumulation):
            batch = part_of(recipe.batch(step, micro), part=engine.dp_rank, parts=engine.dp_size)
            is_last = micro == recipe.accumulation - 1
            with engine.no_sync() if holds_back and not is_last else nullcontext():
                loss = recipe.loss(engine, batch)
                engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norm = engine.get_global_grad_norm()
        assert norm is not None
        norms.append(norm)
    state = engine.consolidated_state_dict(rank=None)
    engine.close()
    return Run(losses, norms, state)


def train_rows(trainings: list[tuple[Recipe, dict[str, Any]]]) -> list[Run]:
    """Body of ranks: one training after the other, each with its own arguments for `train_zero`."""
    return [train_zero(recipe, **arguments) for recipe, arguments in trainings]


def by_row(of_ranks: list[list[Run]]) -> list[Run]:
    """What each of the `trainings` of `train_rows` came to, over all ranks."""
    return [Run.of_ranks(list(runs)) for runs in zip(*of_ranks, strict=True)]


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest expected value of the tensor."""
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def differences(found: Run, expected: Run) -> dict[str, float]:
    """Relative differences of losses, norms, and each parameter and buffer."""
    assert found.state.keys() == expected.state.keys()
    return {
        "losses": relative(torch.tensor(found.losses), torch.tensor(expected.losses)),
        "norms": relative(torch.tensor(found.norms), torch.tensor(expected.norms)),
        **{name: relative(found.state[name], value) for name, value in expected.state.items()},
    }


def beyond(found: Run, expected: Run, *, rtol: float) -> dict[str, float]:
    """The differences that exceed `rtol`; a test asserts that there are none."""
    return {name: value for name, value in differences(found, expected).items() if not value <= rtol}


def bits_that_differ(found: Run, expected: Run) -> list[str]:
    """Names of what is not equal to the bit."""
    names = [name for name, value in expected.state.items() if not torch.equal(found.state[name], value)]
    return ["losses"] * (found.losses != expected.losses) + ["norms"] * (found.norms != expected.norms) + names
