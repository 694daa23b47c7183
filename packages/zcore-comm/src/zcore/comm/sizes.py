"""What is refused before anything is sent: tensors that are not one slot for each rank, and forked children."""

import os

from torch import Tensor

from zcore.core.errors import LayoutError, StateError

__all__ = ["check_exchange", "check_process"]


def check_process(process: int, what: str) -> None:
    """Raise StateError in another process than `process`, which `what` belongs to."""
    if os.getpid() != process:
        raise StateError(
            f"{what} was used in a forked child of a rank, which is no rank itself. Use it in the process that made "
            "the group; what a worker needs it takes as an ordinary tensor."
        )


def check_exchange(label: str, output: Tensor, input: Tensor, *, size: int) -> None:
    """Raise LayoutError where `input` and `output` are not one slot for each rank, alike."""
    if output.numel() != input.numel() or input.numel() % size or output.dtype != input.dtype:
        raise LayoutError(
            f"all_to_all {label}: {input.numel()} x {input.dtype} in and {output.numel()} x {output.dtype} out; "
            f"both have to be the same multiple of the group's {size} ranks. Pad them."
        )
