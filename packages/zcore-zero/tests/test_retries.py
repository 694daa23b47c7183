"""A program that runs out of memory, catches it on all ranks and tries a smaller batch trains as plain torch does.

In every row, at every place where a step may be interrupted, and with the interrupted forward's graph still held by
whoever caught the error. Nothing gathered outlives the attempt. Two ranks against one process, bit by bit: a mean of
two has one order.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TinyModel, batch, settings
from torch import Tensor, nn

from zcore import zero

Ranks = Callable[..., Any]
STEPS, FAILS_IN = 4, (1, 2)  # in a row
PLACES = ("forward", "after forward", "recomputation", "backward", "first gradient", "last gradient")


class OutOfMemory:
    """Raises once when it is armed, at its place, before anything is done there."""

    def __init__(self, model: nn.Module, place: str) -> None:
        self.is_armed = False
        self.place = place
        self.num_calls = 0
        middle = model.blocks[1]
        if place == "forward":
            middle.up.register_forward_pre_hook(self.spring)
        elif place == "after forward":
            model.register_forward_hook(self.spring)
        elif place == "recomputation":
            middle.down.register_forward_pre_hook(self.spring_when_again)
        elif place == "backward":
            middle.up.register_forward_hook(self.spring_in_backward)
        elif place == "first gradient":
            model.head.register_forward_hook(self.spring_in_backward)
        else:
            model.embed.register_forward_hook(self.spring_in_backward)

    def arm(self) -> None:
        """The next time it is there it fails."""
        self.is_armed, self.num_calls = True, 0

    def spring(self, *_: object) -> None:
        """Fail as torch does, if armed."""
        if self.is_armed:
            self.is_armed = False
            raise RuntimeError("out of memory: tried to allocate 2.00 GiB")

    def spring_when_again(self, *_: object) -> None:
        """Fail when the forward before it is computed again."""
        self.num_calls += 1
        if self.num_calls == 2:
            self.spring()

    def spring_in_backward(self, module: nn.Module, args: object, out: Tensor) -> None:
        """Fail when the gradient of `out` is there."""
        if out.requires_grad:
            out.register_hook(self.spring)


def half_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in given.items()}


def gathered_bytes(engine: zero.Engine) -> int:
    """Of all buckets that are to be gathered only for their use."""
    transient = [bucket for bucket in engine.sharding.buckets if bucket.is_transient]
    return sum(bucket.memory.gathered.untyped_storage().nbytes() for bucket in transient)


def attempt(engine: zero.Engine, given: dict[str, Tensor], *, is_plain: bool) -> None:
    loss = engine(**given)
    if is_plain:
        loss.backward()
    else:
        engine.backward(loss)


def train(place: str, *, is_plain: bool, fails: bool = True, **changes: Any) -> dict[str, Any]:
    """Steps `FAILS_IN` are tried with the whole batch and taken with half of it; without `fails` they just are."""
    engine = zero.initialize(TinyModel(), settings(**changes))
    memory = OutOfMemory(engine.module, place)
    held: list[object] = []
    leaked = 0
    for step in range(STEPS):
        given = batch(step)
        if step in FAILS_IN:
            if fails:
                memory.arm()
                with pytest.raises(RuntimeError, match="out of memory") as caught:
                    attempt(engine, given, is_plain=is_plain)
                held.append(caught)  # and with it the frames, and what they hold: the loss with its graph
                assert not memory.is_armed
            given = half_of(given)
        attempt(engine, given, is_plain=is_plain)
        engine.step()
        leaked = max(leaked, gathered_bytes(engine), engine.sharding.ledger.live_bytes)
    state = {name: value for name, value in engine.consolidated_state_dict(rank=None).items() if name != "num_forwards"}
    steps = engine.global_steps
    engine.close()
    return {"state": state, "leaked": leaked, "steps": steps}


def plain_state() -> dict[str, Tensor]:
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            given = batch(step, rank)
            (model(**(half_of(given) if step in FAILS_IN else given)) / 2).backward()
        optimizer.step()
    return {name: value for name, value in model.state_dict().items() if name != "num_forwards"}


RECOMPUTED = {"activation_checkpointing": {"every": 1}}
WAYS: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    "recomputed": {"zero_stage": 3, **RECOMPUTED},
    "no overlap": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 16, "overlap_comm": False}},
    "all small": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**6}},
    "bf16": {"zero_stage": 3, "bf16": {"enabled": True}},
    "fp16": {"zero_stage": 3, "fp16": {"enabled": True, "loss_scale": 64.0}},
    "fp16 in stage 1, recomputed": {"zero_stage": 1, "fp16": {"enabled": True, "loss_scale": 64.0}, **RECOMPUTED},
}


def differences(way: str) -> dict[str, Any]:
    """By place and kind of backward, what is not as in a run without failures; and whether that is plain torch's."""
    changes, found = WAYS[way], {}
    places = [place for place in PLACES if place != "recomputation" or "activation_checkpointing" in changes]
    for is_plain in (False, True):
        expected = train("forward", is_plain=is_plain, fails=False, **changes)["state"]
        for place in places:
            run = train(place, is_plain=is_plain, **changes)
            wrong = [name for name, value in expected.items() if not torch.equal(run["state"][name], value)]
            if wrong or run["leaked"] or run["steps"] != STEPS:
                found[f"{place}, {'plain' if is_plain else 'engine'}"] = (wrong, run["leaked"], run["steps"])
    if "16" not in way:
        plain = plain_state()
        wrong = [name for name, value in plain.items() if not torch.equal(expected[name], value)]
        found |= {"plain torch": wrong} if wrong else {}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_smaller_batch_after_running_out_of_memory_trains_as_if_it_were_the_first_one(ranks: Ranks, way: str) -> None:
    assert ranks(2, differences, way) == [{}, {}]


def norm_of_plain_backwards(**changes: Any) -> float:
    torch.manual_seed(0)
    engine = zero.initialize(TinyModel(), settings(gradient_clipping=1e9, **changes))
    for _ in range(changes.get("gradient_accumulation_steps", 1)):
        engine(**batch(0)).backward()
        engine.step()
    return engine.get_global_grad_norm()


def norms_around_a_failure(changes: dict[str, Any]) -> list[float]:
    """Before an engine's backward fails in this process, and after: of another engine, and of one without settings."""
    before = [norm_of_plain_backwards(**changes), norm_of_plain_backwards()]
    engine = zero.initialize(TinyModel(), settings(**changes))
    OutOfMemory(engine.module, "backward").arm()
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.backward(engine(**batch(0)))
    return [*before, norm_of_plain_backwards(**changes), norm_of_plain_backwards()]


@pytest.mark.parametrize(
    "changes", [{"gradient_accumulation_steps": 2}, {"fp16": {"enabled": True, "loss_scale": 64.0}}]
)
def test_a_failed_backward_of_an_engine_leaves_no_factor_to_plain_ones(ranks: Ranks, changes: dict[str, Any]) -> None:
    for scaled, plain, *after in ranks(2, norms_around_a_failure, changes):
        assert after == [scaled, plain]
