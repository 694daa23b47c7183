"""When buckets are gathered and released: on use, a little ahead of it, and no longer than needed.

A bucket that a module has left is *idle*. It is released at the moment another bucket needs memory, so that
the last one of a forward is still there when the backward begins with it, and modules in a row that share a
bucket gather it once.
"""

import logging
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from time import perf_counter_ns

import torch

from zcore.core import compat
from zcore.zero.backward_uses import BackwardUses
from zcore.zero.bucket import Bucket, ParamState
from zcore.zero.first_uses import FirstUses
from zcore.zero.sharded_parameter import lost_edit
from zcore.zero.timeline import Kind, Recorder
from zcore.zero.trace import Pass, Trace, Use, plan_prefetch

__all__ = ["GatherLimits", "Gatherer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatherLimits:
    """Budgets in elements."""

    prefetch_numel: int  # gathered ahead of use
    max_live_numel: int  # gathered at all; a bucket in use is gathered whatever this says
    max_reuse_numel: int  # a bucket that returns in the same pass within this distance is kept


class Gatherer:
    """Moves buckets between SHARDED and AVAILABLE. Whole buckets are refreshed once; transient ones come and go."""

    def __init__(self, buckets: Sequence[Bucket], limits: GatherLimits) -> None:
        self._buckets = buckets
        self._cast = [bucket for bucket in buckets if bucket.memory.casts and not bucket.is_transient]
        self._numel_of = tuple(bucket.plan.layout.numel for bucket in buckets).__getitem__
        self._limits = limits
        self._training, self._inference = Trace(self._numel_of), Trace(self._numel_of)
        self._trace = self._training
        self._depth: Counter[int] = Counter()  # modules inside which we are, per bucket
        self._pinned: Counter[int] = Counter()  # open GatheredParameters
        # Of these somebody holds a view. When Python drops it differs from rank to rank, so nothing here depends on it.
        self._kept: set[int] = set()  # a forward with autograd: until its backward is over, or the next such forward
        self._returned: set[int] = set()  # one without, or part of a result: until the next one, or end of a backward
        self._idle: dict[int, None] = {}  # left in a forward, not yet released; in order of leaving
        self.backward_uses = BackwardUses()
        self.first_uses = FirstUses()  # of transient buckets
        self._ahead: dict[int, int] = {}  # elements of buckets gathered, or kept, ahead of their next use
        self._live: dict[int, Bucket] = {}  # transient ones with gathered memory
        self._live_numel = 0  # of them
        self._is_at_rest = True  # until the first use after a step
        self._keeps = False  # what forwards without autograd have gathered, for the next one
        self._shown_before: set[int] = set()  # of what is pinned and kept whole, what was shown before
        self._has_warned = False
        self.recorder: Recorder | None = None  # of the step under way, if it is to be explained
        self._digest = 0  # of the buckets gathered since the last comparison, in order; below 2^24, exact in fp32

    def begin(self, *, training: bool) -> None:
        """A forward of the root module starts.

        Expect the order of the last such step, and refresh what is whole but stale.
        """
        self._begin_trace(training=training)
        self._depth.clear()  # an exception may have left modules without their post-forward hook
        self._returned.clear()
        if training:
            self._kept.clear()
        for bucket in self._buckets:
            self._drop_if_stale(bucket)
            if bucket.is_transient:
                if bucket.state is ParamState.AVAILABLE and bucket.index not in self._kept:
                    self._idle.setdefault(bucket.index)
            elif bucket.state is ParamState.SHARDED:
                self._gather(bucket, why="kept whole, and stepped since")
            elif bucket.state is ParamState.AVAILABLE:
                bucket.show_whole()

    def keep_for_inference(self, keeps: bool) -> None:
        """Keep what forwards without autograd gather, as far as the live limit allows; or let go of it, and no more."""
        self._keeps = keeps
        if not keeps:
            for index in list(self._idle):
                if not self._is_in_use(self._buckets[index]):
                    self._reshard(self._buckets[index])

    @property
    def open_buckets(self) -> frozenset[int]:
        """Those with a module inside which we are."""
        return frozenset(self._depth)

    def is_open(self, bucket: Bucket) -> bool:
        """Whether we are inside a module that uses it."""
        return bucket.index in self._depth

    def enter(self, bucket: Bucket, during: Pass, *, module: str, shown: Sequence[int] = ()) -> None:
        """Make `bucket` AVAILABLE for a module that starts, show it the parameters `shown`, and start what comes next.

        Others stay fragments, so that what is read of them between modules is never memory that is freed later.
        """
        self._depth[bucket.index] += 1
        if self._depth[bucket.index] == 1:
            self.use(bucket, during, module=module)
            if compat.in_backward():
                bucket.note_recomputation()
            elif torch.is_grad_enabled():
                bucket.note_computation()
            if during is Pass.FORWARD and self._trace is self._training:
                self._note_use(bucket)
        bucket.show_whole(shown)

    def leave(self, bucket: Bucket, during: Pass) -> None:
        """A module is done with `bucket`, which may be released when memory is needed; in a backward not yet.

        Raises StateError if it has edited parameters that are gathered.
        """
        if not self._depth[bucket.index]:
            return  # forgotten by `begin` or `rest`, after an exception
        self._depth[bucket.index] -= 1
        if self._depth[bucket.index]:
            return
        del self._depth[bucket.index]
        if bucket.is_transient and bucket.state is ParamState.AVAILABLE:
            if during is Pass.FORWARD and not self._is_kept(bucket.index):
                self._idle[bucket.index] = None
            if not bucket.is_pinned:
                edited = bucket.find_edited()
                if edited is not None:
                    raise lost_edit(edited)
                bucket.show_fragments()

    def keep(self, bucket: Bucket) -> None:
        """A view of `bucket` may be read outside its modules, and after the forward: by a backward, or the caller."""
        self._idle.pop(bucket.index, None)
        (self._kept if self._trace is self._training else self._returned).add(bucket.index)

    def use(self, bucket: Bucket, during: Pass, *, module: str) -> None:
        """Make `bucket` AVAILABLE now."""
        self.backward_uses.interrupt()
        if during is Pass.FORWARD:
            if self._is_at_rest and not compat.in_backward():  # a submodule is called by itself
                self._begin_trace(training=torch.is_grad_enabled())
            self._drop_if_stale(bucket)
        else:
            self.backward_uses.note(bucket.index)
        if bucket.is_transient:
            in_hand = during is Pass.BACKWARD and self._is_in_hand(bucket)
            self._idle.pop(bucket.index, None)
            departs = not self._trace.add(Use(bucket.index, during))
            # Without autograd it may: `generate` calls other modules than an evaluation does.
            if departs and self._trace is self._training and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "The order of modules changed: %s uses bucket %r where another was expected. Gathers of this step "
                    "are no longer started ahead; results are not affected. Said once.",
                    module or "the model",
                    bucket.plan.name,
                )
            if in_hand:
                return
        if bucket.state is ParamState.SHARDED:
            self._start(bucket, why=self._why_not_ahead(bucket) if self.recorder is not None else "")
        self._ahead.pop(bucket.index, None)
        if bucket.is_transient:
            self._prefetch()
        if bucket.state is ParamState.INFLIGHT:
            self._wait(bucket, module=module or "the model")
        if not bucket.is_transient:
            bucket.show_whole()

    def release_all_but(self, needed: Set[int]) -> None:
        """A backward has come to where only `needed` buckets were in use: those of later modules are read no more.

        But those that return stay, and those that a node that runs has used.
        """
        for bucket in list(self._live.values()):
            if bucket.index in needed or not self._is_in_hand(bucket) or self._is_in_use(bucket):
                continue
            if not self.backward_uses.is_held(bucket.index) and not self._returns(bucket, Pass.BACKWARD):
                self._reshard(bucket)

    def pin(self, bucket: Bucket) -> None:
        """Keep `bucket` AVAILABLE and shown until `unpin`, whatever runs in between.

        With autograd, what reads it may be differentiated: then it is a part of a forward, of one of its own at rest.
        """
        may_be_read = torch.is_grad_enabled() and not compat.in_backward()
        if may_be_read and self._is_at_rest:
            self._begin_trace(training=True)
        self._note_use(bucket)
        self._pinned[bucket.index] += 1
        if self._pinned[bucket.index] == 1:
            if bucket.is_in_place and not bucket.is_transient:
                self._shown_before.add(bucket.index)
            self._drop_if_stale(bucket)
        if bucket.state is ParamState.SHARDED:
            self._start(bucket, why="for GatheredParameters")
        if bucket.state is ParamState.INFLIGHT:
            bucket.wait()
        if may_be_read:
            bucket.note_computation()
        bucket.memory.allow_writes()
        bucket.is_pinned = True
        bucket.show_whole()

    def unpin(self, bucket: Bucket) -> None:
        """End a `pin`; the last one reshards."""
        self._pinned[bucket.index] -= 1
        bucket.is_pinned = self._pinned[bucket.index] > 0
        if not bucket.is_pinned:
            del self._pinned[bucket.index]
            if bucket.index in self._shown_before:  # inside of a forward, whose modules go on with it
                self._shown_before.remove(bucket.index)
                return
        if not self._is_in_use(bucket) and bucket.state is ParamState.AVAILABLE:
            self._reshard(bucket)
        elif bucket.index not in self._depth and not bucket.is_pinned:
            bucket.show_fragments()

    def _note_use(self, bucket: Bucket) -> None:
        if bucket.is_transient:
            self.first_uses.note(bucket.index, compat.sequence_number() if torch.is_grad_enabled() else -1)

    def take_settled(self, number: int) -> list[int]:
        """The buckets that get no gradient any more when node `number` of autograd runs, each one once in a backward.

        Read while it is pinned, a bucket shows up nowhere, so a pinned one is left out.
        """
        return self.first_uses.take_after(number, but=self._pinned)

    def take_digest(self) -> int:
        """The digest of the gathers since this was last asked."""
        digest, self._digest = self._digest, 0
        return digest

    def conceal(self, returned: Set[int] = frozenset()) -> None:
        """The model has run and may still get a backward: memory stays, but the fragments are the parameters again.

        `returned` are buckets of which its result has views.
        """
        for bucket in self._buckets:
            if bucket.state is ParamState.INFLIGHT and not bucket.is_transient:
                bucket.wait()  # no module used it; what follows may edit the fragments, which lie in the same memory
            if not bucket.is_pinned:
                bucket.show_fragments()
        self._returned |= returned
        left = list(self._depth)  # by an exception
        self._depth.clear()
        self._idle.update((index, None) for index in left if index in self._live and not self._is_kept(index))

    def take_lost_edit(self) -> str | None:
        """At the end of a forward: a parameter whose edit in place, in a copy that stays, the next step would lose.

        That copy is written anew from the masters before it is used again.
        """
        found = None
        for bucket in self._cast:
            if not bucket.is_pinned and bucket.state is ParamState.AVAILABLE and not bucket.is_stale:
                edited = bucket.find_edited()
                if edited is not None:
                    bucket.forget_gathered()
                    found = found or edited
        return found

    def go_on_forward(self) -> None:
        """A backward inside the forward is over: what only it has used may go."""
        self.backward_uses.clear()
        for bucket in self._live.values():
            if self._is_in_hand(bucket) and not self._is_in_use(bucket):
                self._idle[bucket.index] = None

    def rest(self, returned: Set[int] | None = None) -> None:
        """The step's use of parameters is over: fragments are registered everywhere, transient memory is free.

        At the end of a forward, whose result has views of the buckets `returned`, but for what may still be read.
        """
        if returned is None:
            self.first_uses.end_backward()
            self._kept.clear()
            self._returned.clear()
        else:
            self._returned |= returned
        self._depth.clear()
        self._ahead.clear()
        self.backward_uses.clear()
        self._is_at_rest = True
        for bucket in self._buckets:
            if bucket.state is ParamState.INFLIGHT:
                bucket.wait()
            if self._is_kept(bucket.index) and bucket.index in self._live:
                bucket.show_fragments()
            elif bucket.state is ParamState.AVAILABLE and not self._pinned[bucket.index]:
                if self._is_keeping and bucket.is_transient:
                    bucket.show_fragments()
                    self._idle.setdefault(bucket.index)
                else:
                    self._reshard(bucket)

    def _is_kept(self, index: int) -> bool:
        return index in self._kept or index in self._returned

    def forget_order(self) -> None:
        """Expect nothing of the next step: ranks took other ways in this one."""
        self._training, self._inference = Trace(self._numel_of), Trace(self._numel_of)
        self._trace = self._training
        self._digest = 0

    def _begin_trace(self, *, training: bool) -> None:
        self._trace = self._training if training else self._inference
        self._trace.begin()
        self._is_at_rest = False
        if training:
            self.first_uses.begin_forward(compat.sequence_number())

    def _drop_if_stale(self, bucket: Bucket) -> None:
        """Reshard what was stepped or edited since it was gathered, as after a forward that had no backward."""
        if bucket.is_pinned or not bucket.is_stale:
            return
        if bucket.state is ParamState.INFLIGHT:
            bucket.wait()
        if bucket.state is ParamState.AVAILABLE:
            self._reshard(bucket)

    def _start(self, bucket: Bucket, *, why: str) -> None:
        self._make_room(bucket)
        self._gather(bucket, why=why)
        if bucket.is_transient:
            self._digest = (self._digest * 1_000_003 + bucket.index + 1) % 2**24
            self._live[bucket.index] = bucket
            self._live_numel += bucket.plan.layout.numel

    def _reshard(self, bucket: Bucket) -> None:
        self.backward_uses.interrupt()
        self._idle.pop(bucket.index, None)
        bucket.reshard()
        if self.recorder is not None:
            self.recorder.note(Kind.FREE, bucket.plan.name)
        if self._live.pop(bucket.index, None) is not None:
            self._live_numel -= bucket.plan.layout.numel

    def _is_in_hand(self, bucket: Bucket) -> bool:
        """Whether it is AVAILABLE, and was used since it was kept or gathered ahead."""
        is_spare = bucket.index in self._idle or bucket.index in self._ahead
        return bucket.state is ParamState.AVAILABLE and not is_spare

    def _is_in_use(self, bucket: Bucket) -> bool:
        return bucket.index in self._depth or self._is_kept(bucket.index) or self._pinned[bucket.index] > 0

    @property
    def _is_keeping(self) -> bool:
        return self._keeps and self._trace is self._inference

    def _make_room(self, needed: Bucket) -> None:
        """Release what is idle, but for what returns soon in the same pass, or is kept for the next forward."""
        if self._is_keeping:
            for index in reversed(list(self._idle)):  # what was used last comes last in the next forward, too
                if self._is_in_use(self._buckets[index]):
                    continue
                if self._live_numel + self._numel_of(needed.index) <= self._limits.max_live_numel:
                    return
                self._reshard(self._buckets[index])
            return
        for index in list(self._idle):
            bucket = self._buckets[index]
            if not self._is_in_use(bucket) and not self._returns(bucket, Pass.FORWARD):
                self._reshard(bucket)

    def _returns(self, bucket: Bucket, during: Pass) -> bool:
        """Whether it is worth keeping for its next use in this pass."""
        return self._live_numel <= self._limits.max_live_numel and self._trace.returns_within(
            Use(bucket.index, during), distance_numel=self._limits.max_reuse_numel
        )

    def _prefetch(self) -> None:
        room = self._limits.max_live_numel - self._live_numel
        planned = plan_prefetch(
            self._trace.upcoming,
            numel_of=self._numel_of,
            is_held=lambda index: self._buckets[index].state is not ParamState.SHARDED and index not in self._idle,
            budget_numel=min(room, self._limits.prefetch_numel - sum(self._ahead.values())),
        )
        self._ahead.update((index, self._numel_of(index)) for index in planned)
        missing = [index for index in planned if index not in self._idle]  # the others are there yet: kept
        for index in planned:
            self._idle.pop(index, None)
        for index in missing:
            self._start(self._buckets[index], why="ahead")

    def _gather(self, bucket: Bucket, *, why: str) -> None:
        began_ns = perf_counter_ns()
        bucket.gather()
        if self.recorder is not None and bucket.is_on_its_way:
            self.recorder.note(Kind.START, bucket.plan.name, transfer="gather", why=why, at_ns=began_ns)

    def _wait(self, bucket: Bucket, *, module: str) -> None:
        recorder = self.recorder if bucket.is_on_its_way else None
        if recorder is not None:
            recorder.note(Kind.NEED, bucket.plan.name, transfer="gather", why=f"for {module}")
        bucket.wait()
        if recorder is not None:
            recorder.note(Kind.COME, bucket.plan.name, transfer="gather")

    def _why_not_ahead(self, bucket: Bucket) -> str:
        """What kept `bucket` from being gathered before the use that has just been noted."""
        limits = self._limits
        if not bucket.is_transient:
            return "kept whole, and stepped since"
        if not limits.prefetch_numel:
            return "not ahead: overlap_comm is off, or stage3_prefetch_bucket_size is 0"
        if not self._trace.recorded:
            return "not ahead: the order is not known before the second step"
        if self._trace.left_at is not None:
            return "not ahead: modules ran in another order than in the step before"
        if self._trace.has_just_begun:
            return "the first of the step"
        if bucket.plan.layout.numel > limits.prefetch_numel:
            return "not ahead: larger than stage3_prefetch_bucket_size"
        if bucket.plan.layout.numel > limits.max_live_numel - self._live_numel:
            return "not ahead: stage3_max_live_parameters left no room"
        return "not ahead: stage3_prefetch_bucket_size left no room"
