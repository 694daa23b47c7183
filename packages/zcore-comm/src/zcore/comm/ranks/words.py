"""What a user reads of calls that do not complete, whoever has found out: one form for all groups."""

from collections.abc import Sequence

from zcore.core.collectives import contents_of
from zcore.core.errors import CollectiveError, MismatchError

__all__ = ["AFTER_FAILURE", "ALIKE", "about_missing", "differed_before", "differs", "failed", "has_left", "has_passed"]

ALIKE = (
    "Every rank makes the same calls, of the same sizes and labels, in the same order: look for a branch that ranks "
    "take differently, data of different shapes, or a label with the rank in it."
)
TIMEOUT = "the timeout of"
LEFT = "has raised, was killed, or left"
AFTER_FAILURE = "mend it, and restart all ranks from the last checkpoint."


def failed(what: str, reason: str, missing: str, *, label: str) -> CollectiveError:
    """`what` ended for `reason`; `missing` is what `about_missing` says, `label` names its data."""
    advice = f"Look for the first error in the output of the ranks named, {AFTER_FAILURE}"
    if LEFT in reason:
        advice += " One that has none made fewer calls."
    if reason.startswith(TIMEOUT):  # whoever is alive may have none
        advice += " One that lives hangs, or is slow, where it was seen last; `kill -CONT` wakes a stopped process."
    return CollectiveError(f"{what} did not complete: {reason}. {missing}{contents_of(label)} {advice}")


def about_missing(missing: Sequence[str], arrived: Sequence[int]) -> str:
    """Who keeps this rank waiting, a phrase for each, and the global ranks that do not."""
    return f"Missing: {'; '.join(missing) or 'none'}. Arrived: {', '.join([*map(str, arrived), 'this one'])}."


def differs(index: int, *, mine: str, here: str, theirs: str, there: str) -> MismatchError:
    """Call `index` of a group is another one on two ranks; `here` and `there` say which, and where in the program."""
    return MismatchError(f"Call {index} of this group is {mine} on {here}, and {theirs} on {there}. {ALIKE}")


def differed_before(call: str, *, here: str, there: str) -> MismatchError:
    """An earlier call than any that is remembered was another one on two ranks."""
    return MismatchError(f"Before {call}, the calls of {here} and of {there} were not the same. {ALIKE}")


def has_left(global_rank: int, *, said: tuple[str, str] | None = None) -> str:
    """The reason where a process is gone; `said`: kind and words of an error by which it had left another group."""
    words = f"rank {global_rank} {LEFT}"
    if said is None:
        return words
    kind, error = said
    first = error.partition(". ")[0]  # the rest is in its output
    return f"{words} (before, or in another group, it had given up: {kind}: {first})"


def has_passed(deadline_s: float) -> str:
    """The reason where a rank never came."""
    return f"{TIMEOUT} {deadline_s:.3g} s has passed"
