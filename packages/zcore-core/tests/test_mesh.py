"""Named axes: planned for any number of ranks without processes, and found again in a real mesh."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from zcore.core.errors import MeshError
from zcore.core.mesh import AXES, DataParallel, build_mesh, data_parallel, plan_mesh, twin_group
from zcore.core.testing import RankFailed, simulated_world
from zcore.core.torch_collectives import TorchCollectives


@pytest.mark.parametrize(
    ("sizes", "world_size", "planned"),
    [
        ({"dp": -1}, 1, {"dp": 1}),
        ({"dp": -1}, 7, {"dp": 7}),
        ({"tp": 2, "dp": -1}, 8, {"dp": 4, "tp": 2}),
        ({"tp": 2, "pp": 2, "dp": 2}, 8, {"pp": 2, "dp": 2, "tp": 2}),
        ({"dp_shard": 8, "dp_replicate": -1}, 1024, {"dp_replicate": 128, "dp_shard": 8}),
        ({"dp_shard": -1, "dp_replicate": 1}, 4, {"dp_replicate": 1, "dp_shard": 4}),
    ],
)
def test_axes_are_ordered_and_one_size_is_filled_in(sizes, world_size, planned):
    found = plan_mesh(sizes, world_size=world_size)
    assert found == planned
    assert list(found) == list(planned)  # outermost first


@given(st.dictionaries(st.sampled_from(AXES), st.integers(-1, 6), max_size=4), st.integers(1, 64))
def test_a_plan_has_as_many_ranks_as_the_world_or_is_refused(sizes, world_size):
    try:
        planned = plan_mesh(sizes, world_size=world_size)
    except MeshError:
        return
    assert prod(planned.values()) == world_size
    assert set(planned) == set(sizes)
    assert all(size >= 1 for size in planned.values())
    assert all(planned[axis] == size for axis, size in sizes.items() if size != -1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 4}, ["Unknown mesh axis ['data']", "dp"]),
        ({"dp": 3}, ["{'dp': 3}", "3 ranks", "has 4", "-1"]),
        ({"dp": -1, "tp": 3}, ["has 4", "'tp': 3"]),
        ({"dp": -1, "tp": -1}, ["at most one -1"]),
        ({"dp": 0}, ["1 or more"]),
        ({"dp": -2}, ["1 or more"]),
        ({"dp": 2, "dp_shard": 2}, ["either `dp`", "not both"]),
        ({"dp": 2, "dp_replicate": 2}, ["either `dp`", "not both"]),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_says_what_would(sizes, words):
    with pytest.raises(MeshError) as caught:
        plan_mesh(sizes, world_size=4)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert str(caught.value).endswith(".")


def see_data_axes():
    hybrid, beside_tp = {"dp_replicate": 2, "dp_shard": 2}, {"dp": -1, "tp": 2}
    return [data_parallel(build_mesh(**sizes)) for sizes in ({"dp": 4}, {"dp_shard": -1}, hybrid, beside_tp, {})]


def test_data_axes_are_found_as_each_rank_sees_them(ranks):
    for rank, seen in enumerate(ranks(4, see_data_axes)):
        plain, shard_only, hybrid, beside_tp, default = seen
        assert plain == default == DataParallel("dp", None, 4, 1, rank, 0)
        assert shard_only == DataParallel("dp_shard", None, 4, 1, rank, 0)
        assert hybrid == DataParallel("dp_shard", "dp_replicate", 2, 2, rank % 2, rank // 2)
        assert beside_tp == DataParallel("dp", None, 2, 1, rank // 2, 0)  # neighbours in tp are neighbours in rank
        assert [each.size for each in seen] == [4, 4, 4, 2, 4]


def refuse_without_data_axis():
    with pytest.raises(MeshError, match="none of which is data parallel") as caught:
        data_parallel(build_mesh(tp=-1))
    return str(caught.value)


def test_a_mesh_without_a_data_axis_is_refused(ranks):
    assert "build_mesh(dp=-1)" in ranks(2, refuse_without_data_axis)[0]


@pytest.mark.parametrize(("world_size", "rank"), [(64, 0), (64, 37), (1024, 1023)])
def test_large_meshes_are_built_without_processes(world_size, rank):
    with simulated_world(world_size, rank=rank):
        seen = data_parallel(build_mesh(dp_replicate=-1, dp_shard=8))
    assert (seen.shard_size, seen.replicate_size, seen.size) == (8, world_size // 8, world_size)
    assert (seen.shard_rank, seen.replicate_rank) == (rank % 8, rank // 8)


def use_twins():
    """Each twin has the ranks of its axis, in order, and a traffic of its own."""
    mesh = build_mesh(dp_replicate=2, dp_shard=2)
    members = {}
    for axis in ("dp_shard", "dp_replicate"):
        group, twin = mesh.get_group(axis), twin_group(mesh, axis)
        assert group is not twin
        assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(twin)
        members[axis] = dist.get_process_group_ranks(twin)
        first, second = TorchCollectives(group, name="gather"), TorchCollectives(twin, name="reduce")
        one, other = torch.ones(3), torch.full((3,), 2.0)
        works = [second.all_reduce(other, label="second"), first.all_reduce(one, label="first")]
        for work in works if dist.get_rank() % 2 else reversed(works):
            work.wait()
        assert (one.tolist(), other.tolist()) == ([2.0] * 3, [4.0] * 3)
    return members


def test_a_twin_group_has_the_same_ranks_and_waits_for_nobody(ranks):
    results = ranks(4, use_twins)
    assert [each["dp_shard"] for each in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["dp_replicate"] for each in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def leave_a_twin_alone(sizes, axis):
    mesh = build_mesh(**sizes)
    twin = TorchCollectives(twin_group(mesh, axis), name="reduce")
    if dist.get_rank() == 0:
        twin.all_reduce(torch.ones(1), label="alone").wait()
    return "elsewhere"


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"dp_replicate": 1, "dp_shard": 2}], ids=str)
def test_a_twin_group_has_the_timeout_of_the_process_group(ranks, sizes):
    axis = "dp" if "dp" in sizes else "dp_shard"
    with pytest.raises(RankFailed) as caught:
        ranks(2, leave_a_twin_alone, sizes, axis, group_timeout_s=0.5, deadline_s=6.0)
    (failure,) = caught.value.failures
    assert failure.type_name == "CollectiveError"
    assert "timeout" in failure.message


def leave_an_axis_alone():
    mesh = build_mesh(dp_replicate=1, dp_shard=2)
    axis = TorchCollectives(mesh.get_group("dp_shard"), name="gather")
    if dist.get_rank() == 0:
        axis.all_reduce(torch.ones(1), label="alone").wait()
    return "elsewhere"


def test_a_group_of_a_mesh_has_the_timeout_of_the_process_group(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, leave_an_axis_alone, group_timeout_s=0.5, deadline_s=6.0)
    assert caught.value.failures[0].type_name == "CollectiveError"
