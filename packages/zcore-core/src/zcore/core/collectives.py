r"""The `Collectives` contract: one process group's collectives on flat tensors, and what every implementation shares.

Every call starts at once and returns a `Pending`; nobody reads or writes the tensors before its `wait()`. Ranks start
their calls in one order, and every rank waits for every call: one may be complete only when all have. The group also
says where a buffer is born, so that an implementation may put it into pages that its ranks share.

Sums have ONE order, whoever serves: a balanced binary tree over the ranks, a function of rank alone.

    rank   0   1   2   3   4       A sum over 4 ranks equals a sum over 2 hosts of 2 ranks, bit for bit, so flat and
            \ /     \ /    |       hierarchical sharding, and every implementation, give the same gradients.
            0+1     2+3    4
               \   /       |       gloo's own reductions split the tensor into segments and start each at another rank:
                +          4       their order depends on where an element lies. They are also slower than an exchange
                 \________/        and one sum (16 MiB, 2 ranks: 20.5 ms against 5.6). NCCL reduces in its own order.
"""

import re
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zcore.core.errors import CollectiveError, LayoutError
from zcore.core.quantities import shown_bytes

__all__ = [
    "Call",
    "CallLog",
    "Collectives",
    "Pending",
    "Traffic",
    "check_slots",
    "contents_of",
    "derived_label",
    "failed_collective",
    "last_collective",
    "tag_of",
    "tell_contents",
    "tree_sum",
]

NAMED_CONTENTS, NAMED_BUCKETS = 4, 4  # parameters of a bucket that an error names; buckets that went out as one
SUM_BLOCK_BYTES = 128 * 1024  # partial sums of more than two ranks stay in the cache


@dataclass(frozen=True, slots=True)
class Call:
    """One started collective, as reports and tests read it."""

    op: str
    label: str  # whose data: a bucket's name, or what the step needs it for
    numel: int
    dtype: torch.dtype
    payload_bytes: int  # of the larger side: the gathered output, the scattered input
    group: str
    index: int  # position among this group's calls, equal on every rank; messages are counted apart

    def __str__(self) -> str:
        data = f"{self.numel} x {str(self.dtype).removeprefix('torch.')}, {shown_bytes(self.payload_bytes)}"
        return f"{self.op} {self.label} (#{self.index} of {self.group}: {data})"


def tag_of(call: Call) -> int:
    """A number for messages of `call`, equal on ranks that make the same one: others' are never taken for them."""
    told_apart = call.group, call.index, call.op, call.label, call.numel, call.dtype
    return zlib.crc32(repr(told_apart).encode()) >> 4  # less than exchange.STEP_TAGS


def check_slots(op: str, label: str, *, whole: Tensor, slot: Tensor, size: int) -> None:
    """Raise LayoutError where `whole` is not one slot for each rank."""
    if whole.numel() != size * slot.numel():
        raise LayoutError(
            f"{op} {label}: a whole of {whole.numel()} elements and a part of {slot.numel()} over {size} "
            "ranks; the whole has to be as many equal parts as there are ranks. Pad it."
        )


_recent: deque[Call] = deque(maxlen=1)  # for the report on a hung process, which must not need its cooperation


def last_collective() -> str | None:
    """The collective that this process started last, or None before the first."""
    return str(_recent[-1]) if _recent else None


_contents: dict[str, tuple[str, ...]] = {}


def tell_contents(label: str, names: Sequence[str]) -> None:
    """Have errors say which parameters lie in the data that calls name `label`."""
    _contents[label] = tuple(names)


_parts: dict[str, tuple[str, ...]] = {}  # derived label -> those of its data that have contents


def derived_label(label: str, *, parts: Sequence[str]) -> str:
    """`label`, for a call with the data that others name `parts`: errors say what lies in these."""
    told = tuple(each for part in parts for each in _parts.get(part, (part,)) if each in _contents)
    if told:  # what counts steps has none, and would fill the memory
        _parts[label] = told
    return label


def contents_of(label: str) -> str:
    """Sentences with what `tell_contents` was given, and a space before each; else nothing.

    >>> tell_contents("grads.0", ["layer.weight", "layer.bias"])
    >>> contents_of(derived_label("mean of grads.0", parts=["grads.0"]))
    ' Bucket grads.0 holds layer.weight, layer.bias.'
    """
    buckets = _parts.get(label, (label,))
    told = "".join(_contents_of_one(each) for each in buckets[:NAMED_BUCKETS])
    return f"{told} {more} more buckets go with them." if (more := len(buckets) - NAMED_BUCKETS) > 0 else told


def _contents_of_one(label: str) -> str:
    names = _contents.get(label, ())
    if not names:
        return ""
    more = f" and {len(names) - NAMED_CONTENTS} more parameters" if len(names) > NAMED_CONTENTS else ""
    return f" Bucket {label} holds {', '.join(names[:NAMED_CONTENTS])}{more}."


@dataclass(slots=True)
class Traffic:
    """How often and with how many bytes each collective of a group was called."""

    calls: Counter[str] = field(default_factory=Counter)
    payload_bytes: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Start counting anew."""
        self.calls.clear()
        self.payload_bytes.clear()


class Pending(Protocol):
    """A collective on its way."""

    def wait(self) -> object:
        """Return when the result is there (on CUDA: when the current stream is ordered behind it); nothing of meaning.

        Raises CollectiveError if a rank died or left. Waiting twice is allowed.
        """
        ...


class Collectives(Protocol):
    """What zcore asks of a process group. All tensors are flat and contiguous; reductions are sums."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        ...

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What went through the group so far."""
        ...

    def empty(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new flat buffer, born where this group's collectives can use it without a copy."""
        ...

    def free_storage(self, buffer: Tensor) -> None:
        """Give the memory of a buffer from `empty` back. The tensor and its views stay, without contents."""
        ...

    def alloc_storage(self, buffer: Tensor) -> None:
        """Give a freed buffer memory again; its contents are undefined. No effect on one that has memory."""
        ...

    def own_storage(self, buffer: Tensor) -> None:
        """Let `buffer` be written: memory that several ranks hold since an `all_gather` becomes a copy of its own."""
        ...

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """`output[r * n:(r + 1) * n] = input of rank r`, cast to its dtype; `input` may be the own slot of `output`.

        Where `output` is a freed buffer it gets memory, which ranks of one host may hold together: read it only, or
        call `own_storage` first.
        """
        ...

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """`output = sum over ranks of input[rank * n:(rank + 1) * n]`; `output` may be the own slot of `input`."""
        ...

    def all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """`tensor = sum over ranks of tensor`, in place."""
        ...

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str) -> Pending:
        """Slot r of `input` goes to rank r; slot r of `output` comes from it."""
        ...

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """`tensor = tensor of rank src`, `src` being a rank in the group."""
        ...

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """Send to rank `dst` of the group, which must `recv`."""
        ...

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """Receive from rank `src` of the group."""
        ...


def tree_sum(parts: Sequence[Tensor], *, out: Tensor) -> None:
    """Sum equal flat tensors into `out` as a balanced binary tree over their index; `parts` stay as they are.

    `out` may be one of `parts`, or share no memory with them.

    >>> total = torch.empty(1)
    >>> tree_sum([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])], out=total)
    >>> total.item()
    7.0
    """
    if len(parts) <= 2:
        torch.add(parts[0], parts[1], out=out) if len(parts) == 2 else out.copy_(parts[0])
        return
    block_numel = max(1, SUM_BLOCK_BYTES // out.element_size())
    scratch = out.new_empty(2 * (len(parts) - 1).bit_length(), min(block_numel, out.numel()))
    for low in range(0, out.numel(), block_numel):
        block = out[low : low + block_numel]
        _sum_of([part[low : low + block_numel] for part in parts], block, scratch[:, : block.numel()])


def _sum_of(parts: Sequence[Tensor], out: Tensor, scratch: Tensor) -> Tensor:
    """The sum, in `out` if there are several parts. `out` is written last, as it may be one of them."""
    if len(parts) == 1:
        return parts[0]
    left = 1 << ((len(parts) - 1).bit_length() - 1)  # as many as make a whole tree
    return torch.add(
        _sum_of(parts[:left], scratch[0], scratch[1:]), _sum_of(parts[left:], scratch[1], scratch[2:]), out=out
    )


class CallLog:
    """Counts and names the calls of one group; every implementation keeps one."""

    def __init__(self, group: str, traffic: Traffic | None = None) -> None:
        self.traffic = Traffic() if traffic is None else traffic  # given where another implementation counts, too
        self._group = group
        self._num_calls: Counter[bool] = Counter()  # of collectives; of messages, which two ranks know of

    def note(self, op: str, label: str, tensor: Tensor) -> Call:
        """A call of `op` starts; `tensor` is the larger side."""
        payload_bytes = tensor.numel() * tensor.element_size()
        is_message = op in ("send", "recv")
        index = self._num_calls[is_message]
        self._num_calls[is_message] += 1
        call = Call(op, label, tensor.numel(), tensor.dtype, payload_bytes, self._group, index)
        self.traffic.calls[op] += 1
        self.traffic.payload_bytes[op] += payload_bytes
        _recent.append(call)
        return call


def failed_collective(call: Call, error: BaseException) -> CollectiveError:
    """The paragraph a user reads when a peer is gone."""
    reason = str(error).splitlines()[0].encode("ascii", "ignore").decode()
    reason = re.sub(r"\s*\b(GLHF|Good luck)\b.*", "", reason).strip()  # gloo wishes well, with a pictogram
    return CollectiveError(
        f"{call} did not complete: another rank has raised, was killed, took another path through the model, or did "
        f"not reach this call within the process group's timeout.{contents_of(call.label)} Look for the first error in "
        "the other ranks' output, mend it, and restart all ranks from the last checkpoint. (The backend's words: "
        f"{reason})"
    )
