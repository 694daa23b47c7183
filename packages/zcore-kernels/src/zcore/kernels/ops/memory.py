"""Which tensors compiled code can read at their address, and which calls torch has to take instead.

    a plain tensor or parameter           by address
    FakeTensor, or any under a mode       through torch, which calls the op's fake implementation or the mode
    another subclass that dispatches      through torch, which asks the subclass
    DTensor                               refused: its shard is the tensor to pass
    made by vmap or another of            refused: no memory of its own, and no rule for the op
      torch.func's transforms
    freed (its storage resized to 0)      refused: address 0
    with a lazy sign or conjugation       refused: memory has other values than the tensor

Whoever is about to take an address asks `require_memory`, or `all_have_memory` of many tensors, which is quicker.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from zcore.core.errors import LayoutError

__all__ = ["all_have_memory", "any_needs_torch", "is_plain", "lists_need_torch", "require_memory"]

PLAIN = frozenset({Tensor, torch.nn.Parameter})
ORDINARY = PLAIN | {int, float, bool, str, type(None), torch.dtype, torch.device}

# Bound once: these are asked in every step, of every tensor.
_flat = chain.from_iterable
_num_modes = torch._C._len_torch_dispatch_stack
_data_ptr, _is_neg = Tensor.data_ptr, Tensor.is_neg


def is_plain(tensor: Tensor) -> bool:
    """Whether torch itself computes with `tensor`: no subclass says how."""
    return type(tensor) in PLAIN or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def lists_need_torch(op: str, lists: Sequence[Iterable[object]]) -> bool:
    """Whether a call of `op` with these lists of tensors has to go through torch. Raises LayoutError for a DTensor."""
    if _num_modes():
        return True
    try:
        return not PLAIN.issuperset(map(type, _flat(lists))) and any(_needs_torch(op, each) for each in _flat(lists))
    except TypeError:  # what is no list is refused by name where the table is read
        return False


def any_needs_torch(op: str, operands: Sequence[object]) -> bool:
    """The same of operands among which are tensors, lists of them, and settings."""
    if _num_modes():
        return True
    return not ORDINARY.issuperset(map(type, operands)) and any(_needs_torch(op, each) for each in operands)


def _needs_torch(op: str, operand: object) -> bool:
    if isinstance(operand, list | tuple):
        return any(_needs_torch(op, each) for each in operand)
    if not isinstance(operand, Tensor) or is_plain(operand):
        return False
    if hasattr(operand, "to_local"):
        raise LayoutError(
            f"{op} got a {type(operand).__name__} of shape {tuple(operand.shape)}; expected plain tensors. Pass "
            "`tensor.to_local()`, the shard that this rank holds, where the op may be computed shard by shard."
        )
    return True


def all_have_memory(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all tensors of these lists pass `require_memory`; False, too, for some that pass, as empty ones."""
    tensors = [*_flat(lists)]
    return all(map(_data_ptr, tensors)) and not any(map(_is_neg, tensors))


def require_memory(what: str, tensor: Tensor) -> None:
    """Raise LayoutError unless the elements of `tensor` stand at its address; `what` begins the message."""
    try:
        has_memory = tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError as error:  # torch's, of tensors without storage
        raise LayoutError(
            f"{what}, of shape {tuple(tensor.shape)}, has no memory, as inside torch.vmap and other transforms of "
            "torch.func; expected a plain tensor. Call the op outside, on all of it, or set ZCORE_OPS=reference."
        ) from error
    if not has_memory:
        raise LayoutError(
            f"{what}, a {type(tensor).__name__} of shape {tuple(tensor.shape)}, has no memory (address 0); expected a "
            "tensor with its elements. Its storage was freed, or it stands for others: gather or materialize it first."
        )
    if tensor.is_neg() or tensor.is_conj():
        bit, remedy = ("negated", "resolve_neg") if tensor.is_neg() else ("conjugated", "resolve_conj")
        raise LayoutError(
            f"{what}, of shape {tuple(tensor.shape)}, is {bit} lazily, so its memory has other values; expected memory "
            f"as it reads. Pass `tensor.{remedy}()`, and copy back what is written."
        )
