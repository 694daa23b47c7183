"""The table is the one in the papers, every slice has an owner, and the formula of bytes is figure 1's."""

import pytest

from zcore.core.errors import ConfigError
from zcore.core.mesh import DataParallel
from zcore.zero.placement import TABLE, Placement, owned_slices, row_for, state_bytes

SHARD, WHOLE = Placement.SHARD, Placement.WHOLE


def ranks_of(*, shard_size: int, replicate_size: int = 1) -> list[DataParallel]:
    """Every rank of a mesh, in order of global rank: neighbours are in one shard group."""
    return [
        DataParallel("dp_shard", "dp_replicate", shard_size, replicate_size, shard_rank, replicate_rank)
        for replicate_rank in range(replicate_size)
        for shard_rank in range(shard_size)
    ]


def test_each_stage_shards_one_thing_more() -> None:
    sharded = {
        stage: {name for name in ("parameters", "gradients", "optimizer") if getattr(row, name) is SHARD}
        for stage, row in TABLE.items()
    }
    assert sharded == {
        0: set(),
        1: {"optimizer"},
        2: {"optimizer", "gradients"},
        3: {"optimizer", "gradients", "parameters"},
    }


def test_small_parameters_of_stage_3_take_the_row_of_stage_2() -> None:
    assert TABLE[3].kept_whole() == TABLE[2]
    assert [TABLE[stage].kept_whole() for stage in range(3)] == [TABLE[stage] for stage in range(3)]


@pytest.mark.parametrize("zero_stage", range(4))
def test_one_rank_shards_nothing(zero_stage: int) -> None:
    assert row_for(zero_stage, shard_size=1) == TABLE[0]
    assert row_for(zero_stage, shard_size=2) == TABLE[zero_stage]


@pytest.mark.parametrize("zero_stage", [-1, 4])
def test_a_stage_that_does_not_exist_is_refused_by_number(zero_stage: int) -> None:
    with pytest.raises(ConfigError, match=f"stage {zero_stage} does not exist"):
        row_for(zero_stage, shard_size=2)


@pytest.mark.parametrize(("shard_size", "replicate_size"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 3), (1024, 1)])
@pytest.mark.parametrize("zero_stage", range(4))
def test_a_shard_group_owns_every_slice_once_where_the_optimizer_is_sharded(
    zero_stage: int, shard_size: int, replicate_size: int
) -> None:
    row = TABLE[zero_stage]
    ranks = ranks_of(shard_size=shard_size, replicate_size=replicate_size)
    every_slice = list(range(shard_size * replicate_size))
    for replicate_rank in range(replicate_size):
        group = [rank for rank in ranks if rank.replicate_rank == replicate_rank]
        owned = [list(owned_slices(row, rank)) for rank in group]
        if row.optimizer is WHOLE:
            assert owned == [every_slice] * shard_size
        else:
            in_order = [each for slices in owned for each in slices]
            assert in_order == every_slice  # consecutive, in order of rank: an all-gather puts them end to end
    counts = {len(owned_slices(row, rank)) for rank in ranks}
    assert len(counts) == 1  # equal on every rank: collectives need it


def test_replicas_own_the_same_slices() -> None:
    owned = [owned_slices(TABLE[3], rank) for rank in ranks_of(shard_size=2, replicate_size=2)]
    assert owned == [range(2), range(2, 4), range(2), range(2, 4)]


# 7.5e9 parameters on 64 ranks with Adam and bf16: figure 1 of arXiv 1910.02054 has 120, 31.4, 16.6 and 1.9 GB with a
# 2-byte gradient. Here the gradient is fp32, and sharded parameters have no bf16 copy of their own.
@pytest.mark.parametrize(
    ("zero_stage", "bytes_per_parameter"),
    [
        (0, 2 + 4 + 4 + 8),
        (1, 2 + 4 + (4 + 8) / 64),
        (2, 2 + (4 + 4 + 8) / 64),
        (3, (4 + 4 + 8) / 64),
    ],
)
def test_bytes_of_mixed_precision_adam(zero_stage: int, bytes_per_parameter: float) -> None:
    numel = 7_500_000_000
    found = state_bytes(
        TABLE[zero_stage], numel=numel, shard_size=64, compute_bytes=2, master_bytes=4, optimizer_bytes=8
    )
    assert found == numel * bytes_per_parameter


@pytest.mark.parametrize(
    ("zero_stage", "bytes_per_parameter"), [(0, 16), (1, 4 + 4 + 2), (2, 4 + 1 + 2), (3, 1 + 1 + 2)]
)
def test_bytes_of_fp32_adam_on_4_ranks(zero_stage: int, bytes_per_parameter: int) -> None:
    """Without mixed precision the parameter is its own master."""
    row = TABLE[zero_stage]
    found = state_bytes(row, numel=1000, shard_size=4, compute_bytes=4, master_bytes=4, optimizer_bytes=8)
    assert found == 1000 * bytes_per_parameter
