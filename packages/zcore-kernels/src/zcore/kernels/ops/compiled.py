"""Which compiled function serves an op of blocks: that of its name in the extension of the device.

on the CPU            _cpu, on as many threads as torch has
on a CUDA device      _cuda, on the stream that is current in torch
"""

import torch

from zcore.kernels import _cpu
from zcore.kernels.cuda.loading import extension, launching

__all__ = ["run"]


def run(function: str, device: torch.device, *operands: object, **settings: object) -> None:
    """Call `function` with addresses of checked tensors on `device`.

    Raises NotInstalledError where the wheel has no CUDA kernels, and RuntimeError where a launch is refused.
    """
    if device.type == "cpu":
        getattr(_cpu, function)(*operands, torch.get_num_threads(), **settings)
    else:
        with launching(device) as stream:
            getattr(extension(), function)(*operands, stream, **settings)
