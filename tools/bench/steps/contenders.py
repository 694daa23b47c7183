"""One model trained in fp32 on the ranks of this host, the same arithmetic behind one `step` whoever shards.

zcore 0, 1, 2, 3          the stages of ZeRO over what is chosen where zcore-comm is installed: here, shared memory
zcore 3 pairwise          stage 3 as between hosts
zcore 3 core              stage 3 as without zcore-comm: the core's exchange and sum over gloo
zcore 3 plain gloo        stage 3 over torch.distributed's own all_gather and reduce_scatter
DDP                       torch's, gradients as views of its buckets
ZeroRedundancyOptimizer   torch's stage 1: DDP, and an optimizer that spreads whole parameters' states over ranks
FSDP2 kept whole          torch's stage 2: fully_shard with reshard_after_forward=False
FSDP2                     torch's stage 3: fully_shard of each block, then of the model
DeepSpeed 1, 2, 3         its stages over gloo, where it is installed, with its own defaults
no communication          DDP's step within no_sync: what the ranks compute, nothing sent; its losses mean nothing
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from steps.names import DDP, FSDP2, NO_COMMUNICATION, zcore_at
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from zcore import zero
from zcore.comm.choice import serve
from zcore.comm.recording.recorded import Recorded
from zcore.core import compat, extensions
from zcore.core.collectives import Collectives, Pending
from zcore.core.mesh import build_mesh
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["Step", "Trainer", "build_trainers", "load"]

LEARNING_RATE = 1e-3
CLIP_NORM = 1.0

Step = Callable[[], float]  # one optimizer step; its loss
Serve = Callable[..., Collectives]


@dataclass(frozen=True, slots=True)
class Trainer:
    """A model with all that steps it. `engine` is zcore's, which counts what it holds and sends."""

    step: Step
    engine: zero.Engine | None = None


class PlainGloo(TorchCollectives):
    """The contract with nothing of ours in its reductions."""

    def __init__(self, group: dist.ProcessGroup, *, name: str) -> None:
        super().__init__(group, name=name)
        self._plain = group

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.reduce_scatter`."""
        self._count("reduce_scatter", input)
        return compat.reduce_scatter_flat(output, input, group=self._plain)

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_reduce`."""
        self._count("all_reduce", tensor)
        return dist.all_reduce(tensor, group=self._plain, async_op=True)

    def _count(self, op: str, tensor: Tensor) -> None:
        self.traffic.calls[op] += 1
        self.traffic.payload_bytes[op] += tensor.numel() * tensor.element_size()


def _serve_pairwise(group: dist.ProcessGroup, *, name: str) -> Collectives:
    os.environ["ZCORE_COMM_HOST"] = str(dist.get_rank())  # a host for each rank
    try:
        return serve(group, name=name)
    finally:
        del os.environ["ZCORE_COMM_HOST"]


class _Offer:
    """What `choose_collectives` finds under an entry point; only here it is not the one that is installed."""

    def __init__(self, make: Serve) -> None:
        self._make = make

    def load(self) -> Serve:
        """See `zcore.core.extensions.Offer.load`."""
        return lambda group, name: Recorded(self._make(group, name=name), group, name=name)


@contextmanager
def _served_by(make: Serve) -> Iterator[None]:
    """Groups that are chosen in here are made by `make`, and seen by the recorder."""
    before = extensions.offered
    extensions.offered = lambda group: (_Offer(make),) if group == "zcore.collectives" else before(group)
    try:
        yield
    finally:
        extensions.offered = before


def _model(sizes: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(sizes)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _zcore(stage: int, make: Serve | None, sizes: GPTConfig, tokens: Tensor) -> Trainer:
    config = {
        "train_micro_batch_size_per_gpu": tokens.shape[0],
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": stage},
    }
    with nullcontext() if make is None else _served_by(make):
        engine = zero.initialize(_model(sizes), config, mesh=build_mesh(device_type="cpu", dp=-1))
    return Trainer(_step_of_engine(engine, tokens), engine)


def _deepspeed(stage: int, sizes: GPTConfig, tokens: Tensor) -> Trainer:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": tokens.shape[0],
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": stage},
        # Without the two it refuses torch's AdamW, and compiles one of its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = _model(sizes)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model), config=config)
    return Trainer(_step_of_engine(engine, tokens))


def _step_of_engine(engine: Callable[..., Tensor], tokens: Tensor) -> Step:
    """The step of zcore's engine and of DeepSpeed's, which are called alike."""

    def step() -> float:
        loss = engine(tokens[:, :-1], targets=tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def _fsdp2(sizes: GPTConfig, tokens: Tensor, *, reshards: bool) -> Trainer:
    model, mesh = _model(sizes), build_mesh(device_type="cpu", dp=-1)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshards)
    fully_shard(model, mesh=mesh)  # torch's default for a root: what it owns is kept until its gradients are there
    return _trainer(model, _optimizer(model), tokens)


def _wrapped(sizes: GPTConfig) -> nn.parallel.DistributedDataParallel:
    return nn.parallel.DistributedDataParallel(_model(sizes), gradient_as_bucket_view=True)


def _ddp(sizes: GPTConfig, tokens: Tensor) -> Trainer:
    model = _wrapped(sizes)
    return _trainer(model, _optimizer(model), tokens)


def _zero_redundancy(sizes: GPTConfig, tokens: Tensor) -> Trainer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import scripts functions, and warns of that

    model = _wrapped(sizes)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LEARNING_RATE, fused=True
    )
    return _trainer(model, optimizer, tokens)


def _trainer(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Trainer:
    return Trainer(_StepInTorch(model, optimizer, tokens))


class _StepInTorch:
    """The loop anyone would write, around what torch has wrapped."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
        self._model, self._optimizer, self._tokens = model, optimizer, tokens

    def __call__(self) -> float:
        """Step, with everything that DDP sends."""
        loss = self._model(self._tokens[:, :-1], targets=self._tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def alone(self) -> float:
        """Step on the gradients of this rank."""
        with self._model.no_sync():
            return self()


_BUILD: dict[str, Callable[[GPTConfig, Tensor], Trainer]] = {
    **{zcore_at(stage): partial(_zcore, stage, None) for stage in range(4)},
    "zcore 3 pairwise": partial(_zcore, 3, _serve_pairwise),
    "zcore 3 core": partial(_zcore, 3, TorchCollectives),
    "zcore 3 plain gloo": partial(_zcore, 3, PlainGloo),
    DDP: _ddp,
    "ZeroRedundancyOptimizer": _zero_redundancy,
    "FSDP2 kept whole": partial(_fsdp2, reshards=False),
    FSDP2: partial(_fsdp2, reshards=True),
    **{f"DeepSpeed {stage}": partial(_deepspeed, stage) for stage in (1, 2, 3)},
}


def load(name: str) -> None:
    """Import and start all that contender `name` is made of, so that what is weighed later is the training."""
    if name == "ZeroRedundancyOptimizer":
        import_module("torch.distributed.optim")
    elif name.startswith("DeepSpeed"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def build_trainers(names: Sequence[str], sizes: GPTConfig, tokens: Tensor) -> Iterator[tuple[str, Trainer]]:
    """Each of `names`, on `tokens` [sequences, context + 1] of this rank; every rank calls this.

    "no communication" takes the model of DDP, which comes before it: a set of states less to hold.
    """
    ddp: Trainer | None = None
    for name in names:
        if name == NO_COMMUNICATION:
            assert ddp is not None
            assert isinstance(ddp.step, _StepInTorch)
            yield name, Trainer(ddp.step.alone)
            continue
        load(name)
        trainer = _BUILD[name](sizes, tokens)
        ddp = trainer if name == DDP else ddp
        yield name, trainer
