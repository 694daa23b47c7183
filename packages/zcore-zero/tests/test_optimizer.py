"""Optimizers, groups and schedules by name, class, factory and instance: all the same run, all on fragments."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from tiny_models import TinyModel, batch, digest, settings, train_steps
from torch import nn

from zcore import zero
from zcore.core.errors import ConfigError
from zcore.core.mesh import build_mesh
from zcore.zero.optimizers.building import refuse_matrix_wise

HYPER = {"lr": 0.02, "weight_decay": 0.1}
NO_OPTIMIZER = settings(optimizer=None)


def grouped(model):
    matrices = [param for param in model.parameters() if param.dim() > 1]
    rest = [param for param in model.parameters() if param.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.2}, {"params": rest, "lr": 0.05}]


def compare_ways_to_hand_over():
    """Every way to say the same optimizer trains the same bits."""
    by_name = settings(optimizer={"type": "AdamW", "params": HYPER})

    def with_instance():
        model = TinyModel()
        return zero.initialize(
            model, NO_OPTIMIZER, optimizer=torch.optim.AdamW(model.parameters(), **HYPER, fused=True)
        )

    ways = {
        "name": lambda: zero.initialize(TinyModel(), by_name),
        "name of the field": lambda: zero.initialize(
            TinyModel(), settings(optimizer={"type": "Adam", "params": HYPER | {"torch_adam": True}})
        ),
        "factory": lambda: zero.initialize(
            TinyModel(), NO_OPTIMIZER, optimizer=lambda groups: torch.optim.AdamW(groups, **HYPER, fused=True)
        ),
        "partial": lambda: zero.initialize(
            TinyModel(), NO_OPTIMIZER, optimizer=partial(torch.optim.AdamW, **HYPER, fused=True)
        ),
        "instance": with_instance,
    }
    digests = {}
    for way, start in ways.items():
        engine = start()
        losses = train_steps(engine, range(3))
        assert type(engine.optimizer) is torch.optim.AdamW
        digests[way] = digest(engine), losses
    assert len({str(value) for value in digests.values()}) == 1, digests


def test_name_class_factory_and_instance_train_the_same_bits(ranks):
    ranks(2, compare_ways_to_hand_over)


def compare_groups():
    """Groups as `model_parameters`, and inside an instance; and the group's own values are used."""
    digests = []
    model = TinyModel()
    engine = zero.initialize(
        model, NO_OPTIMIZER, optimizer=partial(torch.optim.AdamW, **HYPER), model_parameters=grouped(model)
    )
    train_steps(engine, range(3))
    assert engine.get_lr() == [0.02, 0.05]
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.2, 0.1]
    digests.append(digest(engine))
    model = TinyModel()
    optimizer = torch.optim.AdamW(grouped(model), **HYPER)
    engine = zero.initialize(model, NO_OPTIMIZER, optimizer=optimizer)
    assert engine.optimizer is optimizer
    train_steps(engine, range(3))
    digests.append(digest(engine))
    model = TinyModel()
    config = settings(optimizer={"type": "AdamW", "params": HYPER | {"fused": False}})
    engine = zero.initialize(model, config, model_parameters=iter(grouped(model)))
    train_steps(engine, range(3))
    digests.append(digest(engine))
    assert len(set(digests)) == 1
    alone = TinyModel()
    plain = torch.optim.AdamW(grouped(alone), **HYPER)
    for step in range(3):
        for rank in range(2):
            (alone(**batch(step, rank)) / 2).backward()
        plain.step()
        plain.zero_grad()
    whole = engine.consolidated_state_dict(rank=None)
    for name, param in alone.named_parameters():
        torch.testing.assert_close(whole[name], param.detach(), rtol=2e-5, atol=2e-6)


def test_parameter_groups_are_kept_however_they_are_handed_over(ranks):
    ranks(2, compare_groups)


def train_a_part():
    model = TinyModel()
    engine = zero.initialize(model, settings(), model_parameters=model.blocks.parameters())
    before = engine.consolidated_state_dict(rank=None)
    train_steps(engine, range(2))
    after = engine.consolidated_state_dict(rank=None)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved - {"num_forwards"} == {name for name in before if name.startswith("blocks.")}
    assert {fragment.fqn for fragment in engine.optimizer.state} == moved - {"num_forwards"}


def test_only_the_parameters_that_were_passed_are_stepped(ranks):
    ranks(2, train_a_part)


def train_named():
    model = TinyModel()
    engine = zero.initialize(model, settings(), model_parameters=model.named_parameters())
    train_steps(engine, range(2))
    other = zero.initialize(TinyModel(), settings())
    train_steps(other, range(2))
    assert digest(engine) == digest(other)


def test_named_parameters_are_taken_as_torch_takes_them(ranks):
    ranks(2, train_named)


def train_named_instance():
    model = TinyModel()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    engine = zero.initialize(model, NO_OPTIMIZER, optimizer=optimizer)
    train_steps(engine, range(2))
    return engine.global_steps


def test_an_instance_over_named_parameters_trains(ranks):
    assert ranks(2, train_named_instance) == [2, 2]


NOT_ELEMENT_WISE = {"Optimizer", "Muon", "Adafactor", "LBFGS", "SparseAdam"}
CLASSES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in NOT_ELEMENT_WISE
)


class OwnMuon(torch.optim.Muon):
    pass


@pytest.mark.parametrize("kind", [torch.optim.Muon, OwnMuon, torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_looks_at_whole_matrices_is_refused_by_name_as_in_a_config(kind):
    optimizer = kind([nn.Parameter(torch.zeros(2, 3))])
    with pytest.raises(ConfigError, match=f"{kind.__name__} looks at whole matrices.*such as AdamW"):
        refuse_matrix_wise(optimizer)
    refuse_matrix_wise(torch.optim.AdamW([nn.Parameter(torch.zeros(2, 3))]))


def train_every_class(how):
    """Each element-wise class against itself in one process: the largest difference, or what it failed with."""
    outcome = {}
    for name in CLASSES:
        try:
            outcome[name] = compare_with_one_process(name, how)
        except Exception as error:  # noqa: BLE001 - each class is told
            outcome[name] = f"{type(error).__name__}: {error}"
    return outcome


def step_alone(model, optimizer, step):
    """One step on the batches of both ranks, in plain torch."""
    for rank in range(2):
        (model(**batch(step, rank)) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def compare_with_one_process(name, how):
    kind = getattr(torch.optim, name)
    alone = TinyModel()
    plain = kind(alone.parameters(), lr=0.01)
    first = 0
    if how == "name":
        params = {"lr": 0.01} | ({"adam_w_mode": False} if name == "Adam" else {})
        engine = zero.initialize(TinyModel(), settings(optimizer={"type": name, "params": params}))
    else:
        model = TinyModel()
        optimizer = kind(model.parameters(), lr=0.01, foreach=False)
        if how == "instance that has stepped":
            step_alone(model, optimizer, 0)
            step_alone(alone, plain, 0)
            first = 1
        engine = zero.initialize(model, NO_OPTIMIZER, optimizer=optimizer)
    train_steps(engine, range(first, 3))
    for step in range(first, 3):
        step_alone(alone, plain, step)
    whole = engine.consolidated_state_dict(rank=None)
    return max((whole[key] - param).abs().max().item() for key, param in alone.named_parameters())


@pytest.mark.parametrize("how", ["name", "instance", "instance that has stepped"])
def test_every_element_wise_class_of_torch_trains_as_in_one_process(ranks, how):
    outcome = ranks(2, train_every_class, how)[0]
    wrong = {name: each for name, each in outcome.items() if isinstance(each, str) or each > 1e-4}  # steps are 1e-2
    assert wrong == {}


def schedule_of(way):
    """A schedule as instance on the passed optimizer, as factory, and by name in the config."""
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if way == "instance":
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
        return zero.initialize(model, NO_OPTIMIZER, optimizer=optimizer, lr_scheduler=schedule), schedule
    if way == "factory":
        make = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
        return zero.initialize(model, NO_OPTIMIZER, optimizer=optimizer, lr_scheduler=make), None
    config = settings(
        optimizer={"type": "SGD", "params": {"lr": 0.1}},
        scheduler={"type": "StepLR", "params": {"step_size": 2, "gamma": 0.1}},
    )
    return zero.initialize(model, config), None


def follow_schedules():
    runs = []
    for way in ("instance", "factory", "config"):
        engine, schedule = schedule_of(way)
        assert schedule is None or engine.lr_scheduler is schedule
        rates = []
        for step in range(5):
            rates.append(engine.get_lr()[0])
            train_steps(engine, range(step, step + 1))
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
        runs.append(rates)
    assert runs[0] == runs[1] == runs[2]


def test_a_schedule_may_come_as_instance_factory_or_name(ranks):
    ranks(2, follow_schedules)


def step_on_the_plateau():
    config = settings(scheduler={"type": "ReduceLROnPlateau", "params": {}})
    try:
        engine = zero.initialize(TinyModel(), config)
    except zero.config.ConfigError as error:
        return str(error)
    train_steps(engine, range(2))
    return "trained"


def test_a_schedule_that_needs_a_metric_is_refused_at_start_or_works(ranks):
    (outcome,) = set(ranks(1, step_on_the_plateau))
    assert outcome == "trained" or "ReduceLROnPlateau" in outcome


def train_in_a_mesh():
    digests = []
    for mesh in (None, build_mesh(dp=2), build_mesh(dp_shard=2), build_mesh(dp_replicate=1, dp_shard=2)):
        engine = zero.initialize(TinyModel(), settings(), mesh=mesh)
        train_steps(engine, range(2))
        digests.append(digest(engine))
        assert (engine.dp_size, engine.dp_rank) == (2, dist.get_rank())
    assert len(set(digests)) == 1


def test_a_mesh_may_name_its_data_axis_in_any_of_three_ways(ranks):
    ranks(2, train_in_a_mesh)


class TiedAndFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(17, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.embed.weight
        self.middle.weight.requires_grad_(False)

    def forward(self, tokens, targets):
        logits = self.head(torch.tanh(self.middle(self.embed(tokens))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_tied_and_frozen():
    model = TiedAndFrozen()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # all of them, the frozen one too
    engine = zero.initialize(model, NO_OPTIMIZER, optimizer=optimizer)
    before = engine.consolidated_state_dict(rank=None)
    train_steps(engine, range(2))
    after = engine.consolidated_state_dict(rank=None)
    assert torch.equal(before["middle.weight"], after["middle.weight"])
    assert torch.equal(after["embed.weight"], after["head.weight"])
    assert not torch.equal(before["embed.weight"], after["embed.weight"])
    assert sum(len(group["params"]) for group in engine.optimizer.param_groups) == 2


def test_an_instance_over_all_parameters_steps_tied_ones_once_and_frozen_ones_never(ranks):
    ranks(2, train_tied_and_frozen)


class LaterUsed(nn.Module):
    """The second layer gets its first gradient in the second step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, step):
        x = self.first(x)
        return (self.second(x) if step else x).square().mean()


def train_what_is_used_later(params):
    engine = zero.initialize(LaterUsed(), settings(1, optimizer={"type": "SGD", "params": params}))
    plain = LaterUsed()
    optimizer = torch.optim.SGD(plain.parameters(), **params)
    for step in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x, step))
        engine.step()
        optimizer.zero_grad()
        plain(x, step).backward()
        optimizer.step()
    torch.testing.assert_close(engine.consolidated_state_dict(rank=None), dict(plain.state_dict()))


@pytest.mark.parametrize(
    "params",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "foreach": True},
        {"lr": 0.1, "momentum": 0.9},
    ],
    ids=str,
)
def test_a_parameter_may_get_its_first_gradient_later_than_others(ranks, params):
    ranks(2, train_what_is_used_later, params)
