"""Texts of any length from every rank to every rank, as bytes in a tensor: nothing is unpickled."""

import torch

from zcore.core.collectives import Collectives

__all__ = ["exchange_texts"]


def exchange_texts(text: bytes, group: Collectives, *, device: torch.device, label: str) -> list[bytes]:
    """The text of every rank, by rank in `group`, each padded with spaces to the longest; all ranks call this."""
    lengths = torch.empty(group.size, dtype=torch.int64, device=device)
    group.all_gather(lengths, torch.tensor([len(text)], device=device), label=label).wait()
    longest = int(lengths.max())
    own = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    everyones = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
    group.all_gather(everyones, own, label=label).wait()
    received = bytearray(group.size * longest)
    torch.frombuffer(received, dtype=torch.uint8).copy_(everyones)
    return [bytes(received[low : low + longest]) for low in range(0, len(received), longest)]
