"""A reduce-scatter over gloo: every rank sends each other its slot, in pieces, and sums what arrives piece by piece.

    rank 0   |slot 0      |slot 1      |         to rank 1: |piece|piece|piece|  of its slot 1
    rank 1   |slot 0      |slot 1      |         to rank 0: |piece|piece|piece|  of its slot 0

The sum of one piece is taken while the next ones are on their way, and reads what has just come. A tree over the ranks
gives its order (see collectives.py). gloo's own reduce_scatter is an all_reduce of which a part is kept: 2 ranks and
1 GiB take it 2.5 times as long as this (docs/benchmarks; `tools/bench_collectives.py` measures both).
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core.collectives import tree_sum

__all__ = ["PIECE_BYTES", "raw", "start_slot_sum"]

PIECE_BYTES = 1 << 20  # 0.25 MiB costs a tenth more, in calls; with 4 MiB the first sum begins late


def start_slot_sum(
    output: Tensor,
    slots: Sequence[Tensor],
    *,
    group: dist.ProcessGroup,
    members: Sequence[int],
    rank: int,
    tag: int,
    window: int | None = None,
    summed: Callable[[Tensor], None] | None = None,
) -> Callable[[], None]:
    """Start `output = sum over ranks of their slots[rank]`; what is returned waits, sums, and raises RuntimeError.

    slots: this rank's tensor for each rank; slot r has as many elements as rank r's output. `output` may be the own
    one. members: of `group`, by rank here. tag: tells calls under way apart; equal on all ranks. window: how many
    pieces of each rank to have memory for; by default all. With fewer, others wait until this rank sums, so that has to
    happen whatever else it waits for. summed: called with each piece of `output`, in order, once it is there.
    """
    others = [each for each in range(len(slots)) if each != rank]
    numel, step = output.numel(), max(1, PIECE_BYTES // output.element_size())
    lows = range(0, numel, step)
    depth = min(len(lows), window or len(lows))
    received = output.new_empty(len(others), depth, min(step, numel))

    def pieces(index: int) -> list[Tensor]:
        """Where the parts of the others for piece `index` arrive; none is used twice at a time."""
        return [received[place, index % depth, : min(step, numel - lows[index])] for place in range(len(others))]

    def receive(index: int) -> list[dist.Work | None]:
        return [
            dist.irecv(raw(piece), group=group, group_src=members[source], tag=tag)
            for source, piece in zip(others, pieces(index), strict=True)
        ]

    receives = [receive(index) for index in range(depth)]
    sends = [
        dist.isend(raw(piece), group=group, group_dst=members[other], tag=tag)
        for other in others
        for piece in slots[other].split(step)
        if piece.numel()
    ]

    def finish() -> None:
        for index, low in enumerate(lows):
            for work in receives[index]:
                assert work is not None
                work.wait()
            own = slots[rank][low : low + step]
            parts = pieces(index)
            tree_sum([*parts[:rank], own, *parts[rank:]], out=output[low : low + step])
            if summed is not None:
                summed(output[low : low + step])
            if index + depth < len(lows):
                receives.append(receive(index + depth))
        for send in sends:
            assert send is not None
            send.wait()

    return finish


def raw(tensor: Tensor) -> Tensor:
    """The same bytes in a type that gloo moves: it knows no int16 and no float8."""
    return tensor.view(torch.uint8)
