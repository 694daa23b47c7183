"""Which implementation serves a group; every rank of it comes to the same answer.

all ranks on one host                                   shared memory
several hosts, as many ranks on each, a power of two    two levels: shared memory, and messages between hosts
any other group that gloo connects                      messages between pairs of ranks
any that NCCL connects                                  torch.distributed, watched
any of another backend                                  torch.distributed, as the core has it
one rank                                                nothing, as nothing is sent
"""

import logging
from collections.abc import Sequence

import torch.distributed as dist

from zcore.comm.accelerator import AcceleratorCollectives
from zcore.comm.calls.flow import FLOW
from zcore.comm.calls.requests import DeferrableCollectives
from zcore.comm.hierarchical import HierarchicalCollectives, plan_levels
from zcore.comm.memory.neighbours import Neighbours, open_neighbours
from zcore.comm.memory.shared_memory import SharedMemoryCollectives
from zcore.comm.pairs.algorithms import DEFAULT_TABLE, Table, read_table
from zcore.comm.pairs.moves import Pairs
from zcore.comm.pairs.pairwise import PairwiseCollectives
from zcore.comm.ranks.cards import cards_of_run
from zcore.comm.ranks.journal import Journal
from zcore.comm.ranks.meeting import Introduction, agree, meet
from zcore.comm.recording.recorded import Recorded
from zcore.core import compat
from zcore.core.collectives import Collectives
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["Parts", "offer", "serve"]

logger = logging.getLogger(__name__)


def offer(group: dist.ProcessGroup, *, name: str) -> DeferrableCollectives | None:
    """What serves `group` best, seen by whoever records, under the limit on bytes in flight.

    None for a group of one rank. Every rank of `group` calls this.
    """
    if dist.get_world_size(group) == 1:
        return None
    FLOW.start_all()  # the ranks wait for each other as they meet
    return FLOW.around(Recorded(serve(group, name=name), group, name=name))


def serve(group: dist.ProcessGroup, *, name: str) -> Collectives:
    """The implementation itself. Every rank of `group` calls this."""
    if compat.backend_name(group) not in ("gloo", "nccl"):
        return TorchCollectives(group, name=name)
    shown = meet(group, name=name)
    if compat.backend_name(group) != "gloo":
        parts = Parts(group, shown, DEFAULT_TABLE, name=name)
        return AcceleratorCollectives(group, parts.journal(range(len(shown)), name), name=name)
    table = read_table()
    if len({each.table for each in shown}) > 1:
        logger.warning("%s: ranks have measured tables of algorithms that differ; none is used.", name)
        table = DEFAULT_TABLE
    parts = Parts(group, shown, table, name=name)
    can_share = all(each.boards for each in shown)
    hosts = [each.home.host for each in shown]
    local_size = len(hosts) if len(set(hosts)) == 1 else plan_levels(hosts)
    if not can_share or local_size is None:
        if len(set(hosts)) < len(hosts):
            logger.info("%s is served pairwise: its ranks share no memory, or lie unevenly over hosts.", name)
        return parts.pairwise(range(len(shown)), of="")
    first_rank = parts.rank - parts.rank % local_size
    here = range(first_rank, first_rank + local_size)
    boards = [parts.open(here, board) for board in range(1 if local_size == len(hosts) else 2)]
    if not agree(group, None not in boards, name=name):
        logger.warning("%s: a rank cannot open the memory of another; data go through the loopback device.", name)
        return parts.pairwise(range(len(shown)), of="")
    local = [
        SharedMemoryCollectives(group, neighbours, members=here, name=parts.name_of(step, boards))
        for step, neighbours in enumerate(boards)
        if neighbours is not None
    ]
    if len(local) == 1:
        return local[0]
    first, last = local
    column = range(parts.rank - first_rank, len(shown), local_size)
    return HierarchicalCollectives(
        flat=parts.pairwise(range(len(shown)), of=" between all"),
        column=parts.pairwise(column, of=" between hosts"),
        first=first,
        last=last,
        journal=parts.journal(range(len(shown)), name),
        name=name,
    )


class Parts:
    """Parts of an implementation for some of the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup, shown: Sequence[Introduction], table: Table, *, name: str) -> None:
        self.rank = dist.get_rank(group)
        self._group = group
        self._shown = shown
        self._table = table
        self._name = name
        self._number = max(each.number for each in shown)
        self._deadline_s = compat.timeout_of(group).total_seconds()

    def name_of(self, step: int, boards: Sequence[object]) -> str:
        """What reports call the part for one step."""
        return self._name if len(boards) == 1 else f"{self._name} in host, {('first', 'last')[step]}"

    def pairwise(self, members: Sequence[int], *, of: str) -> PairwiseCollectives:
        """Messages between pairs of `members`."""
        name = f"{self._name}{of}"
        peers = Pairs(self._group, tuple(members), members.index(self.rank))
        return PairwiseCollectives(peers, self.journal(members, name, is_of_pairs=True), self._table, name=name)

    def journal(self, members: Sequence[int], name: str, *, is_of_pairs: bool = False) -> Journal:
        """What the others of `members` are told of the calls of `name`."""
        homes = [self._shown[member].home for member in members]
        group = compat.name_of(self._group)
        connected = f"{group}/pairs/"
        family = f"{group}/{self._number}/", f"{connected}{self._number}/"
        return Journal(
            cards_of_run(),
            f"{family[is_of_pairs]}{name}/{homes[0].global_rank}",
            homes,
            rank=members.index(self.rank),
            deadline_s=self._deadline_s,
            family=family,
            connected=connected,
        )

    def open(self, members: Sequence[int], board: int) -> Neighbours | None:
        """The pages of `members`, who are on this host."""
        return open_neighbours(
            [self._shown[member] for member in members],
            rank=members.index(self.rank),
            board=board,
            journal=self.journal(members, f"{self._name}, pages {board}"),
        )
