"""Collectives for plain torch: the calls and argument order of torch's flat ones, served by zcore's.

    torch.distributed                    zcore.comm
    all_gather_single(output, input)     all_gather(output, input)        output [size * n]   input [n]
    reduce_scatter_single(output, input) reduce_scatter(output, input)    output [n]          input [size * n]
    all_to_all_single(output, input)     all_to_all(output, input)        output [size * n]   input [size * n]
    all_reduce(tensor)                   all_reduce(tensor)               in place
    broadcast(tensor, src)               broadcast(tensor, src)           in place
    barrier()                            barrier()

Tensors have any shape and are read in their memory's order, so they have to be contiguous. Arguments are checked before
anything is sent. What moves the data is chosen for each group at its first use (served.py).
"""

import operator
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.comm.calls.blocks import Block, open_block
from zcore.comm.calls.requests import DeferrableCollectives
from zcore.comm.calls.served import Served, current_device, served_of
from zcore.comm.calls.work import Work
from zcore.core.collectives import Pending, derived_label
from zcore.core.errors import ConfigError, LayoutError, StateError

__all__ = ["all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "empty", "reduce_scatter"]

UNNAMED = "unnamed"


def empty(
    numel: int,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """A new tensor [numel], born where the group's collectives can use it without a copy; its contents are undefined.

    For CPU ranks of one host that is memory which the other ranks read. It is given back when the tensor and its views
    are gone. `device` is by default what the group moves. Every rank makes the group's first call, and this may be it.

    Raises ConfigError for a negative size, what is no dtype of torch, or a device that the group does not move;
    StateError as `all_gather` does.
    """
    if not isinstance(dtype, torch.dtype):
        meant = (
            f"torch.{dtype}" if isinstance(getattr(torch, str(dtype), None), torch.dtype) else "such as torch.float32"
        )
        raise ConfigError(f"empty: dtype is {dtype!r}; expected a dtype of torch, {meant}.")
    served = served_of(group)
    device = served.device if device is None else torch.device(device)
    _check_device("empty", served, device)
    device = current_device(device.type) if device.index is None else device
    return served.collectives.empty(_checked_numel(numel), dtype=dtype, device=device)


def _checked_numel(numel: SupportsIndex) -> int:
    """As a number of Python's: one of 8 bits would overflow in the count of bytes."""
    try:
        count = operator.index(numel)
    except TypeError:  # no number, or none that counts
        count = -1
    if count < 0:
        raise ConfigError(f"empty: a buffer of {numel!r} elements was asked for; expected one number, 0 or more.")
    return count


def all_gather(
    output: Tensor,
    input: Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    label: str = UNNAMED,
    priority: int | None = None,
) -> Work | None:
    """Gather every rank's `input` into `output`, by rank.

    output: size * n elements; input: n, of the same dtype, any dtype; it may be this rank's own part of `output`.
    group: None is the default group; see `collectives_of` for its first use.
    async_op: return what is to be waited for; else wait, and return None.
    label: what reports and errors call the data; equal on every rank.
    priority: lower goes first inside `coalescing` and under `limit_in_flight`; equal on every rank.

    Raises LayoutError for tensors that are not contiguous, do not fit each other, or overlap otherwise; ConfigError for
    a dtype, device or op that the call does not take; StateError without a process group, for one that was destroyed,
    or on a rank outside it; and what `Work.wait` raises.
    """
    call = _Call("all_gather", group, async_op, label, priority)
    flat_output, flat_input = call.flat("output", output), call.flat("input", input)
    call.check_pair(flat_output, flat_input, whole=flat_output, part=flat_input)
    return call.finish(call.group.all_gather(flat_output, flat_input, label=label, priority=priority))


def reduce_scatter(
    output: Tensor,
    input: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    label: str = UNNAMED,
    priority: int | None = None,
) -> Work | None:
    """Sum every rank's `input` over ranks, and leave this rank's part of the sum in `output`.

    output: n elements; input: size * n, of the same dtype; `output` may be this rank's own part of `input`.
    op: SUM, or AVG: the sum divided by the group's size. Between CPU ranks sums have zcore's order, a tree over ranks;
    bool and 8-bit floats are not summed, and only floating-point numbers averaged.

    The rest is as for `all_gather`.
    """
    call = _Call("reduce_scatter", group, async_op, label, priority)
    flat_output, flat_input = call.flat("output", output), call.flat("input", input)
    call.check_pair(flat_output, flat_input, whole=flat_input, part=flat_output)
    divide, label = call.reduction(op, flat_output, label)
    pending = call.group.reduce_scatter(flat_output, flat_input, label=label, priority=priority)
    return call.finish(pending, divide, device=flat_output.device)


def all_reduce(
    tensor: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    label: str = UNNAMED,
    priority: int | None = None,
) -> Work | None:
    """Sum `tensor` over ranks, in place: afterwards it is the same on all of them, to the bit.

    op: SUM or AVG, and which dtypes, as for `reduce_scatter`. The rest is as for `all_gather`.
    """
    call = _Call("all_reduce", group, async_op, label, priority)
    flat = call.flat("tensor", tensor)
    divide, label = call.reduction(op, flat, label)
    pending = call.group.all_reduce(flat, label=label, priority=priority)
    return call.finish(pending, divide, device=flat.device)


def all_to_all(  # noqa: PLR0917 - torch's order
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    label: str = UNNAMED,
    priority: int | None = None,
) -> Work | None:
    """Send part r of `input` to rank r, and leave what rank r sends in part r of `output`.

    output, input: size * n elements of the same dtype, any dtype, in memory apart. Parts are equal: the split sizes
    keep the places that they have in torch, and anything but None raises LayoutError.

    The rest is as for `all_gather`.
    """
    call = _Call("all_to_all", group, async_op, label, priority)
    if output_split_sizes is not None or input_split_sizes is not None:
        raise LayoutError(
            f"{call}: split sizes {output_split_sizes} and {input_split_sizes} were given; expected None for both, as "
            "parts are equal here. Pad the parts, or call torch.distributed.all_to_all_single."
        )
    flat_output, flat_input = call.flat("output", output), call.flat("input", input)
    call.check_exchange(flat_output, flat_input)
    return call.finish(call.group.all_to_all(flat_output, flat_input, label=label, priority=priority))


def broadcast(
    tensor: Tensor,
    src: int | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    group_src: int | None = None,
    *,
    label: str = UNNAMED,
    priority: int | None = None,
) -> Work | None:
    """Give every rank the `tensor` of one of them, in place; any dtype.

    src: the source's global rank, as in torch; or group_src: its rank in the group. Either, not both, else ConfigError.
    The rest is as for `all_gather`.
    """
    call = _Call("broadcast", group, async_op, label, priority)
    flat = call.flat("tensor", tensor)
    source = call.source(src, group_src)
    return call.finish(call.group.broadcast(flat, src=source, label=label, priority=priority))


def barrier(group: dist.ProcessGroup | None = None, async_op: bool = False, *, label: str = UNNAMED) -> Work | None:
    """Return when every rank of the group has come here. The arguments are as for `all_gather`.

    Raises StateError inside a block of `coalescing`, where calls start at the end.
    """
    call = _Call("barrier", group, async_op, label)
    if call.block is not None:
        raise StateError(
            f"{call}: calls of a block of `coalescing` start at its end. Call it before or after the block."
        )
    token = torch.zeros(1, device=call.served.device)
    return call.finish(
        call.group.all_reduce(token, label="barrier" if label == UNNAMED else f"barrier {label}"), token.item
    )  # on CUDA the host waits, too


class _Call:
    """What the functions have in common: who serves, and what is refused."""

    def __init__(
        self, op: str, group: dist.ProcessGroup | None, async_op: bool, label: str, priority: int | None = None
    ) -> None:
        self._op = op
        self._async_op = async_op
        self.served: Served = served_of(group)
        if not isinstance(label, str):
            raise ConfigError(f"{self}: label is {label!r}; expected a string, the same on every rank.")
        if priority is not None and not isinstance(priority, int):
            raise ConfigError(f"{self}: priority is {priority!r}; expected an integer, lower ones first, or None.")
        self.block: Block | None = open_block(self.served.collectives)
        self.group: DeferrableCollectives = self.served.collectives if self.block is None else self.block.collectives

    def __str__(self) -> str:
        return f"{self._op} of {self.served.name}"

    def finish(
        self, pending: Pending, act: Callable[[], object] | None = None, *, device: torch.device | None = None
    ) -> Work | None:
        """What the function returns; `act` follows the call once somebody waits for it, on `device`."""
        work = Work(pending, act, device=device)
        if self._async_op:
            return work
        if self.block is None:
            work.wait()
        else:
            self.block.at_end(work.wait)
        return None

    def flat(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` as [numel], a view outside of autograd."""
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"{self}: {name} is a {type(tensor).__name__}; expected one tensor, as for torch's flat calls. "
                "Join lists of tensors with torch.cat, or make the calls in a block of `coalescing`."
            )
        _check_device(str(self), self.served, tensor.device, name=name)
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            is_strided = tensor.layout == torch.strided
            layout = f"strides {tensor.stride()}" if is_strided else str(tensor.layout)
            raise LayoutError(
                f"{self}: {name} has shape {tuple(tensor.shape)} and {layout}; expected contiguous memory. Pass "
                f"{name}.{'contiguous' if is_strided else 'to_dense'}(), and where it is written copy the result back."
            )
        return tensor.detach().view(-1)

    def check_pair(self, output: Tensor, input: Tensor, *, whole: Tensor, part: Tensor) -> None:
        """Refuse sides of which one is not size times the other, or that overlap but not as its own part."""
        self._check_same(output, input)
        size = self.group.size
        if whole.numel() != size * part.numel():
            sides = "output", "input"
            larger, smaller = sides if whole is output else sides[::-1]
            raise LayoutError(
                f"{self}: {larger} has {whole.numel()} elements and {smaller} {part.numel()}; expected {larger} to "
                f"have {size} times as many, one part for each rank. Pad them."
            )
        own = whole[self.group.rank * part.numel() : (self.group.rank + 1) * part.numel()]
        if own.data_ptr() != part.data_ptr():
            self._refuse_overlap(whole, part)

    def check_exchange(self, output: Tensor, input: Tensor) -> None:
        """Refuse sides that are not equally many parts for the ranks, or overlap."""
        self._check_same(output, input)
        if output.numel() != input.numel() or input.numel() % self.group.size:
            raise LayoutError(
                f"{self}: output has {output.numel()} elements and input {input.numel()}; expected as many in both, a "
                f"multiple of the group's {self.group.size} ranks. Pad them."
            )
        self._refuse_overlap(output, input)

    def reduction(
        self, op: dist.ReduceOp.RedOpType, result: Tensor, label: str
    ) -> tuple[Callable[[], object] | None, str]:
        """What is left to do after the sum, and its label, by which ranks see whether all ask for the same.

        Refuses what is no sum.
        """
        dtype, size = result.dtype, self.group.size
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ConfigError(
                f"{self}: op is {getattr(op, 'name', repr(op))}; expected ReduceOp.SUM or ReduceOp.AVG. For others "
                "call torch.distributed."
            )
        if dtype == torch.bool or (dtype.is_floating_point and dtype.itemsize == 1):
            raise ConfigError(f"{self}: sums of {dtype} are not defined; expected a wider dtype. Cast the tensor.")
        if op != dist.ReduceOp.AVG:
            return None, label
        if not (dtype.is_floating_point or dtype.is_complex):
            raise ConfigError(f"{self}: a mean of {dtype} is no {dtype}; expected floating-point numbers, or SUM.")
        return lambda: result.div_(size), derived_label(f"mean of {label}", parts=[label])

    def source(self, src: int | None, group_src: int | None) -> int:
        """The source's rank in the group."""
        if (src is None) == (group_src is None):
            raise ConfigError(
                f"{self}: src is {src} and group_src {group_src}; expected one of them, the source's global rank or "
                "its rank in the group."
            )
        ranks = dist.get_process_group_ranks(self.served.group)
        if src is not None and src in ranks:
            return ranks.index(src)
        if isinstance(group_src, int) and 0 <= group_src < len(ranks):
            return group_src
        named = f"src is {src!r}" if src is not None else f"group_src is {group_src!r}"
        raise ConfigError(
            f"{self}: {named}; expected one of the group's global ranks {ranks}, or as group_src 0 to {len(ranks) - 1}."
        )

    def _check_same(self, output: Tensor, input: Tensor) -> None:
        for what in ("dtype", "device"):
            if getattr(output, what) != getattr(input, what):
                raise ConfigError(
                    f"{self}: output has {what} {getattr(output, what)} and input {getattr(input, what)}; expected the "
                    "same. Convert one of them."
                )

    def _refuse_overlap(self, one: Tensor, other: Tensor) -> None:
        low, high = other.data_ptr(), other.data_ptr() + other.numel() * other.element_size()
        if one.data_ptr() < high and low < one.data_ptr() + one.numel() * one.element_size():
            raise LayoutError(
                f"{self}: output and input overlap; expected memory apart, or for all_gather and reduce_scatter the "
                "smaller side as this rank's own part of the larger one. Clone the input."
            )


def _check_device(what: str, served: Served, device: torch.device, *, name: str = "device") -> None:
    if device.type not in served.device_types:
        raise ConfigError(
            f"{what}: {name} is {'' if name == 'device' else 'on '}{device}; the group moves tensors on "
            f"{' and '.join(served.device_types)}. Move it, or make a group with a backend for it."
        )
