"""A collective as data, before it is started, and a group whose calls are handed over as such.

    caller --call--> DeferrableCollectives --Request--> start: whoever decides when, and joined with what
                                                          `--> request.start_on(group), now or later

Here nothing is decided. Sending and receiving are not deferred, as only some ranks of a group make them.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from zcore.comm.around import Around
from zcore.core.collectives import Collectives, Pending, derived_label

__all__ = [
    "DEFAULT_PRIORITIES",
    "DeferrableCollectives",
    "Request",
    "Start",
    "StartsTogether",
    "Together",
    "joined_label",
    "starter_of",
]

# Lower goes first. A step waits for what it gathers before it can go on, and for its sums at its end.
DEFAULT_PRIORITIES = {"all_gather": 0, "broadcast": 0, "all_to_all": 0, "reduce_scatter": 1, "all_reduce": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One call of `Collectives` that has not been started."""

    op: str
    output: Tensor
    input: Tensor  # `output` itself where the call works in place
    label: str
    priority: int  # lower goes first; equal on every rank
    src: int = 0  # of a broadcast

    @property
    def payload_bytes(self) -> int:
        """Bytes of the larger side, as reports count them."""
        return self.larger.numel() * self.larger.element_size()

    @property
    def larger(self) -> Tensor:
        """The larger side."""
        return self.output if self.op == "all_gather" else self.input

    def start_on(self, group: Collectives) -> Pending:
        """Make the call."""
        match self.op:
            case "all_gather":
                return group.all_gather(self.output, self.input, label=self.label)
            case "reduce_scatter":
                return group.reduce_scatter(self.output, self.input, label=self.label)
            case "all_to_all":
                return group.all_to_all(self.output, self.input, label=self.label)
            case "broadcast":
                return group.broadcast(self.output, src=self.src, label=self.label)
        return group.all_reduce(self.output, label=self.label)


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """Several calls of one op that go out as one, each where its memory lies; for a group that `starts_together`."""

    parts: tuple[Request, ...]

    @property
    def op(self) -> str:
        """Of all parts."""
        return self.parts[0].op

    @property
    def label(self) -> str:
        """Of all parts."""
        return joined_label(self.parts)

    @property
    def priority(self) -> int:
        """Of the most urgent part, which is the first."""
        return self.parts[0].priority

    @property
    def payload_bytes(self) -> int:
        """Of all parts."""
        return sum(part.payload_bytes for part in self.parts)

    def start_on(self, group: Collectives) -> Pending:
        """Make the calls."""
        assert isinstance(group, StartsTogether)
        return group.start_together(self)


Start = Callable[[Request | Together], Pending]


@runtime_checkable
class StartsTogether(Protocol):
    """What a group may have beyond `Collectives`: it starts several calls as one without copying them together."""

    def starts_together(self, op: str) -> bool:
        """Whether it does so for calls of `op`; equal on every rank."""
        ...

    def start_together(self, together: Together) -> Pending:
        """Start all parts."""
        ...


def joined_label(requests: Sequence[Request]) -> str:
    """What several calls are called that go out as one; other ones, or in another order, are called something else.

    >>> import torch
    >>> one, two = (Request("all_reduce", torch.ones(n), torch.ones(n), "grads", 1) for n in (1, 2))
    >>> joined_label([one, two]), joined_label([two, one])
    ('grads and 1 more (aa3a7a39)', 'grads and 1 more (fbe69fe4)')
    """
    contents = zlib.crc32(repr([(each.label, each.input.numel()) for each in requests]).encode())
    label = f"{requests[0].label} and {len(requests) - 1} more ({contents:08x})"
    return derived_label(label, parts=[each.label for each in requests])


class DeferrableCollectives(Around):
    """The contract over `group`, whose five collectives go to `start`; `flush` starts what that holds back.

    Each of the five takes a `priority` beyond what the contract asks for; None is the one of `DEFAULT_PRIORITIES`.
    """

    def __init__(self, group: Collectives, *, start: Start, flush: Callable[[], None]) -> None:
        super().__init__(group)
        self.start = start
        self._flush = flush

    def all_gather(self, output: Tensor, input: Tensor, *, label: str, priority: int | None = None) -> Pending:
        """See `Collectives.all_gather`."""
        return self._hand_over("all_gather", output, input, label=label, priority=priority)

    def reduce_scatter(self, output: Tensor, input: Tensor, *, label: str, priority: int | None = None) -> Pending:
        """See `Collectives.reduce_scatter`."""
        return self._hand_over("reduce_scatter", output, input, label=label, priority=priority)

    def all_reduce(self, tensor: Tensor, *, label: str, priority: int | None = None) -> Pending:
        """See `Collectives.all_reduce`."""
        return self._hand_over("all_reduce", tensor, tensor, label=label, priority=priority)

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str, priority: int | None = None) -> Pending:
        """See `Collectives.all_to_all`."""
        return self._hand_over("all_to_all", output, input, label=label, priority=priority)

    def broadcast(self, tensor: Tensor, *, src: int, label: str, priority: int | None = None) -> Pending:
        """See `Collectives.broadcast`."""
        return self._hand_over("broadcast", tensor, tensor, label=label, priority=priority, src=src)

    def send(self, tensor: Tensor, *, dst: int, label: str) -> Pending:
        """See `Collectives.send`; at once, after what the group holds back."""
        self._flush()
        return self.inner.send(tensor, dst=dst, label=label)

    def recv(self, tensor: Tensor, *, src: int, label: str) -> Pending:
        """See `Collectives.recv`; at once, after what the group holds back."""
        self._flush()
        return self.inner.recv(tensor, src=src, label=label)

    def starts_together(self, op: str) -> bool:
        """See `StartsTogether`: whether what serves does so."""
        return isinstance(self.inner, StartsTogether) and self.inner.starts_together(op)

    def start_together(self, together: Together) -> Pending:
        """See `StartsTogether`; handed over as one."""
        return self.start(together)

    def _hand_over(
        self, op: str, output: Tensor, input: Tensor, *, label: str, priority: int | None, src: int = 0
    ) -> Pending:
        if priority is None:
            priority = DEFAULT_PRIORITIES[op]
        # Whichever thread comes to it writes outside of autograd; `is` still tells one tensor from two.
        sent = input.detach() if input.requires_grad else input
        received = sent if output is input else output.detach() if output.requires_grad else output
        return self.start(Request(op, received, sent, label, priority, src))


def starter_of(group: Collectives) -> Start:
    """What starts a request on `group`, its priority kept where the group takes one."""
    return group.start if isinstance(group, DeferrableCollectives) else partial(_start_on, group)


def _start_on(group: Collectives, request: Request | Together) -> Pending:
    return request.start_on(group)
