"""Who takes turns with whom: as many contenders at a time as the machine has memory for. Pure.

Every lineup has DDP and FSDP2, so that each ratio is of times that were taken in turns.
"""

from collections.abc import Mapping, Sequence

__all__ = ["plan_lineups"]


def plan_lineups(
    names: Sequence[str], *, held_bytes: Mapping[str, float], references: Sequence[str], room_bytes: float
) -> list[list[str]]:
    """Cut `names` into lineups of `references` and others, in order, that hold at most `room_bytes` together.

    What does not fit beside the references alone gets a lineup all the same.

    >>> sizes = {"a": 2, "b": 2, "c": 3, "ddp": 4}
    >>> plan_lineups(["a", "b", "c"], held_bytes=sizes, references=["ddp"], room_bytes=8)
    [['ddp', 'a', 'b'], ['ddp', 'c']]
    """
    left_bytes = room_bytes - sum(held_bytes[name] for name in references)
    lineups: list[list[str]] = []
    taken_bytes = 0.0
    for name in names:
        if name in references:
            continue
        if not lineups or taken_bytes + held_bytes[name] > left_bytes:
            lineups.append([*references])
            taken_bytes = 0.0
        lineups[-1].append(name)
        taken_bytes += held_bytes[name]
    return lineups or [[*references]]
