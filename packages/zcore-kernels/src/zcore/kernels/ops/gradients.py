"""What references of steps make of a gradient before they use it."""

import torch
from torch import Tensor

__all__ = ["scaled"]


def scaled(grad: Tensor, dtype: torch.dtype, grad_factor: float, clip_factor: Tensor | None) -> Tensor:
    """`grad` in `dtype` times `grad_factor`, and times `clip_factor`, one number on its device, where there is one."""
    wide = grad.to(dtype) * grad_factor
    return wide if clip_factor is None else wide * clip_factor.to(dtype).view(())
