"""Do all ranks build the same thing? Asked at the start by a digest, so that a difference is an error, not a hang."""

import hashlib
import json
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from zcore.core.errors import MismatchError
from zcore.zero.buffer import DataParallelGroups

__all__ = ["Plain", "check_agreement", "differences"]

Plain: TypeAlias = str | int | float | bool | list["Plain"] | dict[str, "Plain"] | None

LABEL = "agreement at start"


def check_agreement(
    facts: dict[str, Plain], *, rank: int, num_ranks: int, groups: DataParallelGroups, device: torch.device
) -> None:
    """Compare `facts` (plain JSON data) over all data ranks, of which this is `rank`; every one calls it.

    Raises MismatchError on every rank, naming the ranks that differ from rank 0 and the first fact in which they do.
    """
    text = json.dumps(facts).encode()
    own = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8).to(device)
    first = own.clone()
    groups.broadcast(first, src=0, label=LABEL)
    differs = torch.zeros(num_ranks, dtype=torch.int32, device=device)
    differs[rank] = not torch.equal(own, first)
    groups.all_reduce(differs, label=LABEL)
    others = differs.nonzero().view(-1).tolist()
    if not others:
        return
    facts_0, facts_1 = (json.loads(_send(text, src, groups, device)) for src in (0, others[0]))
    path, here, there = next(differences(facts_0, facts_1, path=""))
    raise MismatchError(
        f"Ranks {others} do not build what rank 0 builds. The first difference: {path} is {here!r} on rank 0 and "
        f"{there!r} on rank {others[0]}. Every rank has to construct the same model from the same config; look for "
        "code that depends on the rank, an uneven checkout, or a config file that differs between hosts. (Said by "
        f"{rank=}.)"
    )


def _send(text: bytes, src: int, groups: DataParallelGroups, device: torch.device) -> str:
    """The text of data rank `src`, on every rank."""
    length = torch.tensor([len(text)], device=device)
    groups.broadcast(length, src=src, label=LABEL)
    sent: Tensor = torch.zeros(int(length), dtype=torch.uint8)
    fits = text[: len(sent)]  # another rank's text may be shorter or longer than what is to come
    sent[: len(fits)] = torch.frombuffer(bytearray(fits), dtype=torch.uint8)
    sent = sent.to(device)
    groups.broadcast(sent, src=src, label=LABEL)
    return bytes(sent.tolist()).decode()


def differences(first: Plain, second: Plain, *, path: str) -> Iterator[tuple[str, Plain, Plain]]:
    """(dotted path, first, second) wherever two plain values differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            inner = f"{path}.{key}".removeprefix(".")
            yield from differences(first.get(key, "(absent)"), second.get(key, "(absent)"), path=inner)
    elif first != second:
        yield path, first, second
