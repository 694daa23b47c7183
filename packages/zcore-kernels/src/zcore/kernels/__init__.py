"""Fast numeric ops in C++, CUDA and Triton, found by name through the op registry of zcore.core.

    ops/      one op a file: its schema for torch, its reference in torch, and what serves it
    nn/       layers over these ops
    patch()   swaps layers of a Hugging Face model for those of nn/, in place
    optim/    optimizers for any training loop
    aio/      reads and writes between tensors and files, many at a time

Each is imported by itself; this package imports nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from zcore.kernels.patching import PatchReport

__all__ = ["patch"]


def patch(model: "nn.Module") -> "PatchReport":
    """Swap layers of `model` in place for compiled ones with the same parameters; see zcore.kernels.patching."""
    from zcore.kernels import patching  # brings torch, which importing this package does not

    return patching.patch(model)
