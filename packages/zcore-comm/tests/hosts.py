"""Ranks of this machine set apart as if they were on several hosts, and what a refusal said; for tests in ranks."""

import os

import torch.distributed as dist

from zcore.core.errors import ZcoreError

__all__ = ["HOSTS", "message_of", "move_to_hosts_of"]

# By what serves them: of a rank, the host that ZCORE_COMM_HOST puts it on.
HOSTS = {"shared memory": lambda rank: 0, "pairwise": lambda rank: rank, "two levels": lambda rank: rank // 2}


def move_to_hosts_of(kind):
    """Have groups that meet from now on be served by `kind`."""
    os.environ["ZCORE_COMM_HOST"] = str(HOSTS[kind](dist.get_rank()))


def message_of(act):
    """Kind and words of what `act` is refused with."""
    try:
        act()
    except ZcoreError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
