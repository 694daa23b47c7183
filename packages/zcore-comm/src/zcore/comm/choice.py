"""Which implementation serves a group; every rank of it comes to the same answer."""

import logging
import os

import torch.distributed as dist

from zcore.comm.neighbours import meet
from zcore.comm.shared_memory import SharedMemoryCollectives
from zcore.core import compat
from zcore.core.collectives import Collectives

__all__ = ["offer"]

logger = logging.getLogger(__name__)


def offer(group: dist.ProcessGroup, *, name: str) -> Collectives | None:
    """Shared memory for CPU ranks of one host; None where that cannot be. Every rank of `group` calls this."""
    if dist.get_backend(group) != "gloo" or dist.get_world_size(group) == 1:
        return None
    if not compat.CAN_SWAP_MEMORY or not hasattr(os, "memfd_create"):
        logger.warning("Shared memory between ranks needs Linux, and torch 2.13: %s is served over gloo.", name)
        return None
    neighbours = meet(group, name=name)
    return None if neighbours is None else SharedMemoryCollectives(group, neighbours, name=name)
