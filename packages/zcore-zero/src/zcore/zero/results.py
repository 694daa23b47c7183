"""What a module has returned: its tensors, the nodes of autograd that made them, and inputs that it only passed on.

A layer that is dropped at random returns its input as it is, as do experts without a token. Other ranks may go through
the module in the same forward, and gather it again in their backward. Whoever passed its input on does so at the same
place: for that the result is made the module's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from zcore.core import compat

__all__ = ["nodes_of", "own_results", "tensors_in"]


def nodes_of(result: object, *, since: int) -> Sequence[Node]:
    """The nodes of autograd that have made the tensors in `result`, each one once.

    Not those from before `since`, as autograd counts: what they have made only passes through.
    """
    if type(result) is Tensor:  # asked for each module, so kept short
        node = result.grad_fn
        return (node,) if node is not None and node._sequence_nr() >= since else ()
    nodes: list[Node] = []
    for tensor in tensors_in(result):
        node = tensor.grad_fn
        if node is not None and node._sequence_nr() >= since and node not in nodes:
            nodes.append(node)
    return nodes


def tensors_in(value: object) -> Sequence[Tensor]:
    """The tensors of nested containers, and of objects with attributes such as a dataclass, each one once."""
    if isinstance(value, Tensor):
        return (value,)
    found: list[Tensor] = []
    to_look_at, seen = [value], set[int]()
    while to_look_at:
        for leaf in compat.tree_leaves(to_look_at.pop()):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif not isinstance(leaf, nn.Module | type) and hasattr(leaf, "__dict__") and id(leaf) not in seen:
                seen.add(id(leaf))
                to_look_at.append(list(vars(leaf).values()))
    return found


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
