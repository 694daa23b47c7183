"""Programs that call things in an order of their own: zero_grad late, forwards without backward, two losses, edits."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from zcore import zero
from zcore.core.errors import MismatchError, StateError
from zcore.core.events import Events, MemorySink
from zcore.core.extensions import installed
from zcore.core.mesh import build_mesh

STAGES = (0, 1, 2, 3)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)) for _ in range(3))
        self.main, self.aux = nn.Linear(12, 1), nn.Linear(12, 1)
        self.skipped = -1

    def forward(self, x, head="main"):
        for index, block in enumerate(self.blocks):
            if index != self.skipped:
                x = x + block(x)
        return (self.main if head == "main" else self.aux)(x).square().mean()


def rows_of(step, *, rank=0, world_size=1):
    rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return rows[rank * 8 // world_size : (rank + 1) * 8 // world_size]


def tutorial_order(model, optimizer, batch):
    loss = model(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def forward_between_backward_and_step(model, optimizer, batch):
    model(batch).backward()
    model(batch, head="aux")  # a metric, without no_grad
    optimizer.step()
    optimizer.zero_grad()


def two_backwards(model, optimizer, batch):
    model(batch).backward()
    model(batch, head="aux").backward()
    optimizer.step()
    optimizer.zero_grad()


def edits_in_place(model, optimizer, batch):
    two_backwards(model, optimizer, batch)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.9)


PROGRAMS = (tutorial_order, forward_between_backward_and_step, two_backwards, edits_in_place)


def run_program(program, *, stage, rank=0, world_size=1):
    """The values of the main loss after each of five steps."""
    torch.manual_seed(0)
    model = TwoHeads()
    if stage is not None:
        zero.shard(model, build_mesh(dp=-1), stage=stage, options=zero.ShardingOptions(small_numel=12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(5):
        program(model, optimizer, rows_of(step, rank=rank, world_size=world_size))
        with torch.no_grad():
            losses.append(model(rows_of(99)).item())
    return losses


def run_all_programs():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [
        [run_program(program, stage=stage, rank=rank, world_size=world_size) for stage in STAGES]
        for program in PROGRAMS
    ]


def test_every_order_of_calls_trains_as_in_plain_torch_at_every_stage(ranks):
    for program, by_stage in zip(PROGRAMS, ranks(2, run_all_programs)[0], strict=True):
        expected = torch.tensor(run_program(program, stage=None))
        for stage, losses in zip(STAGES, by_stage, strict=True):
            worst = ((torch.tensor(losses) - expected).abs() / expected.abs()).max().item()
            assert worst < 1e-5, (program.__name__, stage, losses, expected.tolist())


def read_and_save_after_a_forward(folder):
    batch = rows_of(0, rank=dist.get_rank(), world_size=2)
    config = {
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 12},
    }
    sink = MemorySink()
    torch.manual_seed(0)
    engine = zero.initialize(TwoHeads(), config, events=Events([sink]))
    engine.backward(engine(batch))
    engine.step()
    before = engine.consolidated_state_dict(rank=None)
    engine(batch)  # a forward that gets no backward
    after = engine.consolidated_state_dict(rank=None)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    with zero.GatheredParameters(list(engine.module.parameters())) as whole:
        shapes = [tuple(param.shape) for param in whole]
    names = [metric.name for metric in sink.metrics]
    assert {metric.rank for metric in sink.metrics} == {dist.get_rank()}
    return all(torch.equal(before[name], after[name]) for name in before), shapes, names


def test_parameters_are_read_and_saved_right_after_a_forward_without_backward(ranks, tmp_path):
    is_equal, shapes, names = ranks(2, read_and_save_after_a_forward, str(tmp_path))[0]
    assert is_equal
    assert shapes == [tuple(param.shape) for param in TwoHeads().parameters()]
    assert names == ["loss", "grad_norm", "lr/0"]


BY_ZERO = "gathered other parameters than the first rank of their shard group"


def take_another_path():
    torch.manual_seed(0)
    model = TwoHeads()
    zero.shard(model, build_mesh(dp=-1), stage=3, options=zero.ShardingOptions(small_numel=12))
    rank = dist.get_rank()
    model.skipped = rank  # another block is left out on each rank
    message = "nothing was said"
    try:
        model(rows_of(0)).backward()
    except MismatchError as error:
        message = str(error)
    if BY_ZERO not in message:  # zcore-comm has found it, in the forward: for ranks that restart
        return message, None
    model.skipped = -1
    return message, [step_alike(model, step, rows_of(step, rank=rank, world_size=2)) for step in range(2)]


def step_alike(model, step, rows):
    loss = model(rows)
    loss.backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param.add_(param.grad, alpha=-0.1)
    model.zero_grad()
    with torch.no_grad():
        return model(rows_of(9)).item()


def test_ranks_that_skip_different_blocks_are_told_and_without_zcore_comm_go_on_without_that_step(ranks):
    torch.manual_seed(0)
    plain = TwoHeads()
    expected = [step_alike(plain, step, rows_of(step)) for step in range(2)]
    for message, losses in ranks(2, take_another_path):
        if installed("zcore-comm"):
            assert "all_gather blocks.1 into one memory (320 x float32) on rank" in message
            assert "all_gather blocks.0 into one memory (320 x float32) on rank" in message
        else:
            assert BY_ZERO in message
            assert losses == pytest.approx(expected, rel=1e-5)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

    def forward(self, x, num_experts):
        return x + sum(torch.tanh(expert(x)) for expert in self.experts[:num_experts])


class Experts(nn.Module):
    """Blocks of two experts, of which a rank may need only the first."""

    def __init__(self, *, recomputes=False):
        super().__init__()
        self.blocks = nn.ModuleList(Expert() for _ in range(5))
        self.recomputes = recomputes

    def forward(self, x, num_experts):
        for block in self.blocks:
            x = checkpoint(block, x, num_experts, use_reentrant=False) if self.recomputes else block(x, num_experts)
        return x.square().mean()


def starve_experts():
    rank = dist.get_rank()
    found = []
    for stage, recomputes in ((1, False), (2, False), (3, False), (3, True)):
        torch.manual_seed(0)
        options = zero.ShardingOptions(small_numel=12)
        model = zero.shard(Experts(recomputes=recomputes), build_mesh(dp=-1), stage=stage, options=options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            model(rows_of(step, rank=rank, world_size=2), num_experts=2 - rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(zero.consolidated_state_dict(model, rank=None))
    return found


def test_a_rank_whose_experts_have_no_token_neither_waits_for_the_others_in_vain_nor_loses_a_gradient(ranks):
    """One rank's buckets are complete within the backward, the other's never are; both gather on."""
    torch.manual_seed(0)
    plain = Experts()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        for rank in range(2):
            (plain(rows_of(step, rank=rank, world_size=2), num_experts=2 - rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for by_stage in ranks(2, starve_experts):
        for state in by_stage:
            torch.testing.assert_close(state, plain.state_dict())


def copy_it():
    import copy

    model = TwoHeads()
    zero.shard(model, build_mesh(dp=-1), stage=3)
    try:
        copy.deepcopy(model)
    except StateError as error:
        return str(error)
    return "nothing was said"


def test_a_copy_of_a_sharded_model_is_refused_with_advice(ranks):
    assert all("consolidated_state_dict" in message for message in ranks(2, copy_it))


class Heard(logging.Handler):
    """What the library warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def skip_a_block_now_and_then():
    torch.manual_seed(0)
    options = zero.ShardingOptions(small_numel=12, bucket_numel=200)
    model = zero.shard(TwoHeads(), build_mesh(dp=-1), stage=3, options=options)
    heard, counts = Heard(), []
    logging.getLogger("zcore").addHandler(heard)
    try:
        for is_trained in (False, True):
            for model.skipped in (-1, -1, 1, -1, 0):
                with torch.set_grad_enabled(is_trained):
                    loss = model(rows_of(0))
                if is_trained:
                    loss.backward()
            counts.append(sum("order of modules changed" in message for message in heard.messages))
    finally:
        logging.getLogger("zcore").removeHandler(heard)
    return counts


def test_another_order_is_told_of_once_where_it_trains_and_not_where_it_evaluates(ranks):
    assert ranks(2, skip_a_block_now_and_then) == [[0, 1]] * 2
