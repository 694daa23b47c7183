"""Inputs that blocks keep for computing again, spread over tensor-parallel ranks, which all hold the same ones.

    rank 0   |input of block 1       |    kept |part 0 |        all-gathered when block 1 is computed again,
    rank 1   |input of block 1       |    kept        |part 1 |  on every rank at the same place of its backward

What travels along the layers is kept so, that is what has a gradient; masks and positions are one tensor for all blocks
and stay whole, as does what is too small to be worth a message (Rajbhandari et al., arXiv 1910.02054, sec. 6.1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from zcore.core.collectives import Collectives

__all__ = ["partition_inputs"]

LEAST_BYTES = 4096  # of an input that is spread


class _Part(NamedTuple):
    """This rank's part of a tensor, flat; all parts are equal, the last one padded."""

    part: Tensor
    shape: torch.Size


def partition_inputs(
    run: Callable[..., Any], group: Collectives, *, least_bytes: int = LEAST_BYTES
) -> Callable[..., Any]:
    """`run`, which is torch's checkpoint of a function and its inputs, with inputs kept in parts over `group`.

    Every rank of the group has the same inputs, and goes backward through the same blocks in the same order.
    """

    def keep(tensor: Tensor) -> Tensor | _Part:
        if not tensor.requires_grad or tensor.numel() * tensor.element_size() < least_bytes:
            return tensor
        part_numel = -(-tensor.numel() // group.size)
        held = tensor.detach().reshape(-1)[group.rank * part_numel :][:part_numel]
        part = held.new_zeros(part_numel)
        part[: held.numel()] = held
        return _Part(part, tensor.shape)

    def bring_back(kept: Tensor | _Part) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        whole = group.empty(group.size * kept.part.numel(), dtype=kept.part.dtype, device=kept.part.device)
        group.all_gather(whole, kept.part, label="inputs of a block that is computed again").wait()
        return whole[: kept.shape.numel()].view(kept.shape)

    def run_in_parts(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(keep, bring_back):  # below those of the checkpoint: they see the inputs alone
            return run(*args, **kwargs)

    return run_in_parts
