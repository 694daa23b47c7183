"""A rank that dies in a step ends every other rank with one readable CollectiveError, soon and without a hang.

Ranks that raise leave at once, as they do under torchrun; one that does not notice in ten seconds is killed by the
harness and reported as hung, which fails the test.
"""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from tiny_models import TinyModel, batch, is_paragraph, settings, train_step, train_steps

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.core.testing import RankFailed

PLACES = ["forward", "backward", "before the optimizer step", "after the optimizer step", "between steps"]


def die(how):
    os.kill(os.getpid(), signal.SIGKILL) if how == "SIGKILL" else os._exit(3)


def on_gradient(tensor, act):
    tensor.register_hook(act)


def plant_death(engine, place, how):
    """From the next step on this rank dies at `place`."""
    model, optimizer = engine.module, engine.optimizer
    if place == "forward":
        model.blocks[1].register_forward_pre_hook(lambda *_: die(how))
    elif place == "backward":
        model.blocks[0].register_forward_hook(
            lambda module, args, out: out.register_hook(lambda grad: die(how)) and None
        )
    elif place == "before the optimizer step":
        optimizer.register_step_pre_hook(lambda *_: die(how))
    elif place == "after the optimizer step":
        optimizer.register_step_post_hook(lambda *_: die(how))
    else:
        die(how)


def train_until_death(place, how, *, victim, zero_stage, mesh_sizes, **changes):
    mesh = build_mesh(**mesh_sizes)
    engine = zero.initialize(TinyModel(), settings(zero_stage, **changes), mesh=mesh)
    train_steps(engine, range(2))
    if dist.get_rank() == victim:
        plant_death(engine, place, how)
    train_steps(engine, range(2, 5))


def check_that_all_notice(ranks, world_size, place, how, *, victim, zero_stage, mesh_sizes=None, **changes):
    setting = {"victim": victim, "zero_stage": zero_stage, "mesh_sizes": mesh_sizes or {"dp": -1}, **changes}
    with pytest.raises(RankFailed) as caught:
        ranks(world_size, train_until_death, place, how, **setting)
    failures = {failure.rank: failure for failure in caught.value.failures}
    assert len(failures) == world_size  # nobody trained on alone
    assert failures[victim].type_name == "Died"
    assert caught.value.first.rank == victim
    for rank, failure in failures.items():
        if rank != victim:
            assert failure.type_name == "CollectiveError", failure
            assert failure.message.startswith(("all_gather ", "all_reduce ", "reduce_scatter ", "broadcast ")), failure
            for words in ("did not complete", "was killed", "restart all ranks from the last checkpoint"):
                assert words in failure.message
            assert is_paragraph(failure.message)


@pytest.mark.parametrize(
    ("place", "how", "zero_stage", "victim"),
    [(place, "SIGKILL", 3, 1) for place in PLACES] + [("forward", "exit", 1, 0), ("backward", "exit", 1, 0)],
)
def test_when_one_of_two_dies_the_other_raises(ranks, place, how, zero_stage, victim):
    check_that_all_notice(ranks, 2, place, how, victim=victim, zero_stage=zero_stage)


@pytest.mark.parametrize(
    ("place", "zero_stage", "changes"),
    [
        ("backward", 0, {}),
        ("before the optimizer step", 0, {"gradient_clipping": 0.1}),
        ("forward", 2, {"gradient_accumulation_steps": 2}),
        ("backward", 3, {"bf16": {"enabled": True}}),
    ],
)
def test_when_one_of_three_dies_both_others_raise(ranks, place, zero_stage, changes):
    check_that_all_notice(ranks, 3, place, "SIGKILL", victim=1, zero_stage=zero_stage, **changes)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_in_hybrid_sharding_the_other_replica_raises_as_well(ranks, place):
    sizes = {"dp_replicate": 2, "dp_shard": 2}
    check_that_all_notice(ranks, 4, place, "SIGKILL", victim=3, zero_stage=3, mesh_sizes=sizes)


def raise_on_one_rank(place):
    engine = zero.initialize(TinyModel(), settings())
    train_step(engine, 0)
    if dist.get_rank() == 0:
        if place == "forward":
            engine.module.blocks[1].register_forward_pre_hook(fail)
        else:
            engine.module.blocks[0].register_forward_hook(lambda module, args, out: on_gradient(out, fail))
    train_steps(engine, range(1, 4))


def fail(*_):
    raise KeyError("the sample has no label")


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_when_one_rank_raises_its_own_error_stands_first(ranks, place):
    with pytest.raises(RankFailed) as caught:
        ranks(2, raise_on_one_rank, place)
    raising, other = caught.value.failures
    assert caught.value.first is raising
    assert raising.type_name == "KeyError"
    assert "the sample has no label" in raising.message
    assert other.type_name == "CollectiveError"


def gather_or_report(what, folder):
    """What every rank calls together outside a step, with one rank gone."""
    engine = zero.initialize(TinyModel(), settings())
    train_step(engine, 0)
    if dist.get_rank() == 1:
        die("SIGKILL")
    calls = {
        "consolidated_state_dict": engine.consolidated_state_dict,
        "memory_report": engine.memory_report,
        "save_checkpoint": lambda: engine.save_checkpoint(folder),
        "evaluation": lambda: evaluate(engine),
        "gathered": lambda: zero.GatheredParameters(engine.module.head.weight).__enter__(),
    }
    calls[what]()


def evaluate(engine):
    with torch.no_grad():
        return engine.eval()(**batch(1))


@pytest.mark.parametrize(
    "what", ["consolidated_state_dict", "memory_report", "save_checkpoint", "evaluation", "gathered"]
)
def test_what_all_ranks_call_outside_a_step_fails_readably_too(ranks, tmp_path, what):
    with pytest.raises(RankFailed) as caught:
        ranks(2, gather_or_report, what, tmp_path)
    survivor, _ = caught.value.failures
    assert survivor.type_name == "CollectiveError"
    assert is_paragraph(survivor.message)


def start_without_a_peer(how):
    if dist.get_rank() == 1:
        die(how)
    zero.initialize(TinyModel(), settings())


@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_a_rank_that_dies_before_initialize_is_noticed_there(ranks, how):
    with pytest.raises(RankFailed) as caught:
        ranks(2, start_without_a_peer, how)
    survivor, _ = caught.value.failures
    assert survivor.type_name == "CollectiveError"
    assert is_paragraph(survivor.message)


def wait_for_a_peer_that_is_elsewhere(timeout_s, zero_stage):
    """Not dead but elsewhere: rank 1 never comes to the next step, and only the process group's timeout tells."""
    zero.init_distributed(timeout_s=timeout_s)
    engine = zero.initialize(TinyModel(), settings(zero_stage))
    train_step(engine, 0)
    if dist.get_rank() == 0:
        train_step(engine, 1)
    return "went on"


@pytest.mark.parametrize("zero_stage", [0, 3])  # where a reduction waits first, and where a gather does
def test_a_rank_that_does_not_come_is_an_error_after_the_timeout_of_init_distributed(ranks, zero_stage):
    with pytest.raises(RankFailed) as caught:
        ranks(2, wait_for_a_peer_that_is_elsewhere, 1.0, zero_stage, init_process_group=False, deadline_s=15.0)
    (waiting,) = caught.value.failures
    assert waiting.type_name == "CollectiveError"
    assert "timeout" in waiting.message
    assert caught.value.results == {1: "went on"}
