"""The contract of what records collectives, so that a wheel may ask for it without knowing which other one brings it.

    start_recording(...) --> Recording --report(group)--> Report, on every rank
                                       --save_trace(folder)--> a file of each rank

Nothing records by default: groups are only counted (`Collectives.traffic`). A wheel offers a `Recorder` under the name
`comms` in the entry point group `zcore.recorders`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from zcore.core import extensions
from zcore.core.collectives import Collectives

__all__ = ["OPS", "Recorder", "Recording", "Report", "start_recording"]

OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "recv")


class Report(Protocol):
    """What all ranks have recorded, the same on each. `str()` and Rich show it to people."""

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types. Bytes and seconds."""
        ...


class Recording(Protocol):
    """Every collective of this process from a start to a stop."""

    def report(self, group: dist.ProcessGroup | Collectives | None = None, *, device: torch.device = ...) -> Report:
        """Put together what the ranks of `group` have recorded; every one calls it. Without a group this rank's alone.

        device: of tensors that `Collectives` move; of a process group it is known.
        """
        ...

    def save_trace(self, folder: str | Path) -> Path:
        """Write this rank's last calls to a file in `folder` that trace viewers open, and return its path."""
        ...

    def clear(self) -> None:
        """Forget what was recorded so far, as after the first steps."""
        ...

    def stop(self) -> None:
        """Record no further call. What was recorded stays; stopping twice is allowed."""
        ...


class Recorder(Protocol):
    """Starts recording."""

    def __call__(
        self, *, ops: Collection[str] | None = None, verbose: bool = False, names_callers: bool = False
    ) -> Recording:
        """Record calls of `ops`, some of `OPS`; None: all. See `start_recording`."""
        ...


def start_recording(
    *, ops: Collection[str] | None = None, verbose: bool = False, names_callers: bool = False
) -> Recording:
    """Record, from now on, every collective of this process that is one of `ops` (None: all).

    verbose: log each call at INFO on global rank 0. names_callers: add to each label which function called.

    Raises NotInstalledError without a wheel that records.
    """
    start = cast("Recorder", extensions.load("zcore.recorders", "comms"))
    return start(ops=ops, verbose=verbose, names_callers=names_callers)
