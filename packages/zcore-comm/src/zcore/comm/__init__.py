"""Collectives at the speed of memory, which say who is missing, and can be recorded.

What stands here is for plain torch, without any other zcore wheel; torch is imported with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zcore.comm.blocks import coalescing
    from zcore.comm.ddp import ddp_hook
    from zcore.comm.flat import all_gather, all_reduce, all_to_all, barrier, broadcast, empty, reduce_scatter
    from zcore.comm.flow import limit_in_flight
    from zcore.comm.recorder import record
    from zcore.comm.served import collectives_of

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "coalescing",
    "collectives_of",
    "ddp_hook",
    "empty",
    "limit_in_flight",
    "record",
    "reduce_scatter",
]

_MODULES = {
    "coalescing": "zcore.comm.blocks",
    "collectives_of": "zcore.comm.served",
    "ddp_hook": "zcore.comm.ddp",
    "limit_in_flight": "zcore.comm.flow",
    "record": "zcore.comm.recorder",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    return getattr(import_module(_MODULES.get(name, "zcore.comm.flat")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
