"""One model trained in fp32 on the ranks of this host, the same arithmetic behind one `step` whoever shards.

zcore, plain gloo       ZeRO-3 over torch.distributed's own all_gather and reduce_scatter
zcore, core             ZeRO-3 as without zcore-comm: the core's exchange and sum over gloo
zcore, pairwise         ZeRO-3 as between hosts
zcore, shared memory    ZeRO-3 as zcore-comm serves it on one host
DDP, FSDP2              torch's own, over gloo
no communication        DDP's step within no_sync: what the ranks compute, nothing sent; its losses mean nothing
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from zcore import zero
from zcore.comm.choice import serve
from zcore.comm.recording.recorded import Recorded
from zcore.core import compat, extensions
from zcore.core.collectives import Collectives, Pending
from zcore.core.mesh import build_mesh
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["KINDS", "Step", "build_steps"]

LEARNING_RATE = 1e-3
CLIP_NORM = 1.0
ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
    "gradient_clipping": CLIP_NORM,
    "zero_optimization": {"stage": 3},
}

Step = Callable[[], float]  # one optimizer step; its loss
Serve = Callable[..., Collectives]
Trained = tuple[nn.Module, torch.optim.Optimizer]


class PlainGloo(TorchCollectives):
    """The contract with nothing of ours in its reductions."""

    def __init__(self, group: dist.ProcessGroup, *, name: str) -> None:
        super().__init__(group, name=name)
        self._plain = group

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """See `Collectives.reduce_scatter`."""
        self.traffic.calls["reduce_scatter"] += 1
        return compat.reduce_scatter_flat(output, input, group=self._plain)

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """See `Collectives.all_reduce`."""
        self.traffic.calls["all_reduce"] += 1
        return dist.all_reduce(tensor, group=self._plain, async_op=True)


def _serve_pairwise(group: dist.ProcessGroup, *, name: str) -> Collectives:
    os.environ["ZCORE_COMM_HOST"] = str(dist.get_rank())  # a host for each rank
    try:
        return serve(group, name=name)
    finally:
        del os.environ["ZCORE_COMM_HOST"]


SERVED: dict[str, Serve] = {
    "zcore, plain gloo": PlainGloo,
    "zcore, core": TorchCollectives,
    "zcore, pairwise": _serve_pairwise,
    "zcore, shared memory": serve,
}
KINDS = (*SERVED, "DDP", "FSDP2", "no communication")


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


def build_steps(kinds: Sequence[str], sizes: GPTConfig, tokens: Tensor) -> Iterator[tuple[str, Step]]:
    """A step of each of `kinds`, on `tokens` [sequences, context + 1] of this rank; every rank calls this.

    DDP's model is also that of "no communication", which comes last: a set of states less to hold.
    """
    ddp: Trained | None = None
    for kind in kinds:
        if kind in SERVED:
            yield kind, _zero_step(SERVED[kind], sizes, tokens)
        elif kind == "FSDP2":
            yield kind, _step_of(_fsdp2(sizes), tokens)
        else:
            ddp = ddp or _ddp(sizes)
            yield kind, _step_of(ddp, tokens, sends=kind == "DDP")


def _model(sizes: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(sizes)


def _zero_step(make: Serve, sizes: GPTConfig, tokens: Tensor) -> Step:
    with _served_by(make):
        engine = zero.initialize(_model(sizes), ZERO, mesh=build_mesh(device_type="cpu", dp=-1))

    def step() -> float:
        loss = engine(tokens[:, :-1], targets=tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def _fsdp2(sizes: GPTConfig) -> Trained:
    model, mesh = _model(sizes), build_mesh(device_type="cpu", dp=-1)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    return model, _optimizer(model)


def _ddp(sizes: GPTConfig) -> Trained:
    model = nn.parallel.DistributedDataParallel(_model(sizes), gradient_as_bucket_view=True)
    return model, _optimizer(model)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _step_of(trained: Trained, tokens: Tensor, *, sends: bool = True) -> Step:
    model, optimizer = trained

    def step() -> float:
        with nullcontext() if sends else model.no_sync():
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
