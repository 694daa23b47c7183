"""The engine as a user drives it: accessors, accumulation, evaluation in between, and going on after an exception."""

import contextlib
import io
import math

import pytest
import torch
import torch.distributed as dist
from tiny_models import TinyModel, batch, digest, listen, settings, train_step, train_steps
from torch import nn

from zcore import zero
from zcore.core.errors import NotInstalledError, StateError
from zcore.core.extensions import installed
from zcore.core.mesh import build_mesh

STAGES = [(0,), (1,), (2,), (3,)]


def for_each(cases, act, *args):
    """Several cases in one run of the ranks: starting ranks costs more than training a tiny model."""
    for case in cases:
        try:
            act(*case, *args)
        except BaseException as error:
            error.add_note(f"in the case {case}")
            raise


def look_at_everything(zero_stage):
    model = TinyModel()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    engine = zero.initialize(
        model,
        settings(zero_stage, scheduler={"type": "StepLR", "params": {"step_size": 1}}, gradient_accumulation_steps=2),
    )
    rank = dist.get_rank()
    assert engine.module is model
    assert type(engine.optimizer) is torch.optim.AdamW
    assert type(engine.lr_scheduler) is torch.optim.lr_scheduler.StepLR
    assert (engine.global_steps, engine.micro_steps, engine.skipped_steps) == (0, 0, 0)
    assert engine.get_global_grad_norm() is None
    assert (engine.dp_size, engine.dp_rank, engine.global_rank) == (2, rank, rank)
    assert engine.device == torch.device("cpu")
    assert engine.config.train_batch_size == 8
    whole = engine.consolidated_state_dict()
    assert set(whole) == (set(plain) if rank == 0 else set())
    assert all(torch.equal(whole[name], plain[name]) for name in whole)
    flags = []
    for step in range(4):
        flags.append(engine.is_gradient_accumulation_boundary())
        train_step(engine, step)
    assert flags == [False, True, False, True]
    assert (engine.global_steps, engine.micro_steps) == (2, 4)
    assert engine.get_lr() == pytest.approx([0.01 * 0.1**2])
    norm = engine.get_global_grad_norm()
    assert math.isfinite(norm) and norm > 0
    assert engine.eval() is engine
    assert not model.training and not model.blocks[0].training
    assert engine.train() is engine
    assert model.blocks[0].training
    report = engine.memory_report()
    assert len(report.ranks) == 2
    num_params = sum(param.numel() for param in TinyModel().parameters())
    assert report.data_parallel.states_bytes == 16 * num_params  # parameter, gradient, two of AdamW's, 4 bytes each
    assert all(each.gradients_bytes > 0 and each.gathered_peak_bytes >= 0 for each in report.ranks)
    traffic = engine.traffic()
    assert set(traffic) == {"gather", "reduce"}
    assert sum(traffic["reduce"].payload_bytes.values()) > 0
    everywhere = engine.consolidated_state_dict(rank=None)
    assert {name: value.shape for name, value in everywhere.items()} == {n: v.shape for n, v in plain.items()}
    on_one = engine.consolidated_state_dict(rank=1)
    assert set(on_one) == (set(plain) if rank == 1 else set())
    told = [None] * 2
    dist.all_gather_object(told, (norm, {name: value.tolist() for name, value in everywhere.items()}))
    assert told[0] == told[1]  # the norm and the weights are the same on every rank
    assert "TinyModel" in repr(model)
    expected = f"Engine(TinyModel, ZeRO stage {zero_stage}, 2 ranks, {num_params:,} parameters, 2 steps so far)"
    assert repr(engine) == expected


def test_every_accessor_tells_what_it_says(ranks):
    ranks(2, for_each, STAGES, look_at_everything)


def accumulate_in_two_ways(zero_stage):
    """no_sync() moves reductions, not sums."""
    digests, norms = [], []
    for holds_back in (False, True):
        engine = zero.initialize(TinyModel(), settings(zero_stage, gradient_accumulation_steps=3))
        for number in range(2):
            for micro_step in range(3):
                loss = engine(**batch(3 * number + micro_step))
                if holds_back and micro_step < 2:
                    with engine.no_sync():
                        engine.backward(loss)
                else:
                    engine.backward(loss)
                engine.step()
            norms.append(engine.get_global_grad_norm())
        digests.append(engine.consolidated_state_dict(rank=None))
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-6)
    for name, value in digests[0].items():
        torch.testing.assert_close(value, digests[1][name], rtol=1e-5, atol=1e-6)


def test_no_sync_changes_when_gradients_are_reduced_and_not_what_they_are(ranks):
    ranks(2, for_each, STAGES, accumulate_in_two_ways)


def backward_twice_in_a_step(zero_stage):
    """Two losses of one micro-batch, one after the other, are their sum."""
    engine = zero.initialize(TinyModel(), settings(zero_stage))
    for step in range(2):
        for part in range(2):
            engine.backward(engine(**batch(10 * step + part)))
        engine.step()
    summed = zero.initialize(TinyModel(), settings(zero_stage))
    for step in range(2):
        loss = summed(**batch(10 * step)) + summed(**batch(10 * step + 1))
        summed.backward(loss)
        summed.step()
    mine, theirs = engine.consolidated_state_dict(rank=None), summed.consolidated_state_dict(rank=None)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_two_backwards_before_a_step_add_up(ranks):
    ranks(2, for_each, STAGES, backward_twice_in_a_step)


def train_with_evaluation(zero_stage):
    runs = []
    for evaluates in (False, True):
        engine = zero.initialize(TinyModel(), settings(zero_stage))
        losses = []
        for step in range(4):
            if evaluates:
                with torch.no_grad():
                    first = engine.eval()(**batch(50)).item()
                    assert engine(**batch(50)).item() == first
                    engine.module.head(torch.zeros(1, 8))  # a part alone
                with torch.inference_mode():
                    assert engine(**batch(50)).item() == first
                engine.train()
                engine(**batch(51))  # with a graph that nobody goes back through
                engine.module.num_forwards -= 4
            losses.append(train_step(engine, step))
        runs.append((losses, digest(engine)))
    assert runs[0] == runs[1]


def test_evaluation_and_unused_forwards_in_between_leave_no_trace(ranks):
    ranks(2, for_each, STAGES, train_with_evaluation)


def consolidate_between(zero_stage):
    """After a forward, before its backward: what a training loop that logs or saves there does."""
    engine = zero.initialize(TinyModel(), settings(zero_stage))
    before = engine.consolidated_state_dict(rank=None)
    loss = engine(**batch(0))
    between = engine.consolidated_state_dict(rank=None)
    assert all(torch.equal(before[name], between[name]) for name in before if name != "num_forwards")
    engine.backward(loss)
    engine.step()
    straight = zero.initialize(TinyModel(), settings(zero_stage))
    train_step(straight, 0)
    assert digest(engine) == digest(straight)


def test_the_whole_weights_can_be_had_between_forward_and_backward(ranks):
    ranks(2, for_each, STAGES, consolidate_between)


class Trap:
    """Raises once, in forward or in backward, when it is armed."""

    def __init__(self, model, place):
        self.armed = False
        if place == "forward":
            model.blocks[1].up.register_forward_pre_hook(lambda *_: self.spring())
        elif place == "after forward":
            model.register_forward_hook(lambda *_: self.spring())
        else:
            model.blocks[0].up.register_forward_hook(self.on_output)

    def on_output(self, module, args, out):
        if out.requires_grad:
            out.register_hook(lambda grad: self.spring())

    def spring(self):
        if self.armed:
            self.armed = False
            raise KeyError("a bad sample")


def meet_exceptions(zero_stage, changes, place):
    """Step 2 fails once and is repeated; the run equals one in which it never failed."""
    micro_steps = changes.get("gradient_accumulation_steps", 1)
    runs = []
    for fails in (False, True):
        engine = zero.initialize(TinyModel(), settings(zero_stage, **changes))
        trap = Trap(engine.module, place)
        losses = []
        for number in range(4):
            if fails and number == 2:
                trap.armed = True
                with pytest.raises(KeyError, match="a bad sample"):
                    train_step(engine, number * micro_steps)
                engine.module.num_forwards -= 1
                assert not trap.armed
            losses += train_steps(engine, range(number * micro_steps, (number + 1) * micro_steps))
        runs.append((losses, digest(engine), engine.global_steps))
        assert engine.sharding.ledger.live_bytes == 0
    assert runs[0] == runs[1]


@pytest.mark.parametrize("place", ["forward", "after forward", "backward"])
def test_after_an_exception_that_all_ranks_caught_the_run_goes_on_as_if_it_never_was(ranks, place):
    cases = [(0, {}), (2, {}), (3, {}), (3, {"gradient_accumulation_steps": 2})]
    ranks(2, for_each, cases, meet_exceptions, place)


def fail_in_the_second_micro_batch(zero_stage, place):
    """The warning says: run the micro-batches of this step again."""
    runs = []
    for fails in (False, True):
        engine = zero.initialize(TinyModel(), settings(zero_stage, gradient_accumulation_steps=2))
        trap = Trap(engine.module, place)
        for number in range(3):
            if fails and number == 1:
                train_step(engine, 2 * number)
                trap.armed = True
                with pytest.raises(KeyError, match="a bad sample"):
                    train_step(engine, 2 * number + 1)
                engine.module.num_forwards -= 2 if place == "backward" else 1
                again = (
                    range(2 * number, 2 * number + 2) if place == "backward" else range(2 * number + 1, 2 * number + 2)
                )
                train_steps(engine, again)
            else:
                train_steps(engine, range(2 * number, 2 * number + 2))
        whole = engine.consolidated_state_dict(rank=None)
        runs.append(({name: value.tolist() for name, value in whole.items()}, engine.global_steps))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_exception_in_a_later_micro_batch_is_mended_as_the_warning_says(ranks, place):
    ranks(2, for_each, STAGES, fail_in_the_second_micro_batch, place)


def save_after_an_exception(folder, place):
    engine = zero.initialize(TinyModel(), settings())
    train_steps(engine, range(2))
    before = digest(engine)
    trap = Trap(engine.module, place)
    trap.armed = True
    with pytest.raises(KeyError):
        train_step(engine, 2)
    engine.module.num_forwards -= 1
    engine.save_checkpoint(folder)
    assert engine.consolidated_state_dict(rank=None)["head.weight"].shape == (17, 8)
    with zero.GatheredParameters(engine.module.head.weight) as (whole,):
        assert whole.shape == (17, 8)
    other = zero.initialize(TinyModel(seed=4), settings())
    other.load_checkpoint(folder)
    assert digest(other) == before


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_after_an_exception_the_run_can_be_saved_at_once(ranks, tmp_path, place):
    ranks(2, save_after_an_exception, tmp_path, place)


def train_alone():
    engine = zero.initialize(TinyModel(), settings(3))
    losses = train_steps(engine, range(3))
    alone = TinyModel()
    plain = torch.optim.AdamW(alone.parameters(), lr=0.01, fused=True)
    expected = []
    for step in range(3):
        loss = alone(**batch(step, 0))
        loss.backward()
        plain.step()
        plain.zero_grad()
        expected.append(loss.item())
    assert losses == expected
    return dist.get_world_size(), sum(engine.traffic()["gather"].calls.values())


def test_one_rank_trains_as_plain_torch_does_to_the_bit(ranks, monkeypatch):
    assert ranks(1, train_alone)[0][0] == 1


def train_without_a_launcher():
    import os

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    zero.init_distributed()
    zero.init_distributed()  # harmless
    return train_alone()


def test_without_a_launcher_a_program_is_the_only_rank(ranks):
    assert ranks(1, train_without_a_launcher, init_process_group=False)[0][0] == 1


def print_steps():
    records = listen()
    engine = zero.initialize(TinyModel(), settings(steps_per_print=2))
    train_steps(engine, range(5))
    return records.lines


def test_steps_are_logged_on_rank_0_as_often_as_asked(ranks):
    first, second = ranks(2, print_steps)
    lines = [line for line in first if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert not [line for line in second if line.startswith("step ")]


def print_steps_unconfigured():
    """What reaches stderr, and after somebody has configured logging what reaches that; both with their losses."""
    shown = io.StringIO()
    config = settings(steps_per_print=2, gradient_accumulation_steps=2)
    with contextlib.redirect_stderr(shown):
        engine = zero.initialize(TinyModel(), config)
        losses = train_steps(engine, range(4))
        norm = engine.get_global_grad_norm()
        records = listen()
        train_steps(engine, range(4, 8))
    return shown.getvalue(), sum(losses[2:]) / 2, norm, [line for line in records.lines if line.startswith("step ")]


def test_where_nobody_has_configured_logging_steps_show_on_stderr_once_with_the_loss_of_rank_0(ranks):
    (shown, loss, norm, logged), (of_rank_1, *_, logged_on_1) = ranks(2, print_steps_unconfigured)
    assert shown == f"step 2: loss {loss:#.4g}, gradient norm {norm:#.4g}, learning rate 0.01000\n"
    assert [line.split(":")[0] for line in logged] == ["step 4"]
    assert (of_rank_1, logged_on_1) == ("", [])


def use_keys_without_effect():
    records = listen()
    zero_section = {"stage": 3, "sub_group_size": 1000, "stage3_gather_16bit_weights_on_model_save": True}
    zero.initialize(TinyModel(), settings(zero_optimization=zero_section))
    return records.lines


def test_a_key_without_effect_says_so(ranks):
    lines = "\n".join(ranks(2, use_keys_without_effect)[0])
    assert "sub_group_size" in lines
    assert "stage3_gather_16bit_weights_on_model_save" in lines


class Varied(nn.Module):
    """Takes and gives what models do: keywords, containers, no tensor, None."""

    def __init__(self):
        super().__init__()
        self.inner = TinyModel()
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs, *, wants_loss=True):
        loss = self.inner(**inputs["data"])
        return {"loss": loss if wants_loss else None, "parts": [loss.detach(), "text"], "count": 3}


def train_varied(zero_stage):
    engine = zero.initialize(Varied(), settings(zero_stage))
    before = engine.consolidated_state_dict(rank=None)
    for step in range(3):
        result = engine({"data": batch(step)})
        assert result["count"] == 3 and result["parts"][1] == "text"
        assert engine.backward(result["loss"]) is result["loss"]
        engine.step()
    assert engine({"data": batch(9)}, wants_loss=False)["loss"] is None
    after = engine.consolidated_state_dict(rank=None)
    assert torch.equal(before["unused.weight"], after["unused.weight"])
    assert not torch.equal(before["inner.head.weight"], after["inner.head.weight"])


def test_arguments_and_results_are_the_models_own(ranks):
    ranks(2, for_each, [(0,), (3,)], train_varied)


def close_and_go_on(zero_stage):
    engine = zero.initialize(TinyModel(), settings(zero_stage))
    train_step(engine, 0)
    whole = engine.consolidated_state_dict(rank=None)
    engine.close()
    other = TinyModel(seed=3)
    other.load_state_dict(whole)
    again = zero.initialize(other, settings(zero_stage))
    assert math.isfinite(train_step(again, 1))


def test_after_close_the_weights_start_another_engine(ranks):
    ranks(2, for_each, [(0,), (3,)], close_and_go_on)


def loop_by_hand(zero_stage):
    """Torch's own habit and the engine train the same bits."""
    options = zero.ShardingOptions(small_numel=16)
    model = zero.shard(TinyModel(), build_mesh(dp=-1), stage=zero_stage, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    losses = []
    for step in range(4):
        loss = model(**batch(step))
        loss.backward()
        zero.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine = zero.initialize(TinyModel(), settings(zero_stage, gradient_clipping=0.5))
    assert train_steps(engine, range(4)) == losses
    mine, theirs = zero.consolidated_state_dict(model, rank=None), engine.consolidated_state_dict(rank=None)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_loop_by_hand_trains_the_same_bits_as_the_engine(ranks):
    ranks(2, for_each, STAGES, loop_by_hand)


def report_without_a_recording():
    engine = zero.initialize(TinyModel(), settings())
    assert engine.recording is None
    with pytest.raises(StateError, match=r'"comms_logger": \{"enabled": true\}'):
        engine.comm_report()


def test_a_report_on_what_was_not_recorded_names_the_key_to_set(ranks):
    ranks(1, report_without_a_recording)


def record_without_a_recorder():
    with pytest.raises(NotInstalledError, match="pip install zcore-comm"):
        zero.initialize(TinyModel(), settings(comms_logger={"enabled": True}))
    return dist.is_initialized()


@pytest.mark.skipif(installed("zcore-comm") is not None, reason="zcore-comm is installed: integration-tests/ has this")
def test_recording_without_a_wheel_that_records_names_the_wheel(ranks):
    assert ranks(1, record_without_a_recorder, init_process_group=False) == [False]  # before ranks meet
