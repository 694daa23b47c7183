"""Where the parts of one parameter lie over ranks, for optimizers that look at more than one element at a time."""

from dataclasses import dataclass

from zcore.zero.buffer import DataParallelGroups

__all__ = ["Parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one parameter as this rank sees them."""

    shape: tuple[int, ...]  # of the whole
    ranges: tuple[range, ...]  # of the flattened whole: what each rank of the shard group steps
    counted: slice  # of what this rank steps: its share in a sum over the whole, disjoint from all others'
    groups: DataParallelGroups | None  # None: it is whole, and nobody else's

    @property
    def rank(self) -> int:
        """This rank's place in the shard group."""
        return 0 if self.groups is None else self.groups.reduce.rank

    @property
    def own(self) -> range:
        """What this rank steps."""
        return self.ranges[self.rank]

    @property
    def are_whole(self) -> bool:
        """Whether every rank steps all of it."""
        return len(set(self.ranges)) == 1 and (len(self.ranges) == 1 or bool(self.own))
