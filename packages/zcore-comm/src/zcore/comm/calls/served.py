"""Which `Collectives` serve a process group of torch, for the functions of `zcore.comm`: found once, then remembered.

    ProcessGroup --> choice.offer, or the core's over torch --> under the limit on bytes in flight (flow.py)

A group that was destroyed is let go at the next use of any other: torch gives no sign when it goes, and what serves it
holds it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from zcore.comm.calls.flow import FLOW
from zcore.comm.calls.requests import DeferrableCollectives
from zcore.comm.choice import offer
from zcore.comm.memory.pages import own_pages
from zcore.core import compat
from zcore.core.collectives import Collectives
from zcore.core.errors import ConfigError, StateError
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["Served", "collectives_of", "current_device", "served_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A process group, what serves it, and which tensors it moves."""

    group: dist.ProcessGroup
    collectives: DeferrableCollectives
    name: str
    device_types: tuple[str, ...]
    shares_memory: bool  # its buffers lie where the other ranks of the host read them

    @property
    def device(self) -> torch.device:
        """Where its buffers are born: torch's default device if the group moves that, else the first that it does."""
        default = torch.get_default_device()
        return current_device(default.type if default.type in self.device_types else self.device_types[0])


def current_device(device_type: str) -> torch.device:
    """The device of that type on which the caller's next tensor would be born."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


_served: dict[dist.ProcessGroup, Served] = {}


def served_of(group: dist.ProcessGroup | None) -> Served:
    """What serves `group`, None being the default group; every rank of it comes here for the first time together.

    Raises StateError without a process group, for one that was destroyed, and on a rank that is not part of it.
    """
    if group is None:
        group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        raise StateError(
            "A collective needs a process group, and there is none yet. Call torch.distributed.init_process_group "
            '("gloo" on CPUs, "nccl" on GPUs) first.'
        )
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError(f"The group is a {type(group).__name__}; expected a process group of torch, or None.")
    if not isinstance(group, dist.ProcessGroup):  # what new_group gives to a rank that it leaves out
        raise StateError(
            f"Rank {dist.get_rank()} is not part of this group. Only the ranks given to new_group make its calls: ask "
            "`torch.distributed.get_rank(group) >= 0` before."
        )
    for other in [other for other in tuple(_served) if not _is_alive(other)]:
        _served.pop(other, None)
    if group not in _served:
        _served[group] = _find(group)
    return _served[group]


def collectives_of(group: dist.ProcessGroup | None = None) -> DeferrableCollectives:
    """The `Collectives` (of `zcore.core.collectives`) that serve `group`; None is the default group.

    The first use of a group in `zcore.comm` finds out how its ranks reach each other, by calls of its own: every rank
    of the group comes to it, and ranks that share several groups come to them in the same order.

    Raises StateError without a process group, for one that was destroyed, and on a rank that is not part of it.
    """
    return served_of(group).collectives


def _is_alive(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_backend(group)
    except (ValueError, RuntimeError):
        return False
    return True


def _find(group: dist.ProcessGroup) -> Served:
    if not _is_alive(group):
        raise StateError("This process group was destroyed. Make a new one with torch.distributed.new_group.")
    name = f"group {group.group_name}" if group.group_desc == "undefined" else group.group_desc
    found = offer(group, name=name)
    collectives = found or FLOW.around(TorchCollectives(group, name=name))
    shares_memory = found is not None and compat.backend_name(group) == "gloo" and _is_born_in_pages(collectives)
    return Served(group, collectives, name, _device_types(group), shares_memory)


def _is_born_in_pages(group: Collectives) -> bool:
    buffer = group.empty(1, dtype=torch.uint8, device=torch.device("cpu"))
    try:
        return own_pages().find(buffer) is not None
    except (OSError, AttributeError):  # the system gives no such memory, or knows none
        return False


def _device_types(group: dist.ProcessGroup) -> tuple[str, ...]:
    """What the backend moves that serves here; of gloo CPU tensors, whatever else it could."""
    name = compat.backend_name(group)
    if name == "gloo":
        return ("cpu",)
    return tuple(device_type for device_type, backend in compat.backends_of(group).items() if backend == name)
