"""When gradients are reduced: each bucket as soon as its last gradient is there, in one order on every rank.

The order is fixed so that ranks which leave different modules out still issue the same collectives: first the
reverse of the plan, then the order that rank 0 saw in its first backward. A rank that left a parameter out does not see
its bucket complete; it starts the reduction once no gradient of the bucket can come any more, the bucket is *settled*:

    rank 0    every expert has tokens    bucket complete: start              settled: may wait for the sum
    rank 1    one expert has none                                            settled: start, then gather

Else rank 0 would wait for rank 1 in the sum, and rank 1 for rank 0 in the gather of an earlier module. At the end of a
backward that reduces, ranks tell each other which parameters had a gradient anywhere: one that had none stays without,
as in plain torch, and is not stepped.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zcore.core import compat
from zcore.core.errors import MismatchError, StateError
from zcore.core.mesh import DataParallel
from zcore.zero.accumulation import Accumulation
from zcore.zero.bucket import Bucket
from zcore.zero.buffer import DataParallelGroups
from zcore.zero.timeline import Kind, Recorder

__all__ = ["Reducer"]


class Reducer:
    """The gradients of all trainable buckets, from autograd to the fragments' `.grad`."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        dp: DataParallel,
        groups: DataParallelGroups,
        device: torch.device,
        accumulation: Accumulation,
        max_inflight: int = 1,
        take_digest: Callable[[], int] = lambda: 0,
    ) -> None:
        self._buckets = [bucket for bucket in buckets if bucket.gradients is not None]
        self._grads = {bucket.index: bucket.grads for bucket in buckets if bucket.grads is not None}
        self._dp = dp
        self._groups = groups
        self._device = device
        self._max_inflight = max_inflight  # each holds a whole bucket: one is summed while the next one's are computed
        self._take_digest = take_digest  # of the gathers since the last reduction
        self.accumulation = accumulation
        self._order = sorted((bucket.index for bucket in self._buckets), key=lambda index: -index)
        self._order.sort(key=lambda index: buckets[index].plan.keep_whole)  # small ones are complete last
        self._order_is_observed = False
        self._by_index = {bucket.index: bucket for bucket in self._buckets}
        self._used = {bucket.index: [False] * len(bucket.params) for bucket in self._buckets}
        self._is_loss_bad: Tensor | None = None
        self.bad_ranks: tuple[int, ...] = ()  # data-parallel ranks whose loss was not finite, after the last reduction
        self._remaining: dict[int, int] = {}
        self._ready: dict[int, None] = {}  # complete or settled, in the order in which this rank was done with them
        self._next = 0  # position in the order
        self._started: set[int] = set()  # buckets before it, for a look-up with every gradient
        self._has_nested = False  # whether gradients of a backward inside this one have come
        self._inflight: deque[Bucket] = deque()
        self._has_gathers = any(bucket.is_transient for bucket in buckets)  # in the backward, too
        self._settled: set[int] = set()  # buckets that get no gradient any more in this backward, on any rank
        self.recorder: Recorder | None = None  # of the step under way, if it is to be explained

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether `loss` is finite, without waiting for the device.

        It is told to all ranks at the next reduction.
        """
        is_bad = ~torch.isfinite(loss.detach()).all()
        self._is_loss_bad = is_bad if self._is_loss_bad is None else self._is_loss_bad | is_bad

    def begin(self, backward: int) -> None:
        """Autograd's backward of that number starts."""
        self.take_users_view()
        self.accumulation.begin_backward(backward)
        self._remaining = {
            bucket.index: sum(param.full.requires_grad for param in bucket.params) for bucket in self._buckets
        }
        self._ready.clear()
        self._next = 0
        self._started.clear()
        self._settled.clear()
        self._has_nested = False

    def settle(self, indices: Sequence[int]) -> None:
        """No gradient of these buckets comes any more in this backward.

        Called on every rank before it waits for a gather that another one issues after this.
        """
        for index in indices:
            self._settled.add(index)
            if index in self._by_index:
                self._ready.setdefault(index)
        if self.accumulation.reduces and not self._has_nested:
            self._start_what_is_ready()
            self._limit_what_is_inflight()

    def add(self, bucket: Bucket, index: int, grad: Tensor, *, is_nested: bool) -> None:
        """Take the gradient of parameter `index` of `bucket`.

        `is_nested` if it is of a backward inside the backward, as of a reentrant checkpoint: others of the same
        parameter may come, so nothing is reduced before the end. Raises StateError if it comes after the reduction.
        """
        assert bucket.gradients is not None
        self._has_nested |= is_nested
        if bucket.index in self._started:
            raise StateError(
                f"{bucket.plan.params[index].fqn} got a second gradient in one backward, after the first was reduced: "
                "it is used both inside and outside of a reentrant checkpoint (pass use_reentrant=False), or a "
                "backward that raised is tried again on the same graph (run the forward again)."
            )
        bucket.gradients.accumulate(index, grad, factor=self.accumulation.missing_factor)
        self._used[bucket.index][index] = True
        self._remaining[bucket.index] -= 1
        if self._remaining[bucket.index] or bucket.index in self._ready:
            return
        self._ready[bucket.index] = None
        if self.accumulation.reduces and not self._has_nested:
            self._start_what_is_ready()

    def finish(self) -> None:
        """The backward is over: reduce what is left, and hand the gradients out if no more of this step are to come."""
        reduces, delivers = self.accumulation.reduces, self.accumulation.is_last
        self.accumulation.end_backward()
        if not reduces:
            self._announce()
            return
        self._settled.update(self._order)
        while self._next < len(self._order):
            self._start_next()
        self._finish_what_is_inflight()
        self._agree_on_order()
        if delivers:
            self._deliver()
        else:
            self._announce()

    def abandon(self) -> None:
        """Forget a backward that an exception cut short, with all gradients of this step."""
        self._finish_what_is_inflight()
        self.clear()
        self.accumulation.begin_step()

    def clear(self) -> None:
        """Forget all gradients, as `zero_grad` does, and the losses they are of."""
        self._clear_gradients()
        self._is_loss_bad = None
        self.bad_ranks = ()

    def _clear_gradients(self) -> None:
        for bucket in self._buckets:
            self._grads[bucket.index].clear()
            self._used[bucket.index] = [False] * len(bucket.params)

    @property
    def has_gradients(self) -> bool:
        """Whether a parameter got one since the last `clear`."""
        return any(grads.with_gradient for grads in self._grads.values())

    @property
    def waits_for_reduction(self) -> bool:
        """Whether there are gradients that a later backward will reduce."""
        return any(grads.waits_for_reduction for grads in self._grads.values())

    def take_users_view(self) -> None:
        """Gradients are what the user sees: what was assigned, or set to None, since this has looked last.

        Where all of it is None, gradients that were not reduced yet are meant, too.
        """
        assigned = [(grads, index, grad) for grads in self._grads.values() for index, grad in grads.assigned()]
        # Gradients may have been exchanged between parameters: none is written before all are read.
        ours = {grads.memory for grads in self._grads.values()} if assigned else set()
        assigned = [
            (grads, index, grad.clone() if compat.storage_key(grad) in ours else grad)
            for grads, index, grad in assigned
        ]
        for grads, index, grad in assigned:
            grads.assign(index, grad)
        if all(grads.dropped == grads.with_gradient for grads in self._grads.values()):
            if any(grads.with_gradient for grads in self._grads.values()):
                self._clear_gradients()
            return
        for bucket_index, grads in self._grads.items():
            for index in grads.dropped:
                grads.drop(index)
                self._used[bucket_index][index] = False
            for index in grads.with_gradient:
                self._used[bucket_index][index] = True

    def _start_what_is_ready(self) -> None:
        while self._next < len(self._order) and self._is_done_with(self._order[self._next]):
            self._start_next()

    def _is_done_with(self, index: int) -> bool:
        return not self._remaining[index] or index in self._settled

    def _start_next(self) -> None:
        index = self._order[self._next]
        self._started.add(index)
        bucket = self._by_index[index]
        assert bucket.gradients is not None
        self._note(bucket, Kind.START, why="" if not self._remaining[index] else "a parameter of it had no gradient")
        bucket.gradients.start_reduce()
        self._inflight.append(bucket)
        self._next += 1
        self._limit_what_is_inflight()

    def _limit_what_is_inflight(self) -> None:
        while len(self._inflight) > self._max_inflight and self._may_wait_for(self._inflight[0]):
            self._finish_first(why="before the next is summed")

    def _may_wait_for(self, bucket: Bucket) -> bool:
        """Whether every rank starts that reduction without a gather that this one has not issued yet."""
        return not self._has_gathers or bucket.index in self._settled

    def _finish_first(self, *, why: str) -> None:
        bucket = self._inflight.popleft()
        assert bucket.gradients is not None
        self._note(bucket, Kind.NEED, why=why)
        bucket.gradients.finish_reduce(unscale=1.0 / self.accumulation.loss_scale)
        self._note(bucket, Kind.COME)

    def _finish_what_is_inflight(self) -> None:
        while self._inflight:
            self._finish_first(why="the backward is over")

    def _note(self, bucket: Bucket, kind: Kind, *, why: str = "") -> None:
        if self.recorder is not None:
            self.recorder.note(kind, bucket.plan.name, transfer="reduce", why=why)

    def _agree_on_order(self) -> None:
        """After the first reduction: the order in which data rank 0 completed its buckets, then the rest."""
        if self._order_is_observed:
            return
        self._order_is_observed = True
        rest = [index for index in self._order if index not in self._ready]
        order = torch.tensor([*self._ready, *rest], dtype=torch.int64, device=self._device)
        self._groups.broadcast(order, src=0, label="order of reductions")
        self._order = order.tolist()

    def _announce(self) -> None:
        for bucket in self._buckets:
            self._grads[bucket.index].announce(self._used[bucket.index])

    def _deliver(self) -> None:
        size = self._dp.size
        flags = torch.zeros(2 * size + sum(map(len, self._used.values())), device=self._device)
        if self._is_loss_bad is not None:
            flags[self._dp.rank] = self._is_loss_bad
        flags[size + self._dp.rank] = self._take_digest()
        used = [flag for bucket in self._buckets for flag in self._used[bucket.index]]
        flags[2 * size :] = torch.tensor(used, dtype=flags.dtype)
        self._groups.all_reduce(flags, label="which parameters had a gradient")
        totals = flags.tolist()
        self.bad_ranks = tuple(rank for rank in range(size) if totals[rank])
        _refuse_other_paths(totals[size : 2 * size], shard_size=self._dp.shard_size)
        position = 2 * size
        for bucket in self._buckets:
            anywhere = [bool(total) for total in totals[position : position + len(bucket.params)]]
            self._used[bucket.index] = anywhere  # stays true until `clear`, so that later reductions add to it
            self._grads[bucket.index].deliver(anywhere)
            position += len(bucket.params)


def _refuse_other_paths(digests: Sequence[float], *, shard_size: int) -> None:
    """Ranks gather together within a shard group; replicas may go ways of their own."""
    first = [digests[rank // shard_size * shard_size] for rank in range(len(digests))]
    # 0 where nothing was gathered: with a simulated process group, since else the others had waited for that rank.
    others = [rank for rank, digest in enumerate(digests) if digest not in (0, first[rank])]
    if others:
        raise MismatchError(
            f"Data ranks {others} gathered other parameters than the first rank of their shard group in this step, or "
            "in another order, so values they computed with are wrong. Under stage 3 the ranks of a shard group call "
            "the same modules in the same order: draw random choices such as dropped layers from a generator with one "
            "seed on all of them, or use stage 2. The gradients of this step are not to be used."
        )
