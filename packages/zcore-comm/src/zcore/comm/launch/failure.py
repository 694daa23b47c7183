"""Which rank failed first, and how that is told: one block, its traceback last, without zcore's own frames. Pure.

--- rank 1 on worker-2 failed first: exit code 1 ---------------
Traceback (most recent call last):
  File "train.py", line 7, in <module>
    all_reduce(grads)
  ... 7 frames of zcore
CollectiveError: ...
Rank 0 had ended by then, with exit code 0.
----------------------------------------------------------------
"""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Failure", "choose_first", "collapse_frames", "describe_exit", "draw", "find_traceback"]

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):")
_TORCH_PREFIX = re.compile(r"\[rank\d+\]: ?")  # torch's, on each line of a traceback once a process group stands
_CHAIN = re.compile(
    r"During handling of the above exception|The above exception was the direct cause of the following exception"
)
# How a rank notices that another one has left: words of gloo, the store, NCCL, and zcore's error for them.
_CONSEQUENCE = re.compile(
    r"(closed|reset) by peer|Broken pipe|Connection (refused|was likely closed)|remote process exited|CollectiveError"
)
# A frame in a traceback: the line that names its file, and what follows of its source.
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line \d+')
_OF_FRAME = re.compile(r" {4}|  \[Previous line repeated ")
_OWN_FILE = re.compile(r"/zcore/(core|zero|comm|pipe|offload|infer|kernels)/")
_TAIL_LINES = 20  # of one that left no traceback
_SHOWN_RANKS = 8
_WIDTH = 80


@dataclass(frozen=True, slots=True)
class Failure:
    """One rank that failed, or a launcher, if `rank` is None."""

    rank: int | None
    host: str
    exitcode: int  # minus the number of the signal that killed it
    stderr: tuple[str, ...]  # its last lines
    seen_s: float  # when its traceback began to arrive, or else the news of its end

    @property
    def was_ended(self) -> bool:
        """Whether SIGTERM ended it: told to by a launcher, or by whoever else; those ended here are not told of."""
        return self.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)

    @property
    def last_words(self) -> list[str]:
        """Its traceback; of one that a signal killed, which did not raise, the last lines."""
        return find_traceback(self.stderr) if self.exitcode > 0 else list(self.stderr[-_TAIL_LINES:])

    @property
    def is_consequence(self) -> bool:
        """Whether all it tells is that another one is gone."""
        return any(_CONSEQUENCE.search(line) for line in self.last_words[-3:])


def choose_first(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from: first by time, among those that are no consequence."""
    return min(failures, key=lambda each: (each.rank is None, each.is_consequence, each.was_ended, each.seen_s))


def find_traceback(lines: Sequence[str]) -> list[str]:
    """The last traceback with those it came from, up to the end; the last lines where there is none."""
    plain = [_TORCH_PREFIX.sub("", line, count=1) for line in lines]
    starts = [index for index, line in enumerate(plain) if _TRACEBACK.search(line)]
    if not starts:
        return plain[-_TAIL_LINES:]
    for start in starts:  # a progress bar may stand before it
        plain[start] = plain[start][plain[start].index("Traceback") :]
    start = starts.pop()
    while starts and any(_CHAIN.match(line) for line in plain[max(0, start - 2) : start]):
        start = starts.pop()
    return plain[start:]


def collapse_frames(lines: Sequence[str]) -> list[str]:
    """A traceback with a line in place of each run of zcore's own frames; the rank's own output has all of them.

    >>> collapse_frames(['  File "t.py", line 3, in f', '  File "/x/zcore/comm/a.py", line 5, in g', "    h()"])
    ['  File "t.py", line 3, in f', '  ... 1 frame of zcore']
    """
    shown: list[str] = []
    num_own = 0
    is_own = False
    for line in [*lines, ""]:
        frame = _FRAME.match(line)
        is_own = bool(_OWN_FILE.search(frame["file"])) if frame else is_own and bool(_OF_FRAME.match(line))
        num_own += is_own and frame is not None
        if not is_own:
            shown += [f"  ... {num_own} frame{'s' * (num_own > 1)} of zcore"] * bool(num_own)
            shown.append(line)
            num_own = 0
    return shown[:-1]


def describe_exit(exitcode: int) -> str:
    """What an exit code says.

    >>> describe_exit(3), describe_exit(-11)
    ('exit code 3', 'killed by SIGSEGV')
    """
    if exitcode >= 0:
        return f"exit code {exitcode}"
    return f"killed by {signal.Signals(-exitcode).name if -exitcode in list(signal.Signals) else f'signal {-exitcode}'}"


def draw(failure: Failure, *, ended_before: Sequence[int] = ()) -> str:
    """The failure for people. ended_before: the ranks that had left with exit code 0, which others may have missed."""
    where = f" on {failure.host}" if failure.host else ""
    who = f"launcher{where} failed" if failure.rank is None else f"rank {failure.rank}{where} failed first"
    head = f"--- {who}: {describe_exit(failure.exitcode)} "
    body = collapse_frames(failure.last_words) or ["It wrote nothing to stderr."]
    if failure.exitcode == -signal.SIGKILL:
        body.append("The kernel kills so when memory runs out; dmesg then tells of it.")
    if ended_before:
        ranks = ", ".join(map(str, ended_before[:_SHOWN_RANKS]))
        more = f" and {len(ended_before) - _SHOWN_RANKS} more" if len(ended_before) > _SHOWN_RANKS else ""
        body.append(f"Rank{'s' * (len(ended_before) > 1)} {ranks}{more} had ended by then, with exit code 0.")
    return "\n".join([head.ljust(_WIDTH, "-"), *body, "-" * _WIDTH])
