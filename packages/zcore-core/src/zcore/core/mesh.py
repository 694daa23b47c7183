"""Named axes over torch's DeviceMesh: which ranks work on what together.

The axes, outermost first; neighbours in the innermost axis are neighbours in rank:

    pp            pipeline stages
    dp_replicate  copies of the sharded state   } hybrid sharding: a shard lives in one dp_shard group and is
    dp_shard      ranks that share one state    } copied along dp_replicate. Plain sharding has `dp` instead.
    dp            data parallel
    sp ep tp      sequence, expert, tensor parallel
"""

from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zcore.core import compat
from zcore.core.errors import MeshError

__all__ = ["AXES", "DataParallel", "build_mesh", "data_parallel", "inner_group", "plan_mesh", "twin_group"]

AXES = ("pp", "dp_replicate", "dp_shard", "dp", "sp", "ep", "tp")


def plan_mesh(sizes: dict[str, int], *, world_size: int) -> dict[str, int]:
    """Order the axes as `AXES` does and fill in one size given as -1.

    Raises MeshError for an unknown axis, `dp` beside `dp_shard`, or a product that is not `world_size`.

    >>> plan_mesh({"tp": 2, "dp": -1}, world_size=8)
    {'dp': 4, 'tp': 2}
    """
    if unknown := set(sizes) - set(AXES):
        raise MeshError(f"Unknown mesh axis {sorted(unknown)}; the axes are {', '.join(AXES)}.")
    if "dp" in sizes and {"dp_replicate", "dp_shard"} & set(sizes):
        raise MeshError("A mesh has either `dp`, or `dp_replicate` and `dp_shard` for hybrid sharding, not both.")
    ordered = {axis: sizes[axis] for axis in AXES if axis in sizes}
    open_axes = [axis for axis, size in ordered.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in ordered.values()):
        raise MeshError(f"Mesh sizes {ordered} need to be 1 or more, with at most one -1 to be filled in.")
    for axis in open_axes:
        ordered[axis] = max(1, world_size // prod(size for size in ordered.values() if size != -1))
    if prod(ordered.values()) != world_size:
        raise MeshError(
            f"A mesh of {ordered} has {prod(ordered.values())} ranks, but this run has {world_size}. Change one axis "
            "to -1 to have it filled in, or start as many processes as the mesh has ranks."
        )
    return ordered


def build_mesh(*, device_type: str | None = None, **sizes: int) -> DeviceMesh:
    """A DeviceMesh with named axes over all ranks, such as `build_mesh(dp=-1)`; every rank calls it.

    `device_type` is by default what the process group moves: "cuda" over NCCL, else "cpu". Raises MeshError as
    `plan_mesh` does.
    """
    if not dist.is_initialized():
        raise MeshError(
            "A mesh is built over the ranks of a process group, and there is none yet. Call "
            "torch.distributed.init_process_group first, or `zero.init_distributed()`."
        )
    if device_type is None:
        device_type = "cuda" if compat.backend_name() == "nccl" else "cpu"
    planned = plan_mesh(sizes or {"dp": -1}, world_size=dist.get_world_size())
    return init_device_mesh(device_type, tuple(planned.values()), mesh_dim_names=tuple(planned))


@dataclass(frozen=True, slots=True)
class DataParallel:
    """The data-parallel axes of a mesh as this rank sees them. Plain `dp` is a hybrid with one replica."""

    shard_axis: str
    replicate_axis: str | None
    shard_size: int
    replicate_size: int
    shard_rank: int
    replicate_rank: int

    @property
    def size(self) -> int:
        """Ranks that see different data: the divisor of the mean gradient."""
        return self.shard_size * self.replicate_size

    @property
    def rank(self) -> int:
        """This rank's place among them: one shard group after the other."""
        return self.replicate_rank * self.shard_size + self.shard_rank


def data_parallel(mesh: DeviceMesh) -> DataParallel:
    """Find `dp`, or `dp_shard` with or without `dp_replicate`, in `mesh`.

    Raises MeshError when the mesh has no data-parallel axis.
    """
    names = mesh.mesh_dim_names or ()
    shard_axis = next((name for name in ("dp", "dp_shard") if name in names), None)
    if shard_axis is None:
        raise MeshError(
            f"The mesh has axes {list(names)}, none of which is data parallel. Build it with "
            "`build_mesh(dp=-1)`, or with `dp_replicate` and `dp_shard` for hybrid sharding."
        )
    replicate_axis = "dp_replicate" if "dp_replicate" in names else None
    return DataParallel(
        shard_axis=shard_axis,
        replicate_axis=replicate_axis,
        shard_size=mesh[shard_axis].size(),
        replicate_size=mesh[replicate_axis].size() if replicate_axis else 1,
        shard_rank=mesh.get_local_rank(shard_axis),
        replicate_rank=mesh.get_local_rank(replicate_axis) if replicate_axis else 0,
    )


def twin_group(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """A second process group over the ranks of `axis`; every rank of the mesh calls it, in the same order.

    Two groups do not wait for each other, so gathers and reductions need no common order.
    """
    return _group_of(mesh, _rows(mesh, axis))


def inner_group(mesh: DeviceMesh, axis: str, *, size: int) -> dist.ProcessGroup:
    """A process group over each `size` consecutive ranks of `axis`, as those of one host; every rank calls it.

    Raises MeshError where that does not divide them into equal groups.
    """
    rows = _rows(mesh, axis)
    if len(rows[0]) % size:
        raise MeshError(f"Groups of {size} ranks do not divide the {len(rows[0])} of {axis}; take a divisor.")
    return _group_of(mesh, [row[start : start + size] for row in rows for start in range(0, len(row), size)])


def _rows(mesh: DeviceMesh, axis: str) -> list[list[int]]:
    """The global ranks along `axis`, one list for each place on the other axes."""
    dim = (mesh.mesh_dim_names or ()).index(axis)
    rows: list[list[int]] = mesh.mesh.movedim(dim, -1).reshape(-1, mesh.mesh.size(dim)).tolist()
    return rows


def _group_of(mesh: DeviceMesh, rows: list[list[int]]) -> dist.ProcessGroup:
    group: dist.ProcessGroup | None
    world = dist.group.WORLD
    assert world is not None
    timeout = compat.timeout_of(world) if compat.backend_name() in ("gloo", "nccl") else None
    group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
    if group is None:
        raise MeshError(f"Rank {dist.get_rank()} is not part of the mesh {mesh}; build the mesh over all ranks.")
    return group
