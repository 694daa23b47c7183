"""Models and trainings that hypothesis draws are plain torch adding the same parts, whatever row they are trained in.

Every rank draws the same trainings, in one start, and all agree on each outcome before the next one, so that they go on
or shrink together. Losses, parameters and buffers are compared bit by bit; the plain process clips by the norms that
the ranks found, since torch adds up squares in another order.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch.distributed as dist
from parity import Run, beyond, bits_that_differ, train_plain, train_zero
from random_models import Training, brief, trainings

Ranks = Callable[..., Any]
SHRINK_S = 60.0  # for making what failed smaller


def compare(training: Training) -> str:
    """What differs from plain torch, on every rank; every rank calls it."""
    run, problem = None, ""
    try:
        run = train_zero(training.recipe, **training.arguments)
    except Exception:  # noqa: BLE001 - whatever it is, all ranks are told
        problem = traceback.format_exc()
    of_ranks: list[tuple[Run | None, str]] = [(None, "")] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (run, problem))
    told = [next((text for _, text in of_ranks if text), "")]
    if not told[0] and dist.get_rank() == 0:
        try:
            told = [differences_from_plain(training, [run for run, _ in of_ranks if run is not None])]
        except Exception:  # noqa: BLE001 - as above
            told = [traceback.format_exc()]
    dist.broadcast_object_list(told)
    return told[0]


def differences_from_plain(training: Training, runs: list[Run]) -> str:
    recipe, found = training.recipe, Run.of_ranks(runs)
    reduces_each = training.reduces_each(len(runs))
    plain = train_plain(recipe, parts=len(runs), reduces_each=reduces_each, clip_norms=found.norms)
    different = bits_that_differ(replace(found, norms=plain.norms), plain)
    is_short = any(part.dtype == "bfloat16" for part in recipe.plan.parts)  # torch rounds the norms of its gradients
    norms = beyond(Run([], found.norms, {}), Run([], plain.norms, {}), rtol=2**-6 if is_short else 1e-6)
    return f"{different} differ, {norms}" if different or norms else ""


def draw_and_compare(num_examples: int, seed: int) -> list[str]:
    """Body of ranks: the smallest training that was found to differ, and how."""
    failures: list[str] = []
    failed_s = 0.0

    @hypothesis.settings(
        max_examples=num_examples, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.seed(seed)
    @hypothesis.given(trainings(world_size=dist.get_world_size()))
    def run(training: Training) -> None:
        nonlocal failed_s
        is_late = [bool(failures) and time.monotonic() - failed_s > SHRINK_S]
        dist.broadcast_object_list(is_late)
        if is_late[0]:
            return  # hypothesis then has nothing left to shrink
        print(brief(training))  # noqa: T201 - of ranks that wait in vain, the last one is to blame
        if problem := compare(training):
            failed_s = failed_s or time.monotonic()
            failures.append(f"{brief(training)}\n{problem}")
            raise AssertionError

    try:
        run()
    except Exception:
        if not failures:
            raise
    return failures[-1:]


@pytest.mark.parametrize(("world_size", "num_examples"), [(2, 60), pytest.param(4, 15, marks=pytest.mark.thorough)])
def test_a_drawn_training_is_plain_torch_adding_the_same_parts_to_the_bit(
    ranks: Ranks, world_size: int, num_examples: int
) -> None:
    for failures in ranks(world_size, draw_and_compare, num_examples, 0, deadline_s=200.0):
        assert failures == [], failures[0]
