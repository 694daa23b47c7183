"""The optimizers on DTensors, of which a rank steps its shard: beside whole parameters, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_cases import STEPS
from torch import Tensor, nn

from zcore.core.errors import ConfigError, LayoutError
from zcore.core.testing.simulated import simulated_world
from zcore.kernels import optim
from zcore.kernels.ops import sgd_step, squared_norm


def sharded(tensor: Tensor, mesh: Any) -> Any:
    """A DTensor of `tensor` cut by rows, as rank 1 of 2 holds it."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor.chunk(2)[1].clone(), mesh, [Shard(0)], run_check=False)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [optim.AdamW, optim.Lion, optim.Adagrad, optim.SGD])
def test_a_sharded_parameter_is_stepped_as_in_the_whole(
    kind: Callable[..., torch.optim.Optimizer], state_dtype: torch.dtype
) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    settings: dict[str, Any] = {"lr": 0.1, "state_dtype": state_dtype} | (
        {"momentum": 0.9} if kind is optim.SGD else {}
    )
    random = torch.Generator().manual_seed(0)
    values, grads = torch.randn(6, 5, generator=random), torch.randn(3, 6, 5, generator=random)
    with simulated_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        whole, shard = nn.Parameter(values.clone()), nn.Parameter(sharded(values, mesh))
        optimizers = kind([whole], **settings), kind([shard], **settings)
        for grad in grads:
            whole.grad, shard.grad = grad.clone(), sharded(grad, mesh)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(shard.to_local(), whole.chunk(2)[1])
        for key, value in optimizers[0].state[whole].items():
            found = optimizers[1].state[shard][key]
            if value.ndim:
                assert type(found) is type(shard.data)  # so that state_dict knows how it is cut
                assert found.shape == value.shape
                assert torch.equal(found.to_local(), value.chunk(2)[1])
            else:
                assert found == value


def test_a_shard_of_nothing_and_a_stepped_shard_that_a_backward_pass_needs() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    with simulated_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        none, shard = (nn.Parameter(sharded(torch.ones(rows, 4), mesh)) for rows in (0, 4))
        optimizer = optim.AdamW([none, shard])
        loss = (shard * shard).sum().to_local()
        none.grad, shard.grad = torch.zeros_like(none), torch.ones_like(shard)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_needs_whole_parameters_is_refused_shards_by_name() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    with simulated_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        shard = nn.Parameter(sharded(torch.ones(4, 4), mesh))
        shard.grad = torch.ones_like(shard)
        with pytest.raises(ConfigError, match="LAMB: a parameter is a DTensor; expected whole ones"):
            optim.LAMB([shard]).step()
        with pytest.raises(ConfigError, match='AdamW: a parameter is a DTensor, and state_dtype is "8bit"'):
            optim.AdamW([shard], state_dtype="8bit").step()
        with pytest.raises(LayoutError, match=r"squared_norm got a DTensor .*Pass `tensor\.to_local\(\)`"):
            squared_norm.squared_norm(shard.data)
        with pytest.raises(LayoutError, match="sgd_step got a DTensor"):
            sgd_step.sgd_step([shard.data], [shard.data], **STEPS["sgd"].settings)


def test_a_gradient_that_is_cut_otherwise_is_cut_as_its_parameter() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    with simulated_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        param = nn.Parameter(sharded(torch.zeros(4, 2), mesh))
        rows = torch.arange(4.0)[:, None].expand(4, 2).contiguous()
        param.grad = DTensor.from_local(rows, mesh, [Replicate()], run_check=False)
        optim.SGD([param], lr=1.0).step()
        assert torch.equal(param.to_local(), -rows[2:])
