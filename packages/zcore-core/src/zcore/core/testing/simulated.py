"""A world of any size in one process: torch's fake process group, whose collectives return at once and move nothing.

For layouts, meshes and counts at 64 or 1,024 ranks; what arrives in a buffer is undefined, so never compare values.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from zcore.core.errors import StateError

__all__ = ["simulated_world"]


@contextmanager
def simulated_world(world_size: int, *, rank: int = 0) -> Iterator[None]:
    """Be `rank` of `world_size` ranks inside the `with` block; the default process group exists there and not after.

    Raises StateError if this process already has a default process group.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise StateError(
            f"Cannot simulate a world of {world_size} ranks: this process already has a process group of "
            f"{dist.get_world_size()}. Simulate outside of ranks, or destroy that group first."
        )
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        if dist.is_initialized():  # the block may have destroyed it itself
            dist.destroy_process_group()
