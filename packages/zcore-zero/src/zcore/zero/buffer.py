"""The memory of one bucket: allocated, freed and handed to collectives here and nowhere else.

                      |p0        |p1           |p2 |--|  one layout, in elements (see layout.py)
    gathered          [whole bucket, compute dtype]      parameters are views of it; all-gather writes straight into it
    master            [owned slices, master dtype]       what the optimizer steps; fragments are views of it
    gradients.full    [whole bucket, accumulation dtype] where gradients accumulate and are reduced from
    gradients.reduced [owned slices, master dtype]       the mean gradient of the owned slices

Where a row keeps something WHOLE, the owned part is the own slot of the whole, so it costs no second copy: `master` in
`gathered`, `reduced` in `full`, where their dtypes are equal. What is SHARD lives as long as it is used. Gradients that
travel in another dtype than they accumulate in are cast into memory of their own for the time of the reduction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zcore.core import compat
from zcore.core.collectives import Collectives, Pending, tell_contents
from zcore.core.errors import StateError
from zcore.core.mesh import DataParallel
from zcore.zero.layout import BucketPlan
from zcore.zero.placement import Placement, Row, owned_slices

__all__ = ["BucketDtypes", "BucketGradients", "BucketParameters", "DataParallelGroups", "Ledger"]


@dataclass(frozen=True, slots=True)
class BucketDtypes:
    """What a bucket is computed in and stepped in; one dtype without mixed precision."""

    compute: torch.dtype
    master: torch.dtype
    accumulate: torch.dtype | None = None  # of gradients on their rank; None: as the master
    reduce: torch.dtype | None = None  # of gradients on their way; None: as they accumulate
    predivide: float = 1.0  # what gradients are divided by before they travel, so that sums stay in range
    rounds: bool = False  # without masters: stepped in fp32, and rounded back stochastically
    states: torch.dtype | None = None  # of the optimizer, where it rounds; None: fp32

    @property
    def of_gradients(self) -> tuple[torch.dtype, torch.dtype]:
        """In which gradients accumulate, and in which they are reduced."""
        accumulate = self.accumulate or self.master
        return accumulate, self.reduce or accumulate


@dataclass(frozen=True, slots=True)
class DataParallelGroups:
    """The collectives of the data-parallel axes.

    Gathers and reductions have a group each: neither waits for the other.
    """

    gather: Collectives  # dp or dp_shard
    reduce: Collectives  # the same ranks
    replicate: Collectives | None  # dp_replicate
    inner: Collectives | None = None  # the part of the shard axis that hpZ's second copy is sharded over

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        """Sum a flat tensor over every data rank, in place, and wait for it."""
        self.reduce.all_reduce(tensor, label=label).wait()
        if self.replicate is not None:
            self.replicate.all_reduce(tensor, label=label).wait()

    def broadcast(self, tensor: Tensor, *, src: int, label: str) -> None:
        """Send a flat tensor from data rank `src` (replica x shard size + rank in the shard group) to all, and wait."""
        if self.replicate is not None:
            self.replicate.broadcast(tensor, src=src // self.reduce.size, label=label).wait()
        self.reduce.broadcast(tensor, src=src % self.reduce.size, label=label).wait()


@dataclass(slots=True)
class Ledger:
    """Bytes of transient whole buckets that are live now, and the most there ever were."""

    live_bytes: int = 0
    peak_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        """Book an allocation, or a release as a negative one."""
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class BucketParameters:
    """`gathered` and `master` of one bucket, and the all-gather between them."""

    def __init__(
        self,
        plan: BucketPlan,
        row: Row,
        *,
        dp: DataParallel,
        dtypes: BucketDtypes,
        collectives: Collectives,
        inner: Collectives | None,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        self._label = plan.name
        tell_contents(plan.name, [spec.fqn for spec in plan.params])
        self._collectives = collectives
        self._ledger = ledger
        self._transient = row.parameters is Placement.SHARD
        low, high = plan.layout.bounds(owned_slices(row, dp))
        self._needs_gather = high - low < plan.layout.numel
        self.gathered = collectives.empty(plan.layout.numel, dtype=dtypes.compute, device=device)
        # .data: version counters apart from the buffer's, since a gather into it is no in-place edit to autograd
        self.views = tuple(
            self.gathered[offset : offset + spec.numel].view(spec.shape).data
            for offset, spec in zip(plan.layout.offsets, plan.params, strict=True)
        )
        self.casts = dtypes.compute != dtypes.master  # master and gathered copy are two
        if self._transient or self.casts:
            self.master = torch.zeros(high - low, dtype=dtypes.master, device=device)
        else:
            self.gathered.zero_()
            self.master = self.gathered[low:high]
        if self._transient:
            collectives.free_storage(self.gathered)
        self._inner = inner if self._transient else None
        self.secondary: Tensor | None = None  # this rank's shard of hpZ's copy
        if self._inner is not None:
            numel = plan.layout.numel // self._inner.size
            self.secondary = self._inner.empty(numel, dtype=dtypes.compute, device=device)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the whole bucket when it has memory."""
        return self.gathered.numel() * self.gathered.element_size()

    @property
    def resting_bytes(self) -> tuple[int, int]:
        """Bytes held between steps: by the copy that computes, and by a master copy apart from it."""
        master_bytes = self.master.numel() * self.master.element_size()
        second = 0 if self.secondary is None else self.secondary.numel() * self.secondary.element_size()
        if self.casts:
            return second + (0 if self._transient else self.gathered_bytes), master_bytes
        return second + (master_bytes if self._transient else self.gathered_bytes), 0

    def keep_secondary(self) -> None:
        """Copy this rank's shard of hpZ's copy out of what is gathered, if there is to be one."""
        if self._inner is not None and self.secondary is not None:
            start = self._inner.rank * self.secondary.numel()
            self.secondary.copy_(self.gathered[start : start + self.secondary.numel()])

    def start_gather(self, *, from_secondary: bool = False) -> Pending | None:
        """Fill `gathered` from the ranks' masters, or from hpZ's copy; None where that needs no communication."""
        if self._transient:
            self._ledger.add(self.gathered_bytes)
        if from_secondary and self._inner is not None and self.secondary is not None:
            return self._inner.all_gather(self.gathered, self.secondary, label=self._label)
        if not self._needs_gather:
            if self.casts:
                self.gathered.copy_(self.master)
            return None
        return self._collectives.all_gather(self.gathered, self.master, label=self._label)

    def allow_writes(self) -> None:
        """What is gathered may be edited on this rank alone."""
        self._collectives.own_storage(self.gathered)

    def release(self) -> bool:
        """Free `gathered` if the row says so; whether its contents are gone."""
        if self._transient:
            self._collectives.free_storage(self.gathered)
            self._ledger.add(-self.gathered_bytes)
        return self._transient


class BucketGradients:
    """The gradients of one trainable bucket: accumulated whole, reduced to the owned slices."""

    def __init__(
        self,
        plan: BucketPlan,
        row: Row,
        *,
        dp: DataParallel,
        dtypes: BucketDtypes,
        groups: DataParallelGroups,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        self._plan = plan
        self._master_dtype = dtypes.master
        self._dtype, self._reduce_dtype = dtypes.of_gradients
        self._device = device
        self._groups = groups
        self._ledger = ledger
        self._predivide = dtypes.predivide
        self._mean_over = dp.size
        self._transient = row.gradients is Placement.SHARD
        self._stepped_whole = row.optimizer is Placement.WHOLE
        self._owned = owned_slices(row, dp)
        self._bounds = plan.layout.bounds(self._owned)
        self._full: Tensor | None = None
        self._full_is_live = False
        # Views of `full`, made once and used in every step: one for each parameter, and the padding in between.
        self._places: tuple[Tensor, ...] = ()
        self._gaps: tuple[Tensor, ...] = ()
        self._is_open = False  # `full` is live, and nothing in it is reduced
        self._written: set[int] = set()  # parameters whose part of `full` holds a gradient
        self._inflight: tuple[Pending, Tensor] | None = None
        self._spare: Tensor | None = None  # last step's `reduced`, to be written again
        self.reduced: Tensor | None = None  # [owned slices], the mean over all ranks; None before the first reduction

    @property
    def held_bytes(self) -> int:
        """Bytes held now, between steps included."""
        tensors = [self._full if self._full_is_live else None, self._spare]
        if self.reduced is not None and (self._transient or self._reduce_dtype != self._master_dtype):
            tensors.append(self.reduced)
        return sum(each.numel() * each.element_size() for each in tensors if each is not None)

    def accumulate(self, index: int, grad: Tensor, *, factor: float = 1.0) -> None:
        """Move the gradient of parameter `index`, times `factor`, to where it will be reduced from, adding it there.

        Autograd hands over a fresh tensor; one pass moves it, casting to the accumulation dtype, and it is freed.
        """
        if grad.layout is not torch.strided:
            raise StateError(
                f"{self._plan.params[index].fqn} got a {grad.layout} gradient; flat buckets hold dense ones. Build the "
                "embedding with sparse=False."
            )
        if not self._is_open:
            self._open_full()
        place = self._places[index]
        if index in self._written:
            place.add_(grad, alpha=factor)
            return
        place.copy_(grad)
        self._written.add(index)
        if factor != 1.0:
            place.mul_(factor)

    def start_reduce(self) -> None:
        """Start the sum over all ranks into the owned slices; parameters without a gradient count as zero."""
        full = self._open_full()
        unwritten = [place for index, place in enumerate(self._places) if index not in self._written]
        if to_zero := [*self._gaps, *unwritten]:
            torch._foreach_zero_(to_zero)
        if self._predivide != 1.0:
            full.mul_(1.0 / self._predivide)
        sent = full
        if self._reduce_dtype != self._dtype:
            sent = self._groups.reduce.empty(full.numel(), dtype=self._reduce_dtype, device=self._device).copy_(full)
        low, high = self._bounds
        if self._stepped_whole:
            self._inflight = self._groups.reduce.all_reduce(sent, label=self._plan.name), sent
            return
        if not self._transient:
            out = sent[low:high]
        elif self.reduced is None and self._spare is not None and self._reduce_dtype == self._master_dtype:
            out, self._spare = self._spare, None
        else:
            out = torch.empty(high - low, dtype=self._reduce_dtype, device=self._device)
        self._inflight = self._groups.reduce.reduce_scatter(out, sent, label=self._plan.name), out

    def finish_reduce(self, *, unscale: float = 1.0) -> None:
        """Wait for the sum, take the mean and add it to earlier reductions of this step.

        unscale: what takes a factor out that the loss was multiplied by; of a power of two it changes no other bit.
        """
        if self._inflight is None:
            return
        (pending, out), self._inflight = self._inflight, None
        pending.wait()
        self._is_open = False
        if self._groups.replicate is not None:
            self._groups.replicate.all_reduce(out, label=self._plan.name).wait()
        if out.dtype != self._master_dtype:
            out = self._in_master_dtype(out)
        factor = unscale * self._predivide / self._mean_over
        if factor != 1.0:
            out.mul_(factor)
        self.reduced = out if self.reduced is None else self.reduced.add_(out)
        self._written.clear()
        if self._transient:
            self._free_full()

    @property
    def reduced_numel(self) -> int:
        """Elements of the owned slices."""
        low, high = self._bounds
        return high - low

    def live_reduced(self) -> Tensor:
        """The reduced gradients of the owned slices; zero where nothing was reduced yet."""
        if self.reduced is None:
            low, high = self._bounds
            self.reduced = torch.zeros(high - low, dtype=self._master_dtype, device=self._device)
        return self.reduced

    def _in_master_dtype(self, out: Tensor) -> Tensor:
        if self.reduced is None and self._spare is not None:
            spare, self._spare = self._spare, None
            return spare.copy_(out)
        return out.to(self._master_dtype)

    def drop(self, index: int) -> None:
        """Forget the gradient of parameter `index`: what is reduced of it, and what waits to be."""
        self._written.discard(index)
        if self.reduced is not None:
            part = self._plan.layout.fragment(index, self._owned)
            self.reduced[part.offset : part.offset + part.numel].zero_()

    def clear(self) -> None:
        """Forget all gradients; memory that the row keeps between steps stays, unless the user holds a view of it."""
        is_own = self._transient or self._reduce_dtype != self._master_dtype
        if is_own and self.reduced is not None and not compat.is_held_elsewhere(self.reduced):
            self._spare = self.reduced
        self.reduced = None
        self._is_open = False
        self._written.clear()
        if self._full is None or not self._full_is_live:
            return
        if self._transient:
            self._free_full()
        elif compat.is_held_elsewhere(self._full, num_views=len(self._places) + len(self._gaps)):
            self._full, self._full_is_live, self._places, self._gaps = None, False, (), ()

    def _open_full(self) -> Tensor:
        """`full`, to be written; an earlier sum of this step, which may lie in this rank's slot of it, is moved out."""
        if self._full is None:
            layout = self._plan.layout
            self._full = full = self._groups.reduce.empty(layout.numel, dtype=self._dtype, device=self._device)
            ends = [offset + numel for offset, numel in zip(layout.offsets, layout.numels, strict=True)]
            self._places = tuple(
                full[offset:end].view(spec.shape)
                for offset, end, spec in zip(layout.offsets, ends, self._plan.params, strict=True)
            )
            between = zip(ends, [*layout.offsets[1:], layout.numel], strict=True)
            self._gaps = tuple(full[end:offset] for end, offset in between if end < offset)
        elif not self._full_is_live:
            self._groups.reduce.alloc_storage(self._full)
        if not self._full_is_live:
            self._full_is_live = True
            if self._transient:
                self._ledger.add(self._full.numel() * self._full.element_size())
        own = None if self._transient else self.reduced
        if own is not None and compat.storage_key(own) == compat.storage_key(self._full):
            self.reduced = own.clone()
        self._is_open = True
        return self._full

    def _free_full(self) -> None:
        assert self._full is not None
        self._groups.reduce.free_storage(self._full)
        self._full_is_live = self._is_open = False
        self._ledger.add(-self._full.numel() * self._full.element_size())
