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

from zcore.core import compat
from zcore.core.collectives import Collectives
from zcore.core.errors import MismatchError, StateError

__all__ = ["partition_inputs"]

LEAST_BYTES = 4096  # of an input that is spread
COMPARED_NUMEL = 1024  # of an input
# How much elements may differ of their mean size: on average, and each. Kernels that add in no fixed order round
# otherwise on each rank, by few units in the last place; another batch is off by one, and another dropout mask for some
# elements. In bf16 one with little weight can pass.
MEAN_ROUNDING, MOST_ROUNDING = 4.0, 64.0  # units in the last place
LEAST_EPS = 2e-5  # where a type has finer ones
LARGEST = 1e30  # what stands for infinity and NaN
COMPARED = 64  # inputs, from the first on: blocks that come after one with dropout are among them


class _Part(NamedTuple):
    """This rank's part of a tensor, in the order of its memory; all parts are equal, the last one padded."""

    part: Tensor
    dims: tuple[int, ...]  # of the tensor, from the one with the largest stride on
    sizes: tuple[int, ...]  # of these


class _Whole(NamedTuple):
    """What is not spread."""

    tensor: Tensor
    version: int


class _Passed(NamedTuple):
    """What is not spread, as the hooks below keep it."""

    kept: Any
    bring_back: Callable[[Any], Tensor]


def partition_inputs(
    run: Callable[..., Any], group: Collectives, *, least_bytes: int = LEAST_BYTES
) -> Callable[..., Any]:
    """`run`, which is torch's checkpoint of a function and its inputs, with inputs kept in parts over `group`.

    Every rank of the group has the same inputs, and goes backward through the same blocks in the same order. Raises
    MismatchError if one of the first 64 differs. Tensors inside of containers stay whole.
    """
    num_compared = 0

    def keep(tensor: Tensor, below: Any) -> _Part | _Whole | _Passed:
        nonlocal num_compared
        if not tensor.requires_grad or tensor.numel() * tensor.element_size() < least_bytes:
            return _Whole(tensor, tensor._version) if below is None else _Passed(below[0](tensor), below[1])
        if num_compared < COMPARED:
            num_compared += 1
            _compare(tensor, group, number=num_compared)
        dims = tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim]))
        ordered = tensor.detach().permute(dims)
        part_numel = -(-tensor.numel() // group.size)
        held = ordered.reshape(-1)[group.rank * part_numel :][:part_numel]
        part = held.new_zeros(part_numel)
        part[: held.numel()] = held
        return _Part(part, dims, tuple(ordered.shape))

    def bring_back(kept: _Part | _Whole | _Passed) -> Tensor:
        if isinstance(kept, _Passed):
            return kept.bring_back(kept.kept)
        if isinstance(kept, _Whole):
            if kept.tensor._version != kept.version:  # under hooks torch does not look
                raise StateError(
                    f"An input of a block that is computed again, of shape {tuple(kept.tensor.shape)}, was modified in "
                    "place after the block had run. Use an operation out of place, or clone() before it."
                )
            return kept.tensor
        part, dims, sizes = kept
        whole = group.empty(group.size * part.numel(), dtype=part.dtype, device=part.device)
        group.all_gather(whole, part, label="inputs of a block that is computed again").wait()
        ordered = whole[: torch.Size(sizes).numel()].view(sizes)
        return ordered.permute([dims.index(dim) for dim in range(len(dims))])

    def run_in_parts(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names, num_args = tuple(kwargs), len(args)

        def by_position(*values: Any) -> Any:  # a checkpoint saves what it is given so; what has a name it just holds
            return function(*values[:num_args], **dict(zip(names, values[num_args:], strict=True)))

        below = compat.saved_tensors_hooks_on_top()
        with saved_tensors_hooks(lambda tensor: keep(tensor, below), bring_back):  # those of the checkpoint come on top
            return run(by_position, *args, *kwargs.values())

    return run_in_parts


def _compare(tensor: Tensor, group: Collectives, *, number: int) -> None:
    """Raise MismatchError where ranks have other values; all of them come here with their input of that number."""
    stride = -(-tensor.numel() // COMPARED_NUMEL) | 1  # odd, or one column of many would be all that is seen
    sample = tensor.detach().reshape(-1)[::stride].float()
    own = sample.new_zeros(COMPARED_NUMEL)
    own[: sample.numel()] = sample.nan_to_num(LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
    told = own.new_empty(group.size * own.numel())
    group.all_gather(told, own, label=f"elements of input {number} of blocks").wait()
    of_ranks = told.view(group.size, -1)
    share = sample.numel() / COMPARED_NUMEL
    sizes, apart = of_ranks.abs(), (of_ranks - of_ranks[0]).abs()
    size = torch.where(sizes < LARGEST, sizes, 0.0).mean(1).max() / share  # what is not finite has none
    eps = max(torch.finfo(tensor.dtype).eps, LEAST_EPS)
    is_apart = apart > MOST_ROUNDING * eps * sizes.clamp(min=size)
    if is_apart.any() or apart.mean(1).max() / share > MEAN_ROUNDING * eps * size:
        raise MismatchError(
            f"Ranks that were to keep a part each of the same inputs have different ones: elements of number {number} "
            f"are {size:.3g} in size, and up to {apart.max():.3g} apart. Ranks along `tp` get the same batch and draw "
            "the same dropout: seed them alike, and leave partition_activations out where each has a part of the "
            "sequence."
        )
