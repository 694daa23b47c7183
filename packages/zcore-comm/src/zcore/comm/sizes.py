"""What is refused before anything is sent: tensors that are not one slot for each rank."""

from torch import Tensor

from zcore.core.errors import LayoutError

__all__ = ["check_exchange", "check_slots"]


def check_slots(op: str, label: str, *, whole: Tensor, slot: Tensor, size: int) -> None:
    """Raise LayoutError where `whole` is not one slot for each rank."""
    if whole.numel() != size * slot.numel():
        raise LayoutError(
            f"{op} {label}: a whole of {whole.numel()} elements and a part of {slot.numel()} over {size} "
            "ranks; the whole has to be as many equal parts as there are ranks. Pad it."
        )


def check_exchange(label: str, output: Tensor, input: Tensor, *, size: int) -> None:
    """Raise LayoutError where `input` and `output` are not one slot for each rank, alike."""
    if output.numel() != input.numel() or input.numel() % size or output.dtype != input.dtype:
        raise LayoutError(
            f"all_to_all {label}: {input.numel()} x {input.dtype} in and {output.numel()} x {output.dtype} out; "
            f"both have to be the same multiple of the group's {size} ranks. Pad them."
        )
