"""Which implementation serves a group; every rank of it comes to the same answer.

all ranks on one host                                   shared memory
several hosts, as many ranks on each, a power of two    two levels: shared memory, and messages between hosts
any other group that gloo connects                      messages between pairs of ranks
one rank, or another backend                            torch.distributed, as the core has it
"""

import logging
from collections.abc import Sequence

import torch.distributed as dist

from zcore.comm.accelerator import AcceleratorCollectives
from zcore.comm.algorithms import DEFAULT_TABLE, Table, read_table
from zcore.comm.flow import FLOW
from zcore.comm.hierarchical import HierarchicalCollectives, plan_levels
from zcore.comm.meeting import Card, agree, meet
from zcore.comm.moves import Peers
from zcore.comm.neighbours import Neighbours, open_neighbours
from zcore.comm.pairwise import PairwiseCollectives
from zcore.comm.recorded import Recorded
from zcore.comm.requests import DeferrableCollectives
from zcore.comm.shared_memory import SharedMemoryCollectives
from zcore.comm.watch import Journal, Watch, watch_of_run
from zcore.core import compat
from zcore.core.collectives import Collectives

__all__ = ["offer", "serve"]

logger = logging.getLogger(__name__)


def offer(group: dist.ProcessGroup, *, name: str) -> DeferrableCollectives | None:
    """What serves `group` best, seen by whoever records, under the limit on bytes in flight.

    None for a group of one rank, or a backend that is not known here. Every rank of `group` calls this.
    """
    if dist.get_world_size(group) == 1 or compat.backend_name(group) not in ("gloo", "nccl"):
        return None
    return FLOW.around(Recorded(serve(group, name=name), group, name=name))


def serve(group: dist.ProcessGroup, *, name: str) -> Collectives:
    """The implementation itself. Every rank of `group` calls this."""
    cards = meet(group, name=name)
    if compat.backend_name(group) != "gloo":
        builder = _Builder(group, cards, DEFAULT_TABLE, name=name)
        return AcceleratorCollectives(group, builder.journal(range(len(cards)), name), name=name)
    table = read_table()
    if len({card.table for card in cards}) > 1:
        logger.warning("%s: ranks have measured tables of algorithms that differ; none is used.", name)
        table = DEFAULT_TABLE
    builder = _Builder(group, cards, table, name=name)
    can_share = all(card.boards for card in cards)
    hosts = [card.home.host for card in cards]
    local_size = len(hosts) if len(set(hosts)) == 1 else plan_levels(hosts)
    if not can_share or local_size is None:
        if len(set(hosts)) < len(hosts):
            logger.info("%s is served pairwise: its ranks share no memory, or lie unevenly over hosts.", name)
        return builder.pairwise(range(len(cards)), of="")
    first_rank = builder.rank - builder.rank % local_size
    here = range(first_rank, first_rank + local_size)
    boards = [builder.open(here, board) for board in range(1 if local_size == len(hosts) else 2)]
    if not agree(group, None not in boards):
        logger.warning("%s: a rank cannot open the memory of another; data go through the loopback device.", name)
        return builder.pairwise(range(len(cards)), of="")
    local = [
        SharedMemoryCollectives(group, neighbours, members=here, name=builder.name_of(step, boards))
        for step, neighbours in enumerate(boards)
        if neighbours is not None
    ]
    if len(local) == 1:
        return local[0]
    first, last = local
    column = range(builder.rank - first_rank, len(cards), local_size)
    return HierarchicalCollectives(
        flat=builder.pairwise(range(len(cards)), of=" between all"),
        column=builder.pairwise(column, of=" between hosts"),
        first=first,
        last=last,
        journal=builder.journal(range(len(cards)), name),
        name=name,
    )


class _Builder:
    """Parts of an implementation for some of the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup, cards: Sequence[Card], table: Table, *, name: str) -> None:
        self.rank = dist.get_rank(group)
        self._group = group
        self._cards = cards
        self._table = table
        self._name = name
        self._watch: Watch = watch_of_run()
        self._deadline_s = compat.timeout_of(group).total_seconds()

    def name_of(self, step: int, boards: Sequence[object]) -> str:
        """What reports call the part for one step."""
        return self._name if len(boards) == 1 else f"{self._name} in host, {('first', 'last')[step]}"

    def pairwise(self, members: Sequence[int], *, of: str) -> PairwiseCollectives:
        """Messages between pairs of `members`."""
        name = f"{self._name}{of}"
        peers = Peers(self._group, tuple(members), members.index(self.rank))
        return PairwiseCollectives(peers, self.journal(members, name), self._table, name=name)

    def journal(self, members: Sequence[int], name: str) -> Journal:
        """What the others of `members` are told of the calls of `name`."""
        homes = [self._cards[member].home for member in members]
        key = f"{compat.name_of(self._group)}/{name}/{homes[0].global_rank}"
        return self._watch.open(key, homes, rank=members.index(self.rank), deadline_s=self._deadline_s)

    def open(self, members: Sequence[int], board: int) -> Neighbours | None:
        """The pages of `members`, who are on this host."""
        return open_neighbours(
            [self._cards[member] for member in members],
            rank=members.index(self.rank),
            board=board,
            deadline_s=self._deadline_s,
            watch=self._watch,
        )
