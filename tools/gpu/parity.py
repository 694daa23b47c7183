"""Does zcore train on this device as plain torch does? Losses of every stage, in fp32 and bf16, step by step.

one rank     NCCL on CUDA, gloo on CPU; with nobody to share with every stage is stage 0 and sends nothing
two ranks    gloo, both on the one device, half of each batch each; plain torch takes the halves one after the other
"""

import os

import torch
import torch.distributed as dist
from gpt import GPTConfig
from gpu.trainers import build_trainer, make_batch, open_mesh

from zcore.core.device import backend_for
from zcore.core.testing import RankFailed, run_ranks

__all__ = ["compare_losses"]

STAGES = ("zcore-0", "zcore-1", "zcore-2", "zcore-3")
# Relative to the loss. Atomic adds and fused kernels sum in an order of their own; bf16 keeps 8 bits of a loss.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
SIZES = {
    True: GPTConfig(vocab_size=61, context=16, layers=2, width=32, heads=2),
    False: GPTConfig(vocab_size=2048, context=256, layers=4, width=256, heads=4),
}

Losses = dict[str, dict[str, list[float]]]  # by precision and trainer, one for each step


def compare_losses(device_type: str, *, is_quick: bool) -> dict[str, object]:
    """Train on one and on two ranks; the largest relative difference of a loss by precision and stage."""
    num_steps = 3 if is_quick else 10
    backend = backend_for(torch.device(device_type))
    alone = run_ranks(1, train_all, device_type, is_quick, num_steps, backend=backend, deadline_s=240)
    figures: dict[str, object] = {"tolerance": TOLERANCES, "steps": num_steps, "one_rank": _differences(alone)}
    try:
        run_ranks(2, try_gloo, device_type, deadline_s=120)
    except RankFailed as error:  # gloo's limit, not zcore's
        figures["two_ranks"] = f"refused: gloo does not move {device_type} tensors here: {error}"
    else:
        pair = run_ranks(2, train_all, device_type, is_quick, num_steps, deadline_s=240)
        figures["two_ranks"] = _differences(pair)
    if any(_exceeds(figures[key]) for key in ("one_rank", "two_ranks")):
        figures |= {"status": "failed", "reason": "A loss differs from plain torch's by more than the tolerance."}
    return figures


def train_all(device_type: str, is_quick: bool, num_steps: int) -> Losses:
    """On each rank: train plain torch on the whole batches, and every stage on this rank's part of them."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts: products then repeat to the bit
    torch.use_deterministic_algorithms(True, warn_only=True)
    mesh, config, rank = open_mesh(device_type), SIZES[is_quick], dist.get_rank()
    dist.all_reduce(torch.ones(1, device=device_type))  # zcore sends nothing on one rank: so that NCCL is used at all
    batches = [
        [
            make_batch(config, torch.device(device_type), sequences=4, seed=2 * step + part)
            for part in range(dist.get_world_size())
        ]
        for step in range(num_steps)
    ]
    losses: Losses = {}
    for precision in TOLERANCES:
        losses[precision] = {}
        for kind in ("plain", *STAGES):
            trainer = build_trainer(kind, config, mesh=mesh, in_bf16=precision == "bf16")
            parts = [whole if kind == "plain" else [whole[rank]] for whole in batches]
            losses[precision][kind] = [trainer.step(part).item() for part in parts]
    return losses


def try_gloo(device_type: str) -> None:
    """Make the calls that zcore makes of gloo, with tensors of the device."""
    if device_type == "cuda":
        torch.cuda.set_device(0)
    sent = torch.full((2,), dist.get_rank(), dtype=torch.uint8, device=device_type)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, async_op=True).wait()
    assert received.tolist() == [0, 1]
    dist.all_gather_into_tensor(torch.cat((sent, sent)), sent, async_op=True).wait()
    dist.broadcast(sent, group_src=0, async_op=True).wait()


def _differences(of_ranks: list[Losses]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for precision in TOLERANCES:
        runs = [losses[precision] for losses in of_ranks]
        found[precision] = {"first_loss": runs[0]["plain"][0], "last_loss": runs[0]["plain"][-1]}
        for kind in STAGES:
            means = [sum(step) / len(runs) for step in zip(*(run[kind] for run in runs), strict=True)]
            pairs = zip(means, runs[0]["plain"], strict=True)
            found[precision][kind] = max(abs(loss - plain) / plain for loss, plain in pairs)
    return found


def _exceeds(differences: object) -> bool:
    if not isinstance(differences, dict):
        return False
    # Negated, so that a NaN exceeds.
    return not all(differences[name][kind] <= limit for name, limit in TOLERANCES.items() for kind in STAGES)
