"""Frozen weights that are quantised: which are sharded as they are, and which are refused by name.

bitsandbytes, 4 bits     a plain tensor of packed numbers, sharded like any frozen one. Never cast: a float in which
                         numbers are packed is no number. The statistics of its blocks stay with the layer, whole,
                         and have to be the same on every rank.
bitsandbytes, 8 bits     refused: in a forward its layers give their weight other memory
floats of 8 bits         sharded as they are; their scales are other parameters, or stay with the layer
torchao, and others      refused: a weight of several tensors under one name. Taken apart first, each is sharded.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zcore.core.errors import LayoutError
from zcore.zero.precision import Precision

__all__ = ["refuse_quantised", "states_beside", "statistics_of"]


def refuse_quantised(param: nn.Parameter, fqn: str, precision: Precision) -> None:
    """Raise LayoutError for a weight that cannot be cut as one tensor of numbers, or that `precision` would cast."""
    if is_traceable_wrapper_subclass(param):
        raise LayoutError(
            f"{fqn} is a {type(param).__name__}: several tensors under one name, and shards are cut from one. Weights "
            "that torchao has quantised are taken apart by torchao.utils.unwrap_tensor_subclass(model), before the "
            "model is sharded; a DTensor is sharded by somebody else already."
        )
    if getattr(param, "has_fp16_weights", True) is False:
        raise LayoutError(
            f"{fqn} is quantised to 8 bits by bitsandbytes, whose layers give their weight other memory in a forward. "
            "Quantise the base to 4 bits (load_in_4bit), or with torchao."
        )
    if getattr(param, "bnb_quantized", True) is False:
        raise LayoutError(
            f"{fqn} is to be quantised by bitsandbytes, and is not yet: that is done when the model is moved. Call "
            'model.to("cpu"), or the device, before the model is sharded.'
        )
    state = getattr(param, "quant_state", None)
    is_packed = state is not None
    if is_packed and getattr(getattr(state, "absmax", None), "is_meta", False):
        raise LayoutError(
            f"{fqn} was quantised inside zero.Init, where nothing has values yet. Load a quantised base outside "
            "of it: in 4 bits it takes an eighth of what it would in fp32."
        )
    compute = precision.dtypes_of(param.dtype, trainable=param.requires_grad).compute
    if is_packed and compute != param.dtype:
        raise LayoutError(
            f"{fqn} holds 4-bit numbers packed into {param.dtype}, which casting it to {compute} would destroy. "
            f"Quantise with bnb_4bit_quant_storage=torch.uint8, or {compute}."
        )


def states_beside(param: nn.Parameter) -> dict[str, Tensor]:
    """What bitsandbytes adds to a state dict beside packed numbers, by the end of its name; none for other weights."""
    as_dict = getattr(getattr(param, "quant_state", None), "as_dict", None)
    return {} if as_dict is None else {key: value.detach().cpu() for key, value in as_dict(packed=True).items()}


def statistics_of(param: nn.Parameter) -> str | None:
    """What tells whether ranks have quantised the same values; None of what has no statistics beside it."""
    absmax = getattr(getattr(param, "quant_state", None), "absmax", None)
    if not isinstance(absmax, torch.Tensor):
        return None
    return f"{absmax.numel()} blocks, {int(absmax.detach().contiguous().view(torch.uint8).long().sum())}"
