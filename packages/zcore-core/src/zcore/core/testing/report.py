"""What became of each rank, and the one readable failure made of it. Pure: records in, text out.

    rank 1 of 3 failed first: ValueError: shard 3 is empty (0.21 s after the start)
      <its traceback>
    rank 0: RuntimeError: Connection closed by peer ...       a consequence: one line
    rank 2: returned
    output of rank 1: ...                                     the last lines of stdout and stderr

First is by time, but a broken connection never counts as first where there is another failure: the rank that breaks it
by dying is noticed a little later than the ranks that lose it.
"""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import indent

from zcore.core.errors import ZcoreError

__all__ = ["RankFailed", "RankFailure", "describe_exit"]

# What a rank says when another one has left: gloo's, the store's and NCCL's words, and zcore's own error for them.
_CONSEQUENCE = re.compile(
    r"(closed|reset) by peer|Broken pipe|Connection (refused|was likely closed)|remote process exited|CollectiveError"
)
_OUTPUT_TAIL_LINES = 30
_LINE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class RankFailure:
    """One rank that raised, died or did not finish."""

    rank: int
    type_name: str  # the exception's class; "Died" for a rank that left without a word, "Hung" for one that was killed
    message: str
    traceback: str  # of the exception; for a hung rank the stacks of all its threads; "" for one that died
    exitcode: int | None  # of a rank that died: its exit code, or minus the signal's number; None otherwise
    after_s: float  # seconds between the start of the ranks and this failure
    last_collective: str | None = None
    output: str = field(default="", repr=False)  # stdout and stderr, as they came

    @property
    def headline(self) -> str:
        """Type and message in one line."""
        line = " ".join(f"{self.type_name}: {self.message}".split())
        return line if len(line) <= _LINE_LENGTH else line[: _LINE_LENGTH - 4] + " ..."

    @property
    def is_consequence(self) -> bool:
        """Whether this is only how the rank noticed that another one is gone."""
        return _CONSEQUENCE.search(f"{self.type_name}: {self.message}") is not None


class RankFailed(ZcoreError, RuntimeError):
    """A rank raised, died or hung. `failures` are the records by rank, `results` what the other ranks returned."""

    failures: tuple[RankFailure, ...]
    results: Mapping[int, object]

    def __init__(
        self,
        failures: Sequence[RankFailure],
        results: Mapping[int, object],
        *,
        last_collectives: Mapping[int, str | None],  # of the ranks that returned
    ) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: failure.rank))
        self.results = results
        super().__init__(_describe(self.failures, last_collectives))

    @property
    def first(self) -> RankFailure:
        """The failure that the others follow from."""
        return _first(self.failures)


def _first(failures: Sequence[RankFailure]) -> RankFailure:
    return min(failures, key=lambda failure: (failure.type_name == "Hung", failure.is_consequence, failure.after_s))


def _describe(failures: Sequence[RankFailure], returned: Mapping[int, str | None]) -> str:
    first = _first(failures)
    world_size = len(failures) + len(returned)
    others = {failure.rank: failure for failure in failures if failure is not first}
    verb = "did not finish" if first.type_name == "Hung" else "failed first"
    lines = [f"rank {first.rank} of {world_size} {verb}: {_full(first)}"]
    for rank in sorted({*others, *returned}):
        if rank in returned:
            lines.append(f"rank {rank}: returned" + (f" after {returned[rank]}" if returned[rank] else ""))
        elif others[rank].type_name == "Hung":  # where it stands is the only thing it can tell
            lines.append(f"rank {rank}: {_full(others[rank])}")
        elif others[rank].headline == first.headline:
            lines.append(f"rank {rank}: the same")
        else:
            lines.append(f"rank {rank}: {others[rank].headline}")
    for failure in failures:
        if not failure.is_consequence and (tail := failure.output.splitlines()[-_OUTPUT_TAIL_LINES:]):
            lines += [f"output of rank {failure.rank}, last {len(tail)} lines:", *(f"  | {line}" for line in tail)]
    return "\n".join(lines)


def _full(failure: RankFailure) -> str:
    collective = f"\n  last collective: {failure.last_collective}" if failure.last_collective else ""
    stacks = "\n" + indent(failure.traceback.rstrip(), "  ") if failure.traceback else ""
    return f"{failure.headline} ({failure.after_s:.2f} s after the start){collective}{stacks}"


def describe_exit(exitcode: int) -> str:
    """What an exit code says: `killed by SIGKILL` or `exit code 3`."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"
