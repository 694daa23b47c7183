"""Worlds that exist only as numbers."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from zcore.core.errors import StateError
from zcore.core.testing import simulated_world


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (64, 7), (1024, 1023)])
def test_a_mesh_of_any_size_stands_in_one_process(world_size, rank):
    with simulated_world(world_size, rank=rank):
        assert (dist.get_world_size(), dist.get_rank()) == (world_size, rank)
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
        dist.all_reduce(torch.ones(1), group=mesh["dp"].get_group())
    assert not dist.is_initialized()


def test_the_group_is_gone_after_an_error():
    with pytest.raises(ValueError, match="inside"), simulated_world(4):
        raise ValueError("inside")
    assert not dist.is_initialized()


def test_a_world_inside_a_world_is_refused():
    with simulated_world(4), pytest.raises(StateError, match="already has a process group of 4"), simulated_world(2):
        pass
    assert not dist.is_initialized()
