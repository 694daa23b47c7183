"""What one rank has recorded of its collectives: plain data, bounded however long it records.

    started_s      issued_s        wait_began_s       done_s
       |-- start_s --|                   |--- wait_s ----|        seconds that the program was held
       |--------------------- span_s --------------------|        seconds from start to done, as the rank sees it

    Totals   sums over calls of one kind: group, op, algorithm and size, a power of two; kept for ever
    waits    of the last calls of a group, by index, to be compared with those of the other ranks

Calls are done when `wait()` returns: whoever waits late learns late of what was done long before.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CallRecord", "Group", "Kind", "RankTotals", "Totals", "size_class"]


@dataclass(frozen=True, slots=True)
class Group:
    """A process group, the same on every rank: its name in reports, and its ranks, global ones in their order in it."""

    name: str
    ranks: tuple[int, ...] = field(hash=False)  # a thousand of them would be hashed at every call


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that are counted together."""

    group: Group
    op: str
    algorithm: str  # how the group served them, as "shared memory"
    size_bytes: int  # the power of two that payloads of this kind do not exceed; 0 for empty ones


@dataclass(slots=True)
class CallRecord:
    """One call; times that have not come yet are None. On the clock of whoever recorded it."""

    group: Group
    op: str
    label: str
    caller: str  # the function that called; "" if that was not asked for
    dtype: str
    payload_bytes: int  # of the larger side: the gathered output, the scattered input
    algorithm: str
    index: int  # position among this group's collectives, equal on every rank; a send or receive has that of the last
    started_s: float
    issued_s: float | None = None
    wait_began_s: float | None = None
    done_s: float | None = None

    @property
    def kind(self) -> Kind:
        """What it is counted as."""
        return Kind(self.group, self.op, self.algorithm, size_class(self.payload_bytes))

    @property
    def full_label(self) -> str:
        """The label, with the caller if known."""
        return f"{self.label} ({self.caller})" if self.caller else self.label


@dataclass(slots=True)
class Totals:
    """Sums over calls of one kind; see the header."""

    num_calls: int = 0
    payload_bytes: int = 0
    num_done: int = 0  # calls that were waited for; seconds are of these
    done_bytes: int = 0
    start_s: float = 0.0
    wait_s: float = 0.0
    max_wait_s: float = 0.0
    span_s: float = 0.0

    def add_start(self, record: CallRecord) -> None:
        """Count a call that starts."""
        self.num_calls += 1
        self.payload_bytes += record.payload_bytes

    def add_done(self, record: CallRecord) -> None:
        """Count what a call took that is done."""
        assert record.issued_s is not None and record.wait_began_s is not None and record.done_s is not None
        wait_s = record.done_s - record.wait_began_s
        self.num_done += 1
        self.done_bytes += record.payload_bytes
        self.start_s += record.issued_s - record.started_s
        self.wait_s += wait_s
        self.max_wait_s = max(self.max_wait_s, wait_s)
        self.span_s += record.done_s - record.started_s


@dataclass(frozen=True, slots=True)
class RankTotals:
    """All that one rank tells the others for a report."""

    global_rank: int
    host: str
    elapsed_s: float  # recorded so far
    kinds: Mapping[Kind, Totals]
    labels: Mapping[tuple[str, str], Totals] = field(default_factory=dict)  # by op and label
    waits: Mapping[Group, Mapping[int, float]] = field(default_factory=dict)  # seconds, by index; of the last calls

    def to_plain(self) -> list[Any]:
        """As JSON types; `from_plain` reads them."""
        groups = list(dict.fromkeys([*(kind.group for kind in self.kinds), *self.waits]))
        number = {group: index for index, group in enumerate(groups)}
        return [
            [self.global_rank, self.host, self.elapsed_s],
            [[group.name, group.ranks] for group in groups],
            [
                [number[kind.group], kind.op, kind.algorithm, kind.size_bytes, list(asdict(totals).values())]
                for kind, totals in self.kinds.items()
            ],
            [[op, label, list(asdict(totals).values())] for (op, label), totals in self.labels.items()],
            [[number[group], list(waits), list(waits.values())] for group, waits in self.waits.items()],
        ]

    @classmethod
    def from_plain(cls, plain: list[Any]) -> "RankTotals":
        """What `to_plain` gave, on another rank."""
        (global_rank, host, elapsed_s), told_groups, kinds, labels, waits = plain
        groups = [Group(name, tuple(ranks)) for name, ranks in told_groups]
        return cls(
            global_rank,
            host,
            elapsed_s,
            {
                Kind(groups[number], op, algorithm, size_bytes): Totals(*values)
                for number, op, algorithm, size_bytes, values in kinds
            },
            {(op, label): Totals(*values) for op, label, values in labels},
            {groups[number]: dict(zip(indices, seconds, strict=True)) for number, indices, seconds in waits},
        )


def size_class(payload_bytes: int) -> int:
    """The smallest power of two that is not below `payload_bytes`; 0 for 0.

    >>> [size_class(each) for each in (0, 1, 3, 4, 5)]
    [0, 1, 4, 4, 8]
    """
    return 1 << (payload_bytes - 1).bit_length() if payload_bytes else 0
