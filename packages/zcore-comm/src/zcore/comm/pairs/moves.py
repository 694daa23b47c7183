"""How data go between ranks over gloo, in messages between pairs. Each function starts at once and returns a finish.

    exchange   every rank sends to every other                          one step
    ring       each passes on to the next what it got from the last     size - 1 steps, two neighbours at a time
    scatter    the source cuts its tensor, each rank gets a slot        first half of a large broadcast
               and all exchange slots

All move the same bytes per rank. What a finish waits for it waits for in the caller's thread; RuntimeError is gloo's.
"""

import contextlib
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core.exchange import STEP_TAGS, Finish, Peers, wait_for

__all__ = ["Pairs"]

NEVER = (1 << 30) + 1  # a tag that no message has


class Pairs(Peers):
    """Some ranks of a process group over gloo, and how data go between them."""

    __slots__ = ()

    def exchange(self, receives: Sequence[Tensor], sends: Sequence[Tensor], *, tag: int) -> Finish:
        """`receives[r]` comes from rank r, `sends[r]` goes to it; what both hold for this rank is left alone."""
        arriving = [self.receive(receives[each], source=each, tag=tag) for each in reversed(self.others)]
        leaving = [self.send(sends[each], target=each, tag=tag) for each in self.others]
        # Who waits for the sends first is woken when all is done: up to 1 MiB takes a quarter less, on 2 cores.
        return lambda: wait_for([*leaving, *arriving])

    def gather(self, slots: Sequence[Tensor], *, tag: int) -> Finish:
        """`slots[r] = slots[r] of rank r`, by exchange."""
        return self.exchange(slots, [slots[self.rank]] * self.size, tag=tag)

    def gather_in_ring(self, slots: Sequence[Tensor], *, tag: int) -> Finish:
        """The same, each rank hearing only from the one before it."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        # All are received in order and under one tag, so they can be asked for at once.
        receives = [
            self.receive(slots[(self.rank - step) % self.size], source=before, tag=tag) for step in range(1, self.size)
        ]
        first = self.send(slots[self.rank], target=after, tag=tag)

        def finish() -> None:
            sends = [first]
            for step, receive in enumerate(receives[:-1], start=1):
                wait_for([receive])
                sends.append(self.send(slots[(self.rank - step) % self.size], target=after, tag=tag))
            wait_for([*receives[-1:], *sends])

        return finish

    def send_to_all(self, tensor: Tensor, *, src: int, tag: int) -> Finish:
        """`tensor = tensor of rank src`, straight from it."""
        if self.rank == src:
            works = [self.send(tensor, target=each, tag=tag) for each in self.others]
        else:
            works = [self.receive(tensor, source=src, tag=tag)]
        return lambda: wait_for(works)

    def scatter_to_all(self, tensor: Tensor, *, src: int, tag: int) -> Finish:
        """The same in two steps: the source sends each byte about twice, not once to each rank."""
        slots = tensor.tensor_split(self.size)
        if self.rank == src:
            works = [self.send(slots[each], target=each, tag=tag) for each in self.others]
        else:
            works = [self.receive(slots[self.rank], source=src, tag=tag)]

        def finish() -> None:
            wait_for(works)
            self.gather(slots, tag=tag + STEP_TAGS)()

        return finish

    def abort(self) -> None:
        """Close the connections of the process group: whatever its ranks wait for fails, here and there.

        gloo does that when a wait gives up, and offers no other way. A wait that ends sooner, as that rank closes its
        own connections meanwhile, leaves those to the others open.
        """
        own = self.members[self.rank]
        for source in (each for each in range(dist.get_world_size(self.group)) if each != own):
            with contextlib.suppress(RuntimeError):  # of the wait that gives up, or because this one is closed already
                never = dist.irecv(torch.empty(1, device="cpu"), group=self.group, group_src=source, tag=NEVER)
                assert never is not None
                never.wait(timedelta(milliseconds=1))
