"""The whole weights of a sharded model, as plain torch's `state_dict()` of the unsharded model would have them."""

import torch
from torch import Tensor, nn

from zcore.zero.quantised import states_beside
from zcore.zero.sharding import sharding_of

__all__ = ["consolidated_state_dict"]


def consolidated_state_dict(model: nn.Module, *, rank: int | None = 0) -> dict[str, Tensor]:
    """Whole parameters and persistent buffers on the CPU by name, tied names included; every rank calls it.

    The values are the master weights, in the dtype the model was built in (frozen ones as they are computed with: under
    bf16 rounded to it); tied names have memory of their own, so that safetensors can save them. Only data-parallel rank
    `rank` gets them, the others an empty dict; None gives them to every rank. One bucket is gathered at a time.
    """
    sharding = sharding_of(model)
    dp = sharding.dp
    wanted = rank is None or rank == dp.rank
    whole: dict[str, Tensor] = {}  # by the parameter's first name
    for bucket in sharding.buckets:
        flat = bucket.gather_master()
        if not wanted:
            continue
        for spec, offset in zip(bucket.plan.params, bucket.plan.layout.offsets, strict=True):
            value = flat[offset : offset + spec.numel].view(spec.shape)
            whole[spec.fqn] = value.to(device="cpu", dtype=spec.dtype, copy=True)
    return _as_state_dict(model, whole) if wanted else {}


def _as_state_dict(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    params = [param for bucket in sharding_of(model).buckets for param in bucket.params]
    first_names = {id(each): param.shard.fqn for param in params for each in (param.shard, param.full)}
    beside = {param.shard.fqn: states_beside(param.full) for param in params}
    result: dict[str, Tensor] = {}
    taken: set[str] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        for name, param in module._parameters.items():
            if param is not None:
                first = first_names[id(param)]
                result[prefix + name] = whole[first].clone() if first in taken else whole[first]
                result |= {f"{prefix}{name}.{key}": value.clone() for key, value in beside[first].items()}
                taken.add(first)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                result[prefix + name] = buffer.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
    return result
