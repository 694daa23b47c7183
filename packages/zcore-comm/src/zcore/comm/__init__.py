"""Collectives at the speed of memory, which say who is missing, and can be recorded.

What stands here is for plain torch, without any other zcore wheel; torch is imported with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zcore.comm.calls.blocks import coalescing
    from zcore.comm.calls.ddp import ddp_hook
    from zcore.comm.calls.flat import all_gather, all_reduce, all_to_all, barrier, broadcast, empty, reduce_scatter
    from zcore.comm.calls.flow import limit_in_flight
    from zcore.comm.calls.served import collectives_of
    from zcore.comm.recording.chrome_trace import join_traces
    from zcore.comm.recording.recorder import record

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
    "join_traces",
    "limit_in_flight",
    "record",
    "reduce_scatter",
]

_MODULES = {
    "coalescing": "zcore.comm.calls.blocks",
    "collectives_of": "zcore.comm.calls.served",
    "ddp_hook": "zcore.comm.calls.ddp",
    "join_traces": "zcore.comm.recording.chrome_trace",
    "limit_in_flight": "zcore.comm.calls.flow",
    "record": "zcore.comm.recording.recorder",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    return getattr(import_module(_MODULES.get(name, "zcore.comm.calls.flat")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
