"""Sums over gloo: every rank sends each other its slot, in pieces, and sums what arrives piece by piece.

    rank 0   |slot 0      |slot 1      |         to rank 1: |piece|piece|piece|  of its slot 1
    rank 1   |slot 0      |slot 1      |         to rank 0: |piece|piece|piece|  of its slot 0

The sum of one piece is taken while the next ones are on their way, and reads what has just come. A tree over the ranks
gives its order (see collectives.py). Where every rank needs the whole sum, each passes the pieces of its slot on when
they are summed. gloo's own reduce_scatter is an all_reduce of which a part is kept: 2 ranks and 1 GiB take it 2.5 times
as long as this (docs/benchmarks; `tools/bench_collectives.py` measures both).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core.collectives import tree_sum

__all__ = ["STEP_TAGS", "WINDOW_PIECES", "Finish", "Peers", "raw", "wait_for"]

Finish = Callable[[], None]  # waits for what was started; raises RuntimeError of gloo

PIECE_BYTES = 1 << 20  # 0.25 MiB costs a tenth more, in calls; with 4 MiB the first sum begins late
WINDOW_PIECES = 4  # received at a time, where a rank sums meanwhile: 64 MiB take 27 ms, with memory for all of them 41
STEP_TAGS = 1 << 28  # gloo has 31 bits for a tag; messages of a call's second step have that of the first and this


@dataclass(frozen=True, slots=True)
class Peers:
    """Some ranks of a process group over gloo: `members[r]` is the rank there of rank r here.

    A tag tells calls under way apart; it is equal on all ranks, and less than STEP_TAGS.
    """

    group: dist.ProcessGroup
    members: Sequence[int]
    rank: int

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.members)

    @property
    def others(self) -> list[int]:
        """All but this one, beginning with the next: not all ranks send to the same one first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def send(self, tensor: Tensor, *, target: int, tag: int) -> dist.Work | None:
        """Start a message to rank `target`; None where there is nothing to send."""
        if not tensor.numel():
            return None
        return dist.isend(raw(tensor), group=self.group, group_dst=self.members[target], tag=tag)

    def receive(self, tensor: Tensor, *, source: int, tag: int) -> dist.Work | None:
        """Start to take one from rank `source`; likewise."""
        if not tensor.numel():
            return None
        return dist.irecv(raw(tensor), group=self.group, group_src=self.members[source], tag=tag)

    def sum_slots(
        self,
        output: Tensor,
        slots: Sequence[Tensor],
        *,
        tag: int,
        window: int | None = None,
        summed: Callable[[Tensor], None] | None = None,
    ) -> Finish:
        """Start `output = sum over ranks of their slots[rank]`.

        slots: this rank's tensor for each rank; slot r has as many elements as rank r's output. `output` may be the own
        one. window: how many pieces of each rank to have memory for; by default all. With fewer, others wait until this
        rank sums, so that has to happen whatever else it waits for. summed: called with each piece of `output`, in
        order, once it is there.
        """
        numel, step = output.numel(), max(1, PIECE_BYTES // output.element_size())
        lows = range(0, numel, step)
        depth = min(len(lows), window or len(lows))
        sources = sorted(self.others)
        received = output.new_empty(len(sources), depth, min(step, numel))

        def pieces(index: int) -> list[Tensor]:
            """Where the parts of the others for piece `index` arrive; none is used twice at a time."""
            return [received[place, index % depth, : min(step, numel - lows[index])] for place in range(len(sources))]

        def receive(index: int) -> list[dist.Work | None]:
            return [self.receive(each, source=r, tag=tag) for r, each in zip(sources, pieces(index), strict=True)]

        receives = [receive(index) for index in range(depth)]
        sends = [self.send(piece, target=r, tag=tag) for r in self.others for piece in slots[r].split(step)]

        def finish() -> None:
            for index, low in enumerate(lows):
                wait_for(receives[index])
                own = slots[self.rank][low : low + step]
                parts = pieces(index)
                tree_sum([*parts[: self.rank], own, *parts[self.rank :]], out=output[low : low + step])
                if summed is not None:
                    summed(output[low : low + step])
                if index + depth < len(lows):
                    receives.append(receive(index + depth))
            wait_for(sends)

        return finish

    def sum_everywhere(self, slots: Sequence[Tensor], *, tag: int) -> Finish:
        """Start `slots[r] = sum over ranks of their slots[r]`, for all r: each sums its own and passes each piece on.

        Other ranks have the whole only when this one has finished: that has to happen whatever else it waits for, and
        on all ranks in one order.
        """
        passed: list[dist.Work | None] = []

        def pass_on(piece: Tensor) -> None:
            passed.extend(self.send(piece, target=each, tag=tag + STEP_TAGS) for each in self.others)

        sum_own = self.sum_slots(slots[self.rank], slots, tag=tag, window=WINDOW_PIECES, summed=pass_on)
        # A sum takes the place of what was sent for it: whoever sends one has received all of that before.
        step = max(1, PIECE_BYTES // slots[0].element_size())
        receives = [
            self.receive(piece, source=each, tag=tag + STEP_TAGS)
            for each in reversed(self.others)
            for piece in slots[each].split(step)
        ]

        def finish() -> None:
            sum_own()
            wait_for([*passed, *receives])

        return finish


def wait_for(works: Iterable[dist.Work | None]) -> None:
    """Wait for works in order; RuntimeError is the backend's."""
    for work in works:
        if work is not None:
            work.wait()


def raw(tensor: Tensor) -> Tensor:
    """The same bytes in a type that gloo moves: it knows no int16 and no float8."""
    return tensor.view(torch.uint8)
