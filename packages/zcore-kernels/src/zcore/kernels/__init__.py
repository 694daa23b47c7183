"""Fast numeric ops in C++, CUDA and Triton, found by name through the op registry of zcore.core.

    ops/      one op a file: its schema for torch, its reference in torch, and what serves it
    nn/       layers over these ops
    patch()   swaps layers of a Hugging Face model for those of nn/, in place
    optim/    optimizers for any training loop
    aio/      reads and writes between tensors and files, many at a time

Each is imported by itself; this package imports nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["patch"]


def patch(model: "nn.Module") -> Any:
    """Swap layers of `model` in place for compiled ones with the same parameters, and tell which.

    See `zcore.kernels.patching`, which this loads: layers need torch, and importing this package brings none.
    """
    return import_module("zcore.kernels.patching").patch(model)
