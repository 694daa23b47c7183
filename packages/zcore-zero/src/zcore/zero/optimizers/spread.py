"""Work on whole matrices of which each rank steps a part: every rank does its share, one matrix at a time.

    parts of A    rank 0 [####|    ]  rank 1 [    |##  ]  rank 2 [    |  ##]
    to its owner  rank 1 gets A whole, rank 0 and 2 the same for B and C     a round: one matrix for each rank
    computed      f(A)      f(B)      f(C)
    taken apart   each rank gets its part of f(A), f(B), f(C)

Where one rank holds most of a matrix and has not more than its share of work, it is the owner, so that little moves.
A round is over before the next begins: a rank holds one whole matrix, and its result, at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zcore.core.collectives import Collectives
from zcore.zero.parts import Parts

__all__ = ["assign", "on_whole_matrices"]

LABEL = "matrices"


def assign(costs: Sequence[int], holders: Sequence[Sequence[int]], *, num_ranks: int) -> list[int]:
    """The owner of each matrix; `holders` has the elements that each rank holds of it. Equal on every rank.

    Costly ones first, to the rank that holds most of it while that has less than its share, else to the one with least.
    """
    loads, owners = [0] * num_ranks, [0] * len(costs)
    share = sum(costs) / num_ranks
    for index in sorted(range(len(costs)), key=lambda each: -costs[each]):
        held = holders[index]
        nearest = max(range(num_ranks), key=lambda rank: (held[rank], -loads[rank]))
        fits = loads[nearest] + costs[index] / 2 <= share
        owner = nearest if fits else min(range(num_ranks), key=lambda rank: (loads[rank], -held[rank]))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def on_whole_matrices(
    part: Callable[[int], Tensor],
    parts: Sequence[Parts],
    function: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """For every matrix: its index, and this rank's part of `function` of the whole, flat.

    part: what this rank holds of matrix i, flat, in `dtype`; asked for when its round begins. `parts` are of one group.
    Every rank of the group goes through all of it.
    """
    groups, rank = parts[0].groups, parts[0].rank
    num_ranks = len(parts[0].ranges)
    costs = [each.shape[0] * each.shape[1] * min(each.shape) for each in parts]
    owners = assign(costs, [[len(held) for held in each.ranges] for each in parts], num_ranks=num_ranks)
    for turn in _rounds(owners, costs, num_ranks):
        held = {index: part(index) for index in turn if parts[index].own}
        mine = next((index for index in turn if owners[index] == rank), None)
        whole = None if mine is None else torch.empty(_numel(parts[mine]), dtype=dtype, device=device)
        moves = []
        for index in turn:
            for source, span in enumerate(parts[index].ranges):
                owner = owners[index]
                if source == owner == rank:
                    assert whole is not None
                    whole[span.start : span.stop].copy_(held[index] if span else whole[:0])
                elif span and source != owner and not parts[index].are_whole:
                    place = whole[span.start : span.stop] if owner == rank and whole is not None else held.get(index)
                    moves.append((source, owner, place))
        _move(moves, groups.reduce if groups is not None else None)
        result = None
        if mine is not None and whole is not None:
            result = function(whole.view(parts[mine].shape)).reshape(-1)
        del whole
        yield from _take_apart(turn, parts, owners, result, dtype=dtype, device=device)


def _take_apart(
    turn: Sequence[int],
    parts: Sequence[Parts],
    owners: Sequence[int],
    result: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """Each rank's part of the results of a round, of which `result` is this rank's."""
    groups, rank = parts[turn[0]].groups, parts[turn[0]].rank
    moves, given = [], {}
    for index in turn:
        own, owner = parts[index].own, owners[index]
        if owner == rank:
            assert result is not None
            given[index] = result[own.start : own.stop]
        else:
            given[index] = torch.empty(len(own), dtype=dtype, device=device)
        if parts[index].are_whole and groups is not None:
            groups.reduce.broadcast(given[index], src=owner, label=LABEL).wait()
            continue
        for target, span in enumerate(parts[index].ranges):
            if span and target != owner:
                moves.append(
                    (
                        owner,
                        target,
                        result[span.start : span.stop] if owner == rank and result is not None else given[index],
                    )
                )
    _move(moves, groups.reduce if groups is not None else None)
    yield from given.items()


def _move(moves: Sequence[tuple[int, int, Tensor | None]], group: Collectives | None) -> None:
    """Send and receive what concerns this rank of (source, target, data), and wait for it.

    In one order over all pairs of ranks: backends that send in order then never wait for each other in a circle.
    """
    if group is None:
        return
    pending = []
    for source, target, data in sorted(moves, key=lambda move: (min(move[:2]), max(move[:2]), move[0])):
        if group.rank == source:
            assert data is not None
            pending.append(group.send(data.contiguous(), dst=target, label=LABEL))
        elif group.rank == target:
            assert data is not None
            pending.append(group.recv(data, src=source, label=LABEL))
    for each in pending:
        each.wait()


def _rounds(owners: Sequence[int], costs: Sequence[int], num_ranks: int) -> Iterator[list[int]]:
    """Matrices that are worked on at the same time: each rank's costliest, then its next."""
    queues: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(owners)), key=lambda each: -costs[each]):
        queues[owners[index]].append(index)
    for turn in range(max(map(len, queues), default=0)):
        yield [queue[turn] for queue in queues if turn < len(queue)]


def _numel(parts: Parts) -> int:
    return parts.shape[0] * parts.shape[1]
