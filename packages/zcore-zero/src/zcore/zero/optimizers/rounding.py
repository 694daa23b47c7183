"""Steps of bf16 parameters that have no fp32 masters: in fp32 for the time of a step, a bucket at a time, and rounded.

    bf16 bucket --exact--> fp32 --optimizer--> fp32 --stochastic rounding--> bf16 bucket

bf16 has 8 bits: rounded to the nearest, a step smaller than 1/512 of a weight is lost, every time. Rounded up as often
as it lies near, it is kept on average (arXiv 1502.02551, section 3; for bf16 weights arXiv 2010.06192).
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zcore.core import ops
from zcore.zero.bucket import Bucket
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.sharding import sharding_of

__all__ = ["noise_for", "round_stochastically", "rounded_step"]

DROPPED_BITS = 16  # of fp32's 32, so that bf16 is left


@ops.reference("round_with_noise")
def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """`values` (fp32) in bf16: what lies between two neighbours becomes either, the upper one as often as it is near.

    noise: int32 of the same shape, uniform in [0, 2^16). What bf16 can hold, infinities and NaN too, stays as it is.
    """
    bits = values.view(torch.int32) + noise  # of the magnitude; a carry into the kept bits rounds it up
    rounded = bits.bitwise_and_(-1 << DROPPED_BITS).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)  # a carry may make a number of a NaN


def noise_for(bucket: Bucket, *, step: int, column: int) -> Tensor:
    """Noise for the elements of `bucket` that this rank steps: int32 in [0, 2^16).

    It depends on step, bucket, column (what is rounded: parameters, or a state) and place in the bucket, and not on who
    draws it: copies of a parameter are rounded alike, and so is a run that continues, at any stage.
    """
    master, size = bucket.memory.master, bucket.plan.layout.slice_numel
    noise = torch.empty(master.numel(), dtype=torch.int32, device=master.device)
    generator = torch.Generator(master.device)
    for index, part in zip(bucket.owned, noise.split(max(size, 1)), strict=False):
        generator.manual_seed(zlib.crc32(repr((step, bucket.index, column, index)).encode()))
        part.random_(0, 1 << DROPPED_BITS, generator=generator)
    return noise


def rounded_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Step the fragments of a sharded model without masters in fp32, and round them to bf16; every rank calls it.

    In a loop of one's own it stands for `optimizer.step()`; an engine does it by itself. step: how many there were
    before, from which the noise is drawn: equal on every rank. No more than one bucket is in fp32 at a time. States are
    kept in fp32, or rounded like parameters where `Precision.states` says so.
    """
    buckets = sharding_of(model).buckets
    groups = [list(group["params"]) for group in optimizer.param_groups]
    of_bucket: dict[int, list[list[ShardedParameter]]] = defaultdict(lambda: [[] for _ in groups])
    for number, params in enumerate(groups):
        for param in params:
            assert isinstance(param, ShardedParameter)
            bucket = param.owner
            assert isinstance(bucket, Bucket)
            of_bucket[bucket.index][number].append(param)
    try:
        for bucket in buckets:
            if bucket.index not in of_bucket:
                continue
            stepped = of_bucket[bucket.index]
            for group, params in zip(optimizer.param_groups, stepped, strict=True):
                group["params"] = params
            if bucket.dtypes.rounds:
                with _in_fp32(bucket, [each for params in stepped for each in params], optimizer, step=step):
                    optimizer.step()
            else:
                optimizer.step()
    finally:
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = params


@contextmanager
def _in_fp32(
    bucket: Bucket, params: Sequence[ShardedParameter], optimizer: torch.optim.Optimizer, *, step: int
) -> Iterator[None]:
    """Parameters, gradients and states of `bucket` in fp32; rounded on leaving, but not after an exception."""
    master = bucket.memory.master
    wide = master.float()
    grads = [_plain_grad(param) for param in params]
    low = [_data(param) for param in params]
    try:
        for param, values, grad in zip(params, low, grads, strict=True):
            place = bucket.params[param.position].fragment
            _set(param, wide[place.offset : place.offset + values.numel()], None if grad is None else grad.float())
        for param in params:
            _widen_states(optimizer, param)
        bucket.needs_rounding = False
        yield
    finally:
        bucket.needs_rounding = True
        for param, values, grad in zip(params, low, grads, strict=True):
            _set(param, values, grad)
    with torch.no_grad():
        master.copy_(_rounded(wide, noise_for(bucket, step=step, column=0)))
        if bucket.dtypes.states is not None:
            _narrow_states(bucket, params, optimizer, step=step)


def _widen_states(optimizer: torch.optim.Optimizer, param: ShardedParameter) -> None:
    state = optimizer.state.get(param, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
            state[key] = value.float()


def _narrow_states(
    bucket: Bucket, params: Sequence[ShardedParameter], optimizer: torch.optim.Optimizer, *, step: int
) -> None:
    """Round the states that have a value for each element, in one draw of noise for each kind of state."""
    kinds: dict[str, list[ShardedParameter]] = defaultdict(list)
    for param in params:
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.dtype is torch.float32:
                kinds[key].append(param)
    for column, key in enumerate(sorted(kinds), start=1):
        noise = noise_for(bucket, step=step, column=column)
        for param in kinds[key]:
            place, state = bucket.params[param.position].fragment, optimizer.state[param]
            state[key] = _rounded(state[key], noise[place.offset : place.offset + place.numel])


def _rounded(values: Tensor, noise: Tensor) -> Tensor:
    rounded: Tensor = ops.get("round_with_noise", device=values.device, dtype=values.dtype)(values, noise)
    return rounded


def _data(param: ShardedParameter) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return param.data.as_subclass(Tensor)


def _plain_grad(param: ShardedParameter) -> Tensor | None:
    with torch._C.DisableTorchFunctionSubclass():
        return param.grad


def _set(param: ShardedParameter, data: Tensor, grad: Tensor | None) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        param.grad = None  # first: a gradient has its parameter's dtype
        param.data = data
        param.grad = grad
