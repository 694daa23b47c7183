"""What a training loop of one's own calls: shard a model, clip its gradients, hold reductions back."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zcore.core.errors import NonFiniteError
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.sharding import Sharding, ShardingOptions, sharding_of

__all__ = ["clip_grad_norm_", "no_sync", "shard", "shard_added"]


def shard(model: nn.Module, mesh: DeviceMesh, *, stage: int = 3, options: ShardingOptions | None = None) -> nn.Module:
    """Shard `model` in place over the data-parallel axes of `mesh` and return it; every rank calls it.

    Its parameters become this rank's fragments, to be passed to any element-wise `torch.optim` class;
    training is torch's usual loop. Gradients are averaged over all data ranks at the end of each backward;
    inside `no_sync(model)` they only accumulate. Clip with `zero.clip_grad_norm_`. `stage` is a row of the
    placement table (see `placement.py`).

    Raises MismatchError where ranks differ, LayoutError for a model that is sharded already, ConfigError for the stage.
    """
    Sharding(model, mesh, zero_stage=stage, options=options or ShardingOptions())
    return model


def shard_added(model: nn.Module) -> list[ShardedParameter]:
    """Shard what was added to a sharded model since: adapters, a second head. Every rank calls it, between steps.

    Returns the fragments of the new parameters, for `optimizer.add_param_group({"params": ...})`; what the optimizer
    has of others stays. Raises StateError in the middle of a step, MismatchError where ranks have added different
    things, LayoutError for a parameter in the place of one that was sharded.
    """
    return sharding_of(model).add()


def clip_grad_norm_(model: nn.Module, max_norm: float, *, error_if_nonfinite: bool = False) -> float:
    """Scale the gradients of a sharded model to a global 2-norm of at most `max_norm`; every rank calls it.

    Returns the norm before clipping, equal on every rank. With `error_if_nonfinite` it raises NonFiniteError instead,
    on every rank, where that is infinite or not a number.
    """
    norm = sharding_of(model).clip(max_norm)
    if error_if_nonfinite and not isfinite(norm):
        raise NonFiniteError(
            f"The norm of the gradients is {norm}. Do not step: drop them with zero_grad(), and look at the data of "
            "this step, or lower the learning rate."
        )
    return norm


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside only accumulate gradients on this rank; the first one after it reduces all of them."""
    with sharding_of(model).no_sync():
        yield
