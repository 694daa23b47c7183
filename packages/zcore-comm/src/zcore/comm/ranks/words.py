"""What a user reads of calls that do not complete, whoever has found out: one form for all groups."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from zcore.comm.ranks.cards import GaveUp
from zcore.core.collectives import contents_of
from zcore.core.errors import CollectiveError, MismatchError

__all__ = [
    "AFTER_FAILURE",
    "ALIKE",
    "Missing",
    "about_missing",
    "differed_before",
    "differs",
    "failed",
    "has_left",
    "has_passed",
]

ALIKE = (
    "Every rank makes the same calls, of the same sizes and labels, in the same order: look for a branch that ranks "
    "take differently, data of different shapes, or a label with the rank in it."
)
TIMEOUT = "the timeout of"
LEFT = "has raised, was killed, or left"
AFTER_FAILURE = "mend it, and restart all ranks from the last checkpoint."
MOST_SHOWN = 8  # of ranks that did the same, by process; of the others the numbers are enough


class Missing(NamedTuple):
    """A rank that keeps another waiting."""

    global_rank: int
    state: str  # of its process
    did: str  # what it did last


def failed(what: str, reason: str, missing: str, *, label: str) -> CollectiveError:
    """`what` ended for `reason`; `missing` is what `about_missing` says, `label` names its data."""
    advice = f"Look for the first error in the output of the ranks named, {AFTER_FAILURE}"
    if LEFT in reason:
        advice += " One that has none made fewer calls."
    if reason.startswith(TIMEOUT):  # whoever is alive may have none
        advice += " One that lives hangs, or is slow, where it was seen last; `kill -CONT` wakes a stopped process."
    return CollectiveError(f"{what} did not complete: {reason}. {missing}{contents_of(label)} {advice}")


def about_missing(missing: Sequence[Missing], arrived: Sequence[int]) -> str:
    """Who keeps this rank waiting and what they did last, said once for all that did the same, and who does not."""
    alike: dict[str, list[Missing]] = {}
    for each in missing:
        alike.setdefault(each.did, []).append(each)
    phrases = [_about_alike(did, ranks) for did, ranks in alike.items()]
    here = f"{_numbers(arrived)}, this one" if arrived else "this one"
    return f"Missing: {'; '.join(phrases) or 'none'}. Arrived: {here}."


def _about_alike(did: str, ranks: Sequence[Missing]) -> str:
    shown = [f"rank {each.global_rank} ({each.state})" for each in ranks[:MOST_SHOWN]]
    if len(ranks) > MOST_SHOWN:
        shown.append(f"ranks {_numbers(each.global_rank for each in ranks[MOST_SHOWN:])}")
    first, *others = shown
    return f"{first}, {did}{', and so did ' if others else ''}{', '.join(others)}"


def _numbers(ranks: Iterable[int]) -> str:
    """Such as "0, 1, 4 to 60, 62"."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def differs(index: int, *, mine: str, here: str, theirs: str, there: str) -> MismatchError:
    """Call `index` of a group is another one on two ranks; `here` and `there` say which, and where in the program."""
    return MismatchError(f"Call {index} of this group is {mine} on {here}, and {theirs} on {there}. {ALIKE}")


def differed_before(call: str, *, here: str, there: str) -> MismatchError:
    """An earlier call than any that is remembered was another one on two ranks."""
    return MismatchError(f"Before {call}, the calls of {here} and of {there} were not the same. {ALIKE}")


def has_left(global_rank: int, *, said: GaveUp | None = None) -> str:
    """The reason where a process is gone; `said`: by what it had left another group, or an earlier call."""
    words = f"rank {global_rank} {LEFT}"
    if said is None:
        return words
    first = said.words.partition(". ")[0]  # the rest is in its output
    return f"{words} (before, or in another group, it had given up: {said.kind}: {first})"


def has_passed(deadline_s: float) -> str:
    """The reason where a rank never came."""
    return f"{TIMEOUT} {deadline_s:.3g} s has passed"
