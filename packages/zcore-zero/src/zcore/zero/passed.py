"""Inputs that a module returns as they are, as a layer that is dropped at random does, and experts without a token.

Other ranks may go through the module in the same forward, and gather it again in their backward. Whoever passed its
input through does so at the same place: for that the result is made the module's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["own_results"]


class _Passed(torch.autograd.Function):
    """The identity, with a node of its own in the graph, which exists even where `x` has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor) -> Tensor:
        return x.clone()  # a view could not be edited in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def own_results(inputs: object, result: object, *, is_trained: Callable[[], bool]) -> object:
    """`result` of a module, with copies in a graph if it holds nothing but `inputs`: no mask that goes along.

    is_trained: whether the module has parameters to train, so that its results have a graph on other ranks.
    """
    given = {id(each) for each in tree_leaves(inputs)}
    numbers = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.is_floating_point()]
    if not numbers or any(id(each) not in given for each in numbers):
        return result
    token, has_graph = torch.empty(0, requires_grad=True), is_trained()

    def own(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not (has_graph or tensor.requires_grad):
            return tensor
        passed: Callable[..., Tensor] = _Passed.apply
        return passed(tensor, token)

    return tree_map_only(Tensor, own, result)
