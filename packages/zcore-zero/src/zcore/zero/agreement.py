"""Do all ranks build the same thing? Asked once at the start by a digest, so a difference is an error, not a hang."""

import hashlib
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from zcore.core.collectives import Collectives
from zcore.core.errors import MismatchError

__all__ = ["Plain", "check_agreement"]

Plain = str | int | float | bool | None | list["Plain"] | dict[str, "Plain"]


def check_agreement(facts: dict[str, Plain], *, collectives: Collectives, device: torch.device) -> None:
    """Compare `facts` (plain JSON data) over the ranks of a group; every rank calls it.

    Raises MismatchError on every rank, naming the ranks that differ from rank 0 and the first fact in which they do.
    """
    if collectives.size == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8).to(device)
    digests = _gather(digest, collectives).view(collectives.size, -1)
    others = [rank for rank in range(collectives.size) if not torch.equal(digests[rank], digests[0])]
    if not others:
        return
    facts_of = _gather_texts(text, collectives, device)
    path, first, second = next(_differences(json.loads(facts_of[0]), json.loads(facts_of[others[0]]), path=""))
    raise MismatchError(
        f"Ranks {others} do not build what rank 0 builds. First difference, between rank 0 and rank {others[0]}: "
        f"{path} is {first!r} on rank 0 and {second!r} on rank {others[0]}. Every rank has to construct the same model "
        "from the same config; look for code that depends on the rank, an uneven checkout, or a config file that "
        f"differs between hosts. (This is global rank {dist.get_rank()}.)"
    )


def _gather(own: Tensor, collectives: Collectives) -> Tensor:
    output = own.new_empty(collectives.size * own.numel())
    collectives.all_gather(output, own, label="agreement at start").wait()
    return output


def _gather_texts(text: bytes, collectives: Collectives, device: torch.device) -> list[str]:
    lengths = _gather(torch.tensor([len(text)], device=device), collectives).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = _gather(padded.to(device), collectives).view(collectives.size, -1).cpu()
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]


def _differences(first: Plain, second: Plain, *, path: str) -> Iterator[tuple[str, Plain, Plain]]:
    """(dotted path, first, second) wherever two plain values differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            inner = f"{path}.{key}".removeprefix(".")
            yield from _differences(first.get(key, "(absent)"), second.get(key, "(absent)"), path=inner)
    elif first != second:
        yield path, first, second
