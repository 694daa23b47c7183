"""Where each parameter of a bucket lies, and which part of it each slice holds. Pure: allocates nothing.

    |p0        |p1            |p2  |--|      three parameters end to end, each start aligned; padding at the end
    |slice 0   |slice 1   |slice 2    |      as many equal slices as ranks see different data
     fragments: p0 = s0[0:n0]; p1 = s0[n0:] + s1[...]; ...

Compute copy, master copy, gradients and optimizer state of a bucket all have this one layout, in elements.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from zcore.core.errors import LayoutError

__all__ = ["ALIGN_NUMEL", "BucketLayout", "BucketPlan", "Fragment", "ParamSpec", "Unit", "plan_buckets", "plan_layout"]

ALIGN_NUMEL = 32  # 64 bytes of bf16, 128 of fp32: a cache line, and what vectorised and tensor-core loads want
RUN_FLOOR_NUMEL = 2**20  # 4 MiB of fp32: below, a collective's latency outweighs its bytes


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """A parameter as the planner sees it."""

    fqn: str  # fully qualified name; the first one, if it is tied
    shape: tuple[int, ...]
    dtype: torch.dtype  # as the model was built
    trainable: bool

    @property
    def numel(self) -> int:
        """Elements: 1 without dimensions, possibly 0."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of one parameter inside a range of slices; empty (`start == stop`) where they hold nothing of it."""

    start: int  # elements, in the flattened parameter
    stop: int
    offset: int  # elements, in the range of slices

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """Offsets in elements; every slice has the same size on every rank, so collectives write straight into it."""

    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    slice_numel: int
    num_slices: int

    @property
    def numel(self) -> int:
        """Elements of the whole bucket, padding included."""
        return self.slice_numel * self.num_slices

    def bounds(self, slices: range) -> tuple[int, int]:
        """First and one-past-last element of consecutive slices."""
        return slices.start * self.slice_numel, slices.stop * self.slice_numel

    def fragment(self, index: int, slices: range) -> Fragment:
        """What of parameter `index` lies in `slices`."""
        low, high = self.bounds(slices)
        offset, numel = self.offsets[index], self.numels[index]
        start = min(max(low - offset, 0), numel)
        stop = max(start, min(high - offset, numel))
        return Fragment(start, stop, offset=min(max(offset - low, 0), high - low))


def plan_layout(numels: Sequence[int], *, num_slices: int, align_numel: int = ALIGN_NUMEL) -> BucketLayout:
    """Place parameters end to end at aligned starts and cut equal aligned slices (ZeRO, arXiv 1910.02054, sec. 5).

    Raises LayoutError if `num_slices` or `align_numel` is below 1.

    >>> plan_layout([5, 6], num_slices=3, align_numel=2)  # starts 0 and 6, ends at 12: 3 slices of 4
    BucketLayout(offsets=(0, 6), numels=(5, 6), slice_numel=4, num_slices=3)
    """
    if num_slices < 1 or align_numel < 1:
        raise LayoutError(
            f"Cannot cut {num_slices=} at {align_numel=}; both must be 1 or more. Check the mesh's sizes."
        )
    offsets, end = [], 0
    for numel in numels:
        offsets.append(end)
        end += -(-numel // align_numel) * align_numel
    slice_numel = -(-end // (num_slices * align_numel)) * align_numel
    return BucketLayout(tuple(offsets), tuple(numels), slice_numel, num_slices)


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are used together: a transformer block, or a run of modules between blocks."""

    name: str
    params: tuple[ParamSpec, ...]
    is_block: bool  # a block is gathered as one; a run of other modules may be cut by size


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """One bucket: parameters of one dtype, all trainable or all frozen, that are gathered and reduced together."""

    name: str
    unit: str  # that its parameters are of; a unit of several kinds, or a large one, has several buckets
    params: tuple[ParamSpec, ...]
    layout: BucketLayout
    keep_whole: bool  # too small to gather: stays whole under stage 3

    @property
    def dtype(self) -> torch.dtype:
        """As the model was built."""
        return self.params[0].dtype

    @property
    def trainable(self) -> bool:
        """Whether it has gradients and is stepped."""
        return self.params[0].trainable


@dataclass(slots=True)
class _Group:
    """A bucket that is still being filled."""

    name: str
    params: list[ParamSpec]
    numel: int = 0

    def add(self, param: ParamSpec) -> None:
        self.params.append(param)
        self.numel += param.numel


def plan_buckets(
    units: Sequence[Unit],
    *,
    num_slices: int,
    bucket_numel: int,
    small_numel: int = 0,
    small_total_numel: int | None = None,
) -> tuple[BucketPlan, ...]:
    """One bucket per unit, dtype and trainability, in order of use, of at most `bucket_numel` elements.

    Runs outside blocks are cut finer, at an eighth of the model but not below RUN_FLOOR_NUMEL, so that a model without
    recognisable blocks is still gathered piece by piece. Parameters up to `small_numel` elements, and up to
    `small_total_numel` in all, form buckets of their own that stay whole. A single parameter is never cut between
    buckets: one that is larger than the limit has a bucket to itself.
    """
    total_numel = sum(param.numel for unit in units for param in unit.params)
    run_numel = min(bucket_numel, max(RUN_FLOOR_NUMEL, total_numel // 8))
    kept: dict[tuple[torch.dtype, bool], _Group] = {}
    kept_numel = 0
    groups: list[_Group] = []
    for unit in units:
        limit = bucket_numel if unit.is_block else run_numel
        filling: dict[tuple[torch.dtype, bool], _Group] = {}
        for param in unit.params:
            kind = (param.dtype, param.trainable)
            small_enough = small_total_numel is None or kept_numel + param.numel <= small_total_numel
            if param.numel <= small_numel and small_enough:
                kept.setdefault(kind, _Group("small parameters", [])).add(param)
                kept_numel += param.numel
                continue
            group = filling.get(kind)
            if group is None or (group.params and group.numel + param.numel > limit):
                group = filling[kind] = _Group(unit.name, [])
                groups.append(group)
            group.add(param)
    everything = [(group, False) for group in groups] + [(group, True) for group in kept.values()]
    names = _distinct([group.name for group, _ in everything])
    return tuple(
        BucketPlan(
            name,
            group.name,
            tuple(group.params),
            plan_layout([param.numel for param in group.params], num_slices=num_slices),
            keep_whole,
        )
        for name, (group, keep_whole) in zip(names, everything, strict=True)
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    totals, seen = Counter(names), Counter[str]()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if totals[name] == 1 else f"{name} [{seen[name]}/{totals[name]}]")
    return distinct
