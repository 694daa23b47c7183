"""One model trained in fp32 on the ranks of this host, the same arithmetic behind one `step` whoever shards.

zcore, plain gloo       ZeRO-3 over torch.distributed's own all_gather and reduce_scatter
zcore, core             ZeRO-3 as without zcore-comm: the core's exchange and sum over gloo
zcore, pairwise         ZeRO-3 as between hosts
zcore, shared memory    ZeRO-3 as zcore-comm serves it on one host
DDP, FSDP2              torch's own, over gloo
no communication        DDP's step within no_sync: what the ranks compute, nothing sent; its losses mean nothing
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from zcore import zero
from zcore.comm.choice import serve
from zcore.comm.recorded import Recorded
from zcore.core import compat, extensions
from zcore.core.collectives import Collectives, Pending
from zcore.core.mesh import build_mesh
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["KINDS", "Step", "build_step"]

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


def build_step(kind: str, sizes: GPTConfig, tokens: Tensor) -> Step:
    """A step of `kind`, on `tokens` [sequences, context + 1] of this rank; every rank calls this."""
    torch.manual_seed(0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model = GPT(sizes)
    if kind in SERVED:
        with _served_by(SERVED[kind]):
            engine = zero.initialize(model, ZERO, mesh=build_mesh(device_type="cpu", dp=-1))

        def zero_step() -> float:
            loss = engine(inputs, targets=targets)
            engine.backward(loss)
            engine.step()
            return loss.item()

        return zero_step
    if kind == "FSDP2":
        mesh = build_mesh(device_type="cpu", dp=-1)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        wrapped: nn.Module = model
    else:
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> float:
        with wrapped.no_sync() if kind == "no communication" else nullcontext():
            loss = wrapped(inputs, targets)
            loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
