"""Tests over several ranks: real processes with gloo for a few, torch's fake process group for a thousand."""

from zcore.core.testing.ranks import run_ranks
from zcore.core.testing.report import RankFailed, RankFailure
from zcore.core.testing.simulated import simulated_world

__all__ = ["RankFailed", "RankFailure", "run_ranks", "simulated_world"]
