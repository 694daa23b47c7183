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
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zcore.core import compat
from zcore.core.errors import MismatchError, StateError
from zcore.core.mesh import DataParallel
from zcore.zero.accumulation import Accumulation
from zcore.zero.bucket import Bucket
from zcore.zero.buffer import BucketGradients, DataParallelGroups
from zcore.zero.fragment_gradients import FragmentGradients
from zcore.zero.timeline import Kind, Recorder

__all__ = ["Reducer"]


@dataclass(slots=True)
class _Intake:
    """What came of one bucket: `used` since the last `clear`, the rest in this backward."""

    bucket: Bucket
    gradients: BucketGradients
    grads: FragmentGradients
    used: list[bool] = field(init=False)  # of each parameter, whether it got a gradient
    backward: int = -1  # of autograd, nested ones included, that found the bucket's values unchanged
    awaits: list[bool] = field(default_factory=list)  # a gradient of each parameter: not of one that is frozen
    num_missing: int = 0  # parameters whose gradients are still to come
    is_settled: bool = False  # none comes any more, on any rank
    is_started: bool = False  # its reduction is

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """No parameter got a gradient."""
        self.used = [False] * len(self.bucket.params)

    def begin(self) -> None:
        """A backward starts."""
        self.backward, self.is_settled, self.is_started = -1, False, False
        self.awaits = [param.is_trainable for param in self.bucket.params]
        self.num_missing = sum(self.awaits)

    def check_unchanged(self, *, outer: int) -> None:
        """Raise StateError if parameters have changed since the forward, in a backward inside `outer` or in that."""
        self.bucket.check_unchanged(is_nested=self.backward != outer)

    @property
    def is_incomplete(self) -> bool:
        """Some of its gradients came in this backward, and not the last one."""
        return self.backward != -1 and self.num_missing > 0

    @property
    def is_done(self) -> bool:
        return not self.num_missing or self.is_settled


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
        self._intakes = {
            bucket.index: _Intake(bucket, bucket.gradients, bucket.grads)
            for bucket in buckets
            if bucket.gradients is not None and bucket.grads is not None
        }
        self._dp = dp
        self._groups = groups
        self._device = device
        self._max_inflight = max_inflight  # each holds a whole bucket: one is summed while the next one's are computed
        self._take_digest = take_digest  # of the gathers since the last reduction
        self.accumulation = accumulation
        self._order = sorted(self._intakes, reverse=True)
        self._order.sort(key=lambda index: buckets[index].plan.keep_whole)  # small ones are complete last
        self._order_is_observed = False
        self._is_loss_bad: Tensor | None = None
        self.bad_ranks: tuple[int, ...] = ()  # data-parallel ranks whose loss was not finite, after the last reduction
        self._ready: dict[int, None] = {}  # complete or settled, in the order in which this rank was done with them
        self._next = 0  # position in the order
        self._backward = -1  # the one of autograd under way; those inside it have other numbers
        self._has_nested = False  # whether gradients of a backward inside this one have come
        self._factor = 1.0  # what gradients of this backward are multiplied by as they come
        self._inflight: deque[_Intake] = deque()
        self._has_gathers = any(bucket.is_transient for bucket in buckets)  # in the backward, too
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
        self._backward, self._factor = backward, self.accumulation.missing_factor
        for intake in self._intakes.values():
            intake.begin()
        self._ready.clear()
        self._next = 0
        self._has_nested = False

    def settle(self, indices: Sequence[int]) -> None:
        """No gradient of these buckets comes any more in this backward.

        Called on every rank before it waits for a gather that another one issues after this.
        """
        for index in indices:
            if index in self._intakes:
                self._intakes[index].is_settled = True
                self._ready.setdefault(index)
        if self.accumulation.reduces and not self._has_nested:
            self._start_what_is_ready()
            self._limit_what_is_inflight()

    def add(self, bucket_index: int, index: int, grad: Tensor, *, backward: int) -> bool:
        """Take the gradient of parameter `index` of a bucket, in autograd's backward of that number, if it is trained.

        One inside the backward under way, as of a reentrant checkpoint, may bring others of the same parameter, so
        nothing is reduced before the end then. Raises StateError if it comes after the reduction. The first and the
        last one of a bucket look whether its parameters have changed since the forward, and raise the same.
        """
        intake = self._intakes[bucket_index]
        if not intake.awaits[index]:
            return False  # frozen since the forward
        if intake.backward != backward or intake.num_missing == 1:
            intake.backward = backward
            intake.check_unchanged(outer=self._backward)
            self._has_nested |= backward != self._backward
        if intake.is_started:
            raise StateError(
                f"{intake.bucket.plan.params[index].fqn} got a second gradient in one backward, after the first was "
                "reduced: it is used both inside and outside of a reentrant checkpoint (pass use_reentrant=False), a "
                "backward that raised is tried again on the same graph (run the forward again), or a forward had one "
                "part of its backward before a later forward, and the rest after it (take both at once)."
            )
        intake.gradients.accumulate(index, grad, factor=self._factor)
        intake.used[index] = True
        intake.num_missing -= 1
        if not intake.num_missing and bucket_index not in self._ready:
            self._ready[bucket_index] = None
            if self.accumulation.reduces and not self._has_nested:
                self._start_what_is_ready()
        return True

    def finish(self) -> None:
        """The backward is over: reduce what is left, and hand the gradients out if no more of this step are to come."""
        reduces, delivers = self.accumulation.reduces, self.accumulation.is_last
        self.accumulation.end_backward()
        if not reduces:
            for intake in self._intakes.values():
                if intake.is_incomplete:
                    intake.check_unchanged(outer=self._backward)
            self._announce()
            return
        for intake in self._intakes.values():
            intake.is_settled = True
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
        for intake in self._intakes.values():
            intake.grads.clear()
            intake.forget()

    @property
    def has_gradients(self) -> bool:
        """Whether a parameter got one since the last `clear`."""
        return any(intake.grads.with_gradient for intake in self._intakes.values())

    @property
    def waits_for_reduction(self) -> bool:
        """Whether there are gradients that a later backward will reduce."""
        return any(intake.grads.waits_for_reduction for intake in self._intakes.values())

    def take_users_view(self) -> None:
        """Gradients are what the user sees: what was assigned, or set to None, since this has looked last.

        Where all of it is None, gradients that were not reduced yet are meant, too.
        """
        all_grads = [intake.grads for intake in self._intakes.values()]
        if all(grads.is_as_given for grads in all_grads):
            return
        assigned = [(grads, index, grad) for grads in all_grads for index, grad in grads.assigned()]
        # Gradients may have been exchanged between parameters: none is written before all are read.
        ours = {grads.memory for grads in all_grads} if assigned else set()
        assigned = [
            (grads, index, grad.clone() if compat.storage_key(grad) in ours else grad)
            for grads, index, grad in assigned
        ]
        for grads, index, grad in assigned:
            grads.assign(index, grad)
        if all(grads.dropped == grads.with_gradient for grads in all_grads):
            if any(grads.with_gradient for grads in all_grads):
                self._clear_gradients()
            return
        for intake in self._intakes.values():
            for index in intake.grads.dropped:
                intake.grads.drop(index)
                intake.used[index] = False
            for index in intake.grads.with_gradient:
                intake.used[index] = True

    def _start_what_is_ready(self) -> None:
        while self._next < len(self._order) and self._intakes[self._order[self._next]].is_done:
            self._start_next()

    def _start_next(self) -> None:
        intake = self._intakes[self._order[self._next]]
        intake.is_started = True
        if intake.is_incomplete:
            intake.check_unchanged(outer=self._backward)
        self._note(intake, Kind.START, why="a parameter of it had no gradient" if intake.num_missing else "")
        intake.gradients.start_reduce()
        self._inflight.append(intake)
        self._next += 1
        self._limit_what_is_inflight()

    def _limit_what_is_inflight(self) -> None:
        while len(self._inflight) > self._max_inflight and self._may_wait_for(self._inflight[0]):
            self._finish_first(why="before the next is summed")

    def _may_wait_for(self, intake: _Intake) -> bool:
        """Whether every rank starts that reduction without a gather that this one has not issued yet."""
        return not self._has_gathers or intake.is_settled

    def _finish_first(self, *, why: str) -> None:
        intake = self._inflight.popleft()
        self._note(intake, Kind.NEED, why=why)
        intake.gradients.finish_reduce(unscale=1.0 / self.accumulation.loss_scale)
        self._note(intake, Kind.COME)

    def _finish_what_is_inflight(self) -> None:
        while self._inflight:
            self._finish_first(why="the backward is over")

    def _note(self, intake: _Intake, kind: Kind, *, why: str = "") -> None:
        if self.recorder is not None:
            self.recorder.note(kind, intake.bucket.plan.name, transfer="reduce", why=why)

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
        for intake in self._intakes.values():
            intake.grads.announce(intake.used)

    def _deliver(self) -> None:
        size = self._dp.size
        used = [flag for intake in self._intakes.values() for flag in intake.used]
        flags = torch.zeros(2 * size + len(used), device=self._device)
        if self._is_loss_bad is not None:
            flags[self._dp.rank] = self._is_loss_bad
        flags[size + self._dp.rank] = self._take_digest()
        flags[2 * size :] = torch.tensor(used, dtype=flags.dtype)
        self._groups.all_reduce(flags, label="which parameters had a gradient")
        totals = flags.tolist()
        self.bad_ranks = tuple(rank for rank in range(size) if totals[rank])
        _refuse_other_paths(totals[size : 2 * size], shard_size=self._dp.shard_size)
        position = 2 * size
        for intake in self._intakes.values():
            end = position + len(intake.used)
            # Stays true until `clear`, so that later reductions add to it.
            intake.used = [bool(total) for total in totals[position:end]]
            intake.grads.deliver(intake.used)
            position = end


def _refuse_other_paths(digests: Sequence[float], *, shard_size: int) -> None:
    """Ranks gather together within a shard group; replicas may go ways of their own."""
    first = [digests[rank // shard_size * shard_size] for rank in range(len(digests))]
    # 0 where nothing was gathered: with a simulated process group, since else the others had waited for that rank.
    others = [rank for rank, digest in enumerate(digests) if digest not in (0, first[rank])]
    if others:
        raise MismatchError(
            f"Data ranks {others} gathered other parameters than the first rank of their shard group in this step, or "
            "in another order, so values they computed with are wrong. Under stage 3 the ranks of a shard group call "
            "the same modules in the same order. Draw random choices such as dropped layers from a generator with one "
            "seed on all of them; name the module around experts that only some ranks call by `zero.set_leaf_modules`; "
            "or use stage 2. The gradients of this step are not to be used."
        )
