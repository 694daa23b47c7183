"""Which small collectives go out as one, and in which order. Pure: a function of the calls alone, equal on every rank.

    budget 10    call      A 4   B 3   c 2   D 20   E 5      bytes; upper case gathers, lower case sums
                 priority  0     0     1     0      1
    starts       A+B  D  E  c                                by priority; E does not fit beside A and B

A call joins the last open group of its kind if that stays within the budget; a group starts where its most urgent call
would. So a call may go earlier than its priority asks, never later than it would alone.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from zcore.core.errors import ConfigError

__all__ = ["JoinCall", "plan_joins"]


@dataclass(frozen=True, slots=True)
class JoinCall:
    """A call as the plan sees it."""

    kind: Hashable  # calls of one kind may join: the same op, dtype, source; None: it goes alone
    num_bytes: int
    priority: int = 0  # lower goes first


def plan_joins(calls: Sequence[JoinCall], budget_bytes: int) -> list[tuple[int, ...]]:
    """Group `calls`, by index, in the order in which the groups start.

    Raises ConfigError for a budget below 1.

    >>> plan_joins([JoinCall("gather", 4), JoinCall("sum", 2), JoinCall("gather", 3), JoinCall("gather", 9)], 10)
    [(0, 2), (1,), (3,)]
    """
    if budget_bytes < 1:
        raise ConfigError(
            f"The budget of joined calls is {budget_bytes} bytes; expected 1 or more. See `budget_bytes`."
        )
    groups: list[list[int]] = []
    open_groups: dict[Hashable, tuple[list[int], int]] = {}  # by kind: the one that later calls join, and its bytes
    for index in sorted(range(len(calls)), key=lambda index: calls[index].priority):  # stable
        call = calls[index]
        group, group_bytes = open_groups.get(call.kind, ([], 0))
        if call.kind is not None and group and group_bytes + call.num_bytes <= budget_bytes:
            group.append(index)
            open_groups[call.kind] = group, group_bytes + call.num_bytes
            continue
        groups.append([index])
        if call.num_bytes < budget_bytes:  # else nothing joins it, and the group before stays open
            open_groups[call.kind] = groups[-1], call.num_bytes
    return [tuple(group) for group in groups]
