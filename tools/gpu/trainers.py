"""One model, trained in plain torch, by torch's FSDP2 and by zcore: the same arithmetic behind one `step`.

bf16 means the same in all three: parameters computed in bf16 from fp32 masters, gradients accumulated, reduced and
clipped in fp32, fused AdamW on the masters.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from zcore import zero
from zcore.core.mesh import build_mesh

__all__ = ["Batch", "Plain", "Trainer", "Zcore", "build_trainer", "make_batch", "open_mesh"]

Batch = tuple[Tensor, Tensor]  # tokens, targets: [sequences, tokens] int64

LEARNING_RATE = 1e-3
CLIP_NORM = 1.0


class Trainer(Protocol):
    """Something that trains."""

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step over the mean of `batches`, one after the other; their mean loss."""
        ...


class Plain:
    """The loop anyone would write, with masters by hand where the model computes in bf16."""

    def __init__(self, model: nn.Module, *, in_bf16: bool) -> None:
        self.model = model
        self.params: list[Tensor] = list(model.parameters())
        self.masters: list[Tensor] = self.params
        if in_bf16:
            self.masters = [nn.Parameter(param.detach().clone()) for param in self.params]
            model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """See `Trainer.step`."""
        losses = []
        for tokens, targets in batches:
            loss = self.model(tokens, targets)
            (loss / len(batches)).backward()
            losses.append(loss.detach().float())
            if self.masters is not self.params:
                self._move_gradients()
        nn.utils.clip_grad_norm_(self.masters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.params:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.masters)
        return torch.stack(losses).mean()

    def _move_gradients(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
            param.grad = None


class Fsdp2:
    """torch's own sharding, block by block."""

    def __init__(self, model: GPT, *, in_bf16: bool, mesh: DeviceMesh) -> None:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if in_bf16 else MixedPrecisionPolicy()
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """See `Trainer.step`."""
        ((tokens, targets),) = batches
        loss: Tensor = self.model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Zcore:
    """zcore's engine at one stage."""

    def __init__(self, model: nn.Module, *, in_bf16: bool, mesh: DeviceMesh, stage: int, small_numel: int) -> None:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
            "gradient_clipping": CLIP_NORM,
            "bf16": {"enabled": in_bf16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": small_numel},
        }
        self.engine = zero.initialize(model, config, mesh=mesh)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """See `Trainer.step`."""
        ((tokens, targets),) = batches
        loss: Tensor = self.engine(tokens, targets)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


def build_trainer(kind: str, config: GPTConfig, *, mesh: DeviceMesh, in_bf16: bool = True) -> Trainer:
    """`kind` is plain, fsdp2 or zcore-<stage>; the model is born on the mesh's device, the same for every kind."""
    torch.manual_seed(0)
    with torch.device(mesh.device_type):
        model = GPT(config)
    if kind == "plain":
        return Plain(model, in_bf16=in_bf16)
    if kind == "fsdp2":
        return Fsdp2(model, in_bf16=in_bf16, mesh=mesh)
    # Norms stay whole and matrices do not, however small the model.
    stage, small_numel = int(kind.removeprefix("zcore-")), 8 * config.width
    return Zcore(model, in_bf16=in_bf16, mesh=mesh, stage=stage, small_numel=small_numel)


def make_batch(config: GPTConfig, device: torch.device, *, sequences: int, seed: int) -> Batch:
    """Random tokens, the same on every device; each token's target is itself, so that a model soon learns."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (sequences, config.context), generator=generator).to(device)
    return tokens, tokens


def open_mesh(device_type: str) -> DeviceMesh:
    """A data-parallel mesh over the ranks at hand, all of which use the one device."""
    if device_type == "cuda":
        torch.cuda.set_device(0)
        torch.cuda.init()  # before a mesh takes the local rank for the number of a device
    if dist.get_backend() == "gloo":  # init_device_mesh would move CUDA tensors by NCCL, which wants a device per rank
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device_type, mesh_dim_names=("dp",))
    return build_mesh(device_type=device_type, dp=-1)
