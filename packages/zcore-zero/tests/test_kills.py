"""A rank that is killed in any phase of a step ends the other with one readable CollectiveError, whatever moves data.

`test_faults` kills between what the engine does; here a rank goes inside of it: when a collective was asked for, when
one is under way, and while it saves. Over the core's collectives, and over zcore-comm's where it is installed.
"""

import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_models import TinyModel, is_paragraph, settings, train_step, train_steps

from zcore import zero
from zcore.core import extensions
from zcore.core.collectives import Collectives
from zcore.core.testing import RankFailed
from zcore.zero import checkpoints

Ranks = Callable[..., Any]
VICTIM = 1


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(group: Collectives, op: str, *, label: str = "", is_under_way: bool) -> None:
    """This rank dies where it starts the next `op` of `group`: before, or when the others may have its part."""
    start = getattr(type(group), op)

    @wraps(start)
    def start_and_die(self: Collectives, *args: Any, **kwargs: Any) -> Any:
        if self is not group or label not in kwargs["label"]:
            return start(self, *args, **kwargs)
        if is_under_way:
            start(self, *args, **kwargs)
        return die()

    setattr(type(group), op, start_and_die)


def die_in_backward(engine: zero.Engine) -> None:
    engine.module.blocks[0].register_forward_hook(lambda module, args, out: out.register_hook(die) and None)


PHASES: dict[str, Callable[[zero.Engine], object]] = {
    "forward": lambda engine: engine.module.blocks[1].register_forward_pre_hook(die),
    "before a gather": lambda engine: die_in(engine.sharding.groups.gather, "all_gather", is_under_way=False),
    "in a gather": lambda engine: die_in(engine.sharding.groups.gather, "all_gather", is_under_way=True),
    "backward": die_in_backward,
    "before a reduction": lambda engine: die_in(engine.sharding.groups.reduce, "reduce_scatter", is_under_way=False),
    "in a reduction": lambda engine: die_in(engine.sharding.groups.reduce, "reduce_scatter", is_under_way=True),
    "before the norm": lambda engine: die_in(
        engine.sharding.groups.reduce, "all_reduce", label="norm", is_under_way=False
    ),
    "in the norm": lambda engine: die_in(engine.sharding.groups.reduce, "all_reduce", label="norm", is_under_way=True),
    "optimizer step": lambda engine: engine.optimizer.register_step_pre_hook(die),
    "save": lambda engine: setattr(checkpoints, "save_file", die),
}


def train_until_killed(phase: str, *, stage: int, has_wheels: bool, folder: str) -> None:
    if not has_wheels:
        extensions.offered = lambda group: ()  # as where the core is alone
    engine = zero.initialize(TinyModel(), settings(stage, gradient_clipping=0.1))
    assert type(engine.sharding.groups.reduce).__module__.startswith("zcore.comm" if has_wheels else "zcore.core")
    train_steps(engine, range(2))
    if dist.get_rank() == VICTIM:
        PHASES[phase](engine)
    train_step(engine, 2)
    engine.save_checkpoint(folder)
    train_steps(engine, range(3, 5))


@pytest.mark.parametrize("has_wheels", [False, True], ids=["core", "zcore-comm"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_the_survivor_says_what_was_killed(
    ranks: Ranks, tmp_path: Path, phase: str, stage: int, has_wheels: bool
) -> None:
    if has_wheels and not extensions.installed("zcore-comm"):
        pytest.skip("zcore-comm is not installed")
    with pytest.raises(RankFailed) as caught:
        ranks(2, train_until_killed, phase, stage=stage, has_wheels=has_wheels, folder=str(tmp_path))
    survivor, victim = caught.value.failures
    assert (victim.type_name, victim.message) == ("Died", "killed by SIGKILL")
    assert survivor.type_name == "CollectiveError", survivor
    assert "restart all ranks from the last checkpoint" in survivor.message
    assert is_paragraph(survivor.message)
