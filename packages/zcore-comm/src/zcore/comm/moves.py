"""How data go between ranks over gloo, in messages between pairs. Each function starts at once and returns a finish.

    exchange   every rank sends to every other                          one step
    ring       each passes on to the next what it got from the last     size - 1 steps, two neighbours at a time
    scatter    the source cuts its tensor, each rank gets a slot        first half of a large broadcast
               and all exchange slots

All move the same bytes per rank. What a finish waits for it waits for in the caller's thread; RuntimeError is gloo's.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core.exchange import PIECE_BYTES, raw, start_slot_sum

__all__ = ["Finish", "Peers"]

Finish = Callable[[], None]

WINDOW_PIECES = 4  # received at a time while a sum goes on: 64 MiB take 27 ms, with memory for all of them 41
NEVER = (1 << 30) + 1  # a tag that no message has
STEP_TAGS = 1 << 28  # second steps of a call have a tag of their own


@dataclass(frozen=True, slots=True)
class Peers:
    """Some ranks of a process group: `members[r]` is the rank there of rank r here."""

    group: dist.ProcessGroup
    members: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.members)

    @property
    def others(self) -> list[int]:
        """All but this one, beginning with the next: not all ranks send to the same one first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def sum_slots(
        self,
        output: Tensor,
        slots: Sequence[Tensor],
        *,
        tag: int,
        summed: Callable[[Tensor], None] | None = None,
    ) -> Finish:
        """`output = sum over ranks of their slots[rank]`, in the order of a tree; each piece of it goes to `summed`."""
        return start_slot_sum(
            output,
            slots,
            group=self.group,
            members=self.members,
            rank=self.rank,
            tag=tag,
            window=WINDOW_PIECES,
            summed=summed,
        )

    def sum_everywhere(self, slots: Sequence[Tensor], *, tag: int) -> Finish:
        """`slots[r] = sum over ranks of their slots[r]`: each sums its own and passes each piece on."""
        passed: list[dist.Work | None] = []

        def pass_on(piece: Tensor) -> None:
            passed.extend(self._send(piece, target=each, tag=tag + STEP_TAGS) for each in self.others)

        sum_own = self.sum_slots(slots[self.rank], slots, tag=tag, summed=pass_on)
        # A sum takes the place of what was sent for it: whoever sends one has received all of that before.
        step = max(1, PIECE_BYTES // slots[0].element_size())
        receives = [
            self._receive(piece, source=each, tag=tag + STEP_TAGS)
            for each in reversed(self.others)
            for piece in slots[each].split(step)
        ]

        def finish() -> None:
            sum_own()
            _wait_for([*passed, *receives])

        return finish

    def exchange(self, receives: Sequence[Tensor], sends: Sequence[Tensor], *, tag: int) -> Finish:
        """`receives[r]` comes from rank r, `sends[r]` goes to it; what both hold for this rank is left alone."""
        works = [self._receive(receives[each], source=each, tag=tag) for each in reversed(self.others)]
        works += [self._send(sends[each], target=each, tag=tag) for each in self.others]
        return lambda: _wait_for(works)

    def gather(self, slots: Sequence[Tensor], *, tag: int) -> Finish:
        """`slots[r] = slots[r] of rank r`, by exchange."""
        return self.exchange(slots, [slots[self.rank]] * self.size, tag=tag)

    def gather_in_ring(self, slots: Sequence[Tensor], *, tag: int) -> Finish:
        """The same, each rank hearing only from the one before it."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        # All are received in order and under one tag, so they can be asked for at once.
        receives = [
            self._receive(slots[(self.rank - step) % self.size], source=before, tag=tag) for step in range(1, self.size)
        ]
        first = self._send(slots[self.rank], target=after, tag=tag)

        def finish() -> None:
            sends = [first]
            for step, receive in enumerate(receives[:-1], start=1):
                _wait_for([receive])
                sends.append(self._send(slots[(self.rank - step) % self.size], target=after, tag=tag))
            _wait_for([*receives[-1:], *sends])

        return finish

    def send_to_all(self, tensor: Tensor, *, src: int, tag: int) -> Finish:
        """`tensor = tensor of rank src`, straight from it."""
        if self.rank == src:
            works = [self._send(tensor, target=each, tag=tag) for each in self.others]
        else:
            works = [self._receive(tensor, source=src, tag=tag)]
        return lambda: _wait_for(works)

    def scatter_to_all(self, tensor: Tensor, *, src: int, tag: int) -> Finish:
        """The same in two steps: the source sends each byte about twice, not once to each rank."""
        slots = tensor.tensor_split(self.size)
        if self.rank == src:
            works = [self._send(slots[each], target=each, tag=tag) for each in self.others]
        else:
            works = [self._receive(slots[self.rank], source=src, tag=tag)]

        def finish() -> None:
            _wait_for(works)
            self.gather(slots, tag=tag + STEP_TAGS)()

        return finish

    def abort(self) -> None:
        """Close the connections of the process group: whatever its ranks wait for fails, here and there.

        gloo does that when a wait gives up, and offers no other way.
        """
        with contextlib.suppress(RuntimeError):  # of the wait that gives up, or because they are closed already
            never = dist.irecv(torch.empty(1), group=self.group, group_src=self._another(), tag=NEVER)
            assert never is not None
            never.wait(timedelta(milliseconds=1))

    def _another(self) -> int:
        return self.members[self.others[0]]

    def _send(self, tensor: Tensor, *, target: int, tag: int) -> dist.Work | None:
        if not tensor.numel():
            return None
        return dist.isend(raw(tensor), group=self.group, group_dst=self.members[target], tag=tag)

    def _receive(self, tensor: Tensor, *, source: int, tag: int) -> dist.Work | None:
        if not tensor.numel():
            return None
        return dist.irecv(raw(tensor), group=self.group, group_src=self.members[source], tag=tag)


def _wait_for(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
