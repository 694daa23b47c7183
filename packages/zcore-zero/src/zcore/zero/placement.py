"""The placement table: a ZeRO stage is a row that says what each rank holds of parameters, gradients, optimizer state.

    dp (or dp_shard)    parameters  gradients  optimizer    what follows from the row
    stage 0             WHOLE       WHOLE      WHOLE        all-reduce of gradients, once per optimizer step
    stage 1             WHOLE       WHOLE      SHARD        reduce-scatter once per optimizer step, all-gather after it
    stage 2             WHOLE       SHARD      SHARD        reduce-scatter in each backward, all-gather after the step
    stage 3             SHARD       SHARD      SHARD        the same, and parameters are gathered around their use

hpZ is stage 3 with a second copy of the parameters, in their compute dtype, SHARD over a part of the ranks, as those of
one host (ZeRO++, arXiv 2306.10209, sec. 3.2): after the first gather of a step all others stay inside of that part.

Along `dp_replicate` everything is WHOLE: hybrid sharding (HSDP, MiCS) is any row on a mesh that has that axis, with one
more all-reduce of the gradient shards along it. Small parameters of stage 3 stay whole: they take the row of stage 2.

A bucket is always cut into as many slices as ranks see different data; a row says which consecutive slices a rank owns.
The cut does not depend on the row, and so neither do the bits of a norm or a sum.

    4 ranks, slices       s0 s1 s2 s3
    stage 3, rank 1          s1                   dp=4
    hybrid,  rank 1             s2 s3             dp_replicate=2 x dp_shard=2: shard_rank 1, replicate_rank 0
    stage 0, rank 1       s0 s1 s2 s3
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from zcore.core.errors import ConfigError
from zcore.core.mesh import DataParallel

__all__ = ["TABLE", "Placement", "Row", "owned_slices", "row_for", "state_bytes"]


class Placement(Enum):
    """What a rank of the shard axis holds of something."""

    WHOLE = auto()  # all of it, like every other rank
    SHARD = auto()  # its own slices only


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    parameters: Placement
    gradients: Placement
    optimizer: Placement

    def kept_whole(self) -> "Row":
        """The row of parameters too small to be worth gathering."""
        return replace(self, parameters=Placement.WHOLE)


TABLE = {
    0: Row(parameters=Placement.WHOLE, gradients=Placement.WHOLE, optimizer=Placement.WHOLE),
    1: Row(parameters=Placement.WHOLE, gradients=Placement.WHOLE, optimizer=Placement.SHARD),
    2: Row(parameters=Placement.WHOLE, gradients=Placement.SHARD, optimizer=Placement.SHARD),
    3: Row(parameters=Placement.SHARD, gradients=Placement.SHARD, optimizer=Placement.SHARD),
}


def row_for(zero_stage: int, *, shard_size: int) -> Row:
    """The row of a stage; with nobody to share with (`shard_size` 1) every stage is stage 0 and copies nothing.

    Raises ConfigError for a stage that is not in the table.
    """
    if zero_stage not in TABLE:
        raise ConfigError(
            f"ZeRO stage {zero_stage!r} does not exist; expected 0 (nothing sharded), 1 (optimizer "
            "state), 2 (and gradients) or 3 (and parameters). To shard inside a group only, pass a mesh "
            "with dp_replicate and dp_shard."
        )
    return TABLE[zero_stage] if shard_size > 1 else TABLE[0]


def owned_slices(row: Row, dp: DataParallel) -> range:
    """The slices of each bucket whose optimizer state this rank keeps, and which it steps."""
    if row.optimizer is Placement.WHOLE:
        return range(dp.size)
    return range(dp.shard_rank * dp.replicate_size, (dp.shard_rank + 1) * dp.replicate_size)


def state_bytes(
    row: Row,
    *,
    numel: int,
    shard_size: int,
    compute_bytes: int,
    master_bytes: int,
    optimizer_bytes: int,
    secondary_size: int = 0,
) -> int:
    """Model-state bytes per rank, all `_bytes` per element (ZeRO, arXiv 1910.02054, sec. 3 and fig. 1).

    `compute_bytes` is the parameter's, `master_bytes` that of the copy which is stepped and of its gradient (equal to
    the parameter itself without mixed precision), `optimizer_bytes` the optimizer's own state, `secondary_size` how
    many ranks hpZ's second copy is sharded over, 0 without. Sharded parameters keep no low-precision copy of their own:
    it is cast from the master shard into the gathered buffer.

    >>> state_bytes(TABLE[1], numel=1000, shard_size=4, compute_bytes=2, master_bytes=4, optimizer_bytes=8)
    9000
    """
    mixed = compute_bytes != master_bytes

    def held(placement: Placement, bytes_each: int) -> int:
        return numel * bytes_each // (shard_size if placement is Placement.SHARD else 1)

    parameters = held(row.parameters, compute_bytes)
    if mixed:
        parameters = parameters if row.parameters is Placement.WHOLE else 0
        parameters += held(row.optimizer, master_bytes)
    if secondary_size and row.parameters is Placement.SHARD:
        parameters += numel * compute_bytes // secondary_size
    return parameters + held(row.gradients, master_bytes) + held(row.optimizer, optimizer_bytes)
