"""Every error zcore raises on purpose. Each is a `ZcoreError` and the built-in it refines.

    ZcoreError
    |- ConfigError (ValueError)         a setting is unknown, contradictory or out of range
    |- LayoutError (ValueError)         parameters, buckets or ranks cannot be laid out as asked
    |- MeshError (ValueError)           the ranks do not form the mesh that was asked for
    |- NotInstalledError (ImportError)  a wheel or an extra is needed that is not there
    |- StateError (RuntimeError)        a call out of order, such as a step without a backward
    |- NonFiniteError (ArithmeticError) a loss or a gradient is NaN or infinite
    |- MismatchError (RuntimeError)     ranks disagree about model, config or the order of collectives
    |- CollectiveError (RuntimeError)   a collective failed or outlived its deadline: some rank died, hangs, or left
    |- FileError (OSError)              a file cannot be opened, read or written; `errno` says why where the system told
    `- CheckpointError (OSError)        a checkpoint is missing, incomplete, damaged, or of another run

A message says what happened, what was expected, and what to do, in one paragraph.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "FileError",
    "LayoutError",
    "MeshError",
    "MismatchError",
    "NonFiniteError",
    "NotInstalledError",
    "StateError",
    "ZcoreError",
    "nearest",
]


class ZcoreError(Exception):
    """The root: `except ZcoreError` catches what zcore refuses, and nothing else."""


class ConfigError(ZcoreError, ValueError):
    """A setting is unknown, contradictory or out of range; the message names the key and the nearest right one."""


class LayoutError(ZcoreError, ValueError):
    """Parameters, buckets or ranks cannot be laid out as asked."""


class MeshError(ZcoreError, ValueError):
    """The ranks at hand do not form the mesh that was asked for."""


class NotInstalledError(ZcoreError, ImportError):
    """Something was asked for that another wheel or an extra brings; the message holds the pip command."""


class StateError(ZcoreError, RuntimeError):
    """A call came out of order, such as a step without a backward or a sharded parameter used outside forward."""


class NonFiniteError(ZcoreError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; parameters and optimizer states are as before the step."""


class MismatchError(ZcoreError, RuntimeError):
    """Ranks disagree about the model, the config or the order of collectives; raised on every rank."""


class CollectiveError(ZcoreError, RuntimeError):
    """A collective failed or outlived its deadline, because a rank died, hangs, or left the group."""


class FileError(ZcoreError, OSError):
    """A file cannot be opened, read or written as asked; `errno` says why where the system told."""


class CheckpointError(ZcoreError, OSError):
    """A checkpoint is missing, incomplete, damaged, or was written by another kind of run."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice a misspelled `word` was most likely meant to be, whatever its case; None if none is near.

    >>> nearest("adamw", ["Adam", "AdamW", "SGD"])
    'AdamW'
    """
    by_lower = {choice.lower(): choice for choice in choices}
    found = get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None
