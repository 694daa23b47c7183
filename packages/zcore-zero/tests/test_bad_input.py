"""What is wrong in a user's program is refused in one paragraph, on every rank, before it can hang or train wrongly.

Refusals on which all ranks agree are collected in one run of two ranks; where ranks differ each case is a run of its
own, with a process group whose timeout turns a hang into a failure.
"""

import pytest
import tiny_models
import torch
import torch.distributed as dist
from tiny_models import TinyModel, batch, is_paragraph, refusal, settings, train_step
from torch import nn

from zcore import zero
from zcore.core.errors import NonFiniteError
from zcore.core.mesh import build_mesh
from zcore.core.testing import RankFailed

# name of the case: (error, words that its message must hold)
REFUSALS = {
    "batch sizes that do not multiply": ("ConfigError", ["train_batch_size is 10", "2 data-parallel ranks", "is 8"]),
    "a batch smaller than the ranks": ("ConfigError", ["train_batch_size is 1,", "2 data-parallel ranks", "multiple"]),
    "an unknown section": ("ConfigError", ["zero_optimisation", "did you mean `zero_optimization`"]),
    "an unknown key": ("ConfigError", ["zero_optimization.stagee", "did you mean `stage`"]),
    "a key in another section": ("ConfigError", ["`stage` stands at the top level", "in `zero_optimization`"]),
    "a key that is not served": ("ConfigError", ["amp", "does not serve", "bf16"]),
    "a stage that does not exist": ("ConfigError", ["zero_optimization.stage is 4", "0, 1, 2 or 3"]),
    "a learning rate that nobody can settle": ("ConfigError", ["optimizer.params.lr", '"auto"', "Write a value"]),
    "a config that is a number": ("ConfigError", ["int", "path"]),
    "a misspelt optimizer": ("ConfigError", ["optimizer.type", "'AdmaW'", "Did you mean AdamW?"]),
    "an optimizer like another": ("ConfigError", ["optimizer.type", "'AdamX'", "Did you mean Adam"]),
    "an optimizer of nobody": ("ConfigError", ["optimizer.type", "'Zyx'", "AdamW", "SGD"]),
    "an optimizer of DeepSpeed": ("ConfigError", ["optimizer.type", "'OneBitAdam'", 'write "AdamW"']),
    "a misspelt optimizer argument": ("ConfigError", ["optimizer.params.weight_deca", "Did you mean weight_decay?"]),
    "an optimizer argument out of range": ("ConfigError", ["optimizer.params", "AdamW", "learning rate"]),
    "an optimizer argument in quotes": ("ConfigError", ["optimizer", "params.lr", "'3e-4'", "without quotes"]),
    "a misspelt scheduler": ("ConfigError", ["scheduler.type", "'WarmupLRR'", "Did you mean WarmupLR?"]),
    "a misspelt scheduler argument": ("ConfigError", ["scheduler.params.warmup_steps", "mean warmup_num_steps?"]),
    "a scheduler without an optimizer": ("ConfigError", ["schedule needs an optimizer"]),
    "two optimizers": ("ConfigError", ["optimizer was passed", "config has one"]),
    "two schedulers": ("ConfigError", ["schedule was passed", "config has one"]),
    "torch's Muon as a class": ("ConfigError", ["torch.optim", "Muon", "whole matrices", "Take zcore.zero.Muon"]),
    "Muon from a factory": ("ConfigError", ["flat fragments", "element-wise"]),
    "Adafactor as an instance": ("ConfigError", ["Adafactor", "whole matrices", "AdamW"]),
    "Adafactor from a factory": ("ConfigError", ["Adafactor", "whole matrices", "AdamW"]),
    "LBFGS by name": ("ConfigError", ["LBFGS", "AdamW"]),
    "states of what Init made": ("StateError", ["Adagrad", "embed.weight", "no values", "Pass the class"]),
    "parameters of another model": ("ConfigError", ["not parameters of the model", "(17, 8)"]),
    "parameters in two groups": ("ConfigError", ["head.weight", "two parameter groups"]),
    "a schedule on another optimizer": ("ConfigError", ["schedule", "another optimizer"]),
    "meta parameters without Init": ("StateError", ["embed.weight", "meta device", "zero.Init"]),
    "editing what Init made": ("StateError", ["zero.Init", "no values before"]),
    "initialize twice": ("LayoutError", ["sharded already", "embed.weight"]),
    "shard twice": ("LayoutError", ["sharded already", "embed.weight"]),
    "a mesh without a data axis": ("MeshError", ["['tp']", "build_mesh(dp=-1)"]),
    "a mesh of too many ranks": ("MeshError", ["'dp': 3", "3 ranks", "has 2", "-1"]),
    "a mesh axis of nobody": ("MeshError", ["data", "dp"]),
    "groups that do not divide the ranks": ("ConfigError", ["mics_shard_size", "3", "2"]),
    "a stage of shard that does not exist": ("ConfigError", ["stage 5", "0 (nothing sharded)"]),
    "step without backward": ("StateError", ["step()", "without a backward()", "engine.backward(loss)"]),
    "step twice": ("StateError", ["step()", "without a backward()"]),
    "backward without a graph": ("StateError", ["backward()", "without a graph", "torch.no_grad()"]),
    "backward of a vector": ("StateError", ["backward()", "one number", "(3,)", ".mean()"]),
    "backward of another loss": ("StateError", ["No trainable parameter", "engine(...)", "detach()"]),
    "backward of what was frozen since": ("StateError", ["No trainable parameter", "engine(...)"]),
    "an argument of DeepSpeed's": ("ConfigError", ["'args'", "DeepSpeed", "`config=`"]),
    "an argument of nobody's": ("ConfigError", ["'optimiser'", "It takes model, config, optimizer"]),
    "a schedule by a metric": ("ConfigError", ["ReduceLROnPlateau", "engine.optimizer", "client_state"]),
    "backward of no tensor": ("StateError", ["backward()", "one number", "float"]),
    "step without an optimizer": ("StateError", ["step()", "has none", "`optimizer`", "evaluate only"]),
    "last backward inside no_sync": ("StateError", ["no_sync()", "not reduced"]),
    "saving in mid-step": ("StateError", ["checkpoint", "after the step()"]),
    "torch's clip_grad_norm_": ("StateError", ["rank", "zero.clip_grad_norm_", "gradient_clipping"]),
    "clipping a submodule": ("StateError", ["Linear is not sharded", "submodule"]),
    "state_dict": ("StateError", ["state_dict()", "consolidated_state_dict()", "every rank"]),
    "state_dict of a submodule": ("StateError", ["state_dict()", "consolidated_state_dict()"]),
    "state_dict of a wrapper": ("StateError", ["state_dict()", "consolidated_state_dict()"]),
    "load_state_dict": ("StateError", ["load_state_dict()", "before `zero.initialize`", "load_checkpoint"]),
    "load_state_dict of a submodule": ("StateError", ["load_state_dict()", "load_checkpoint"]),
    "casting the sharded model": ("StateError", ["sharded", "before"]),
    "copying a sharded parameter": ("StateError", ["head.weight", "consolidated_state_dict()"]),
    "consolidating a plain model": ("StateError", ["Linear is not sharded", "zero.shard"]),
}

OUTSIDE_WITH_GRAD = {
    "sum": lambda weight, x: weight.sum(),
    "operator": lambda weight, x: weight * 2,
    "matmul": lambda weight, x: x @ weight.T,
    "linear": lambda weight, x: nn.functional.linear(x, weight),
    "index": lambda weight, x: weight[0],
    "norm": lambda weight, x: weight.norm(),
    "cat": lambda weight, x: torch.cat([weight, weight]),
    "view": lambda weight, x: weight.view(17, 8),
    "clone": lambda weight, x: weight.clone(),
}
OUTSIDE_WITHOUT_GRAD = {
    "matmul": lambda weight, x: x @ weight.T,
    "mm": lambda weight, x: torch.mm(x, weight),
    "linear": lambda weight, x: nn.functional.linear(x, weight),
    "embedding": lambda weight, x: nn.functional.embedding(torch.zeros(1, dtype=torch.long), weight),
    "index": lambda weight, x: weight[0],
    "einsum": lambda weight, x: torch.einsum("bi,oi->bo", x, weight),
    "norm": lambda weight, x: weight.norm(),
    "sum": lambda weight, x: weight.sum(),
}


class Root(nn.Module):
    """A model that is made of one that is sharded already."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.more = nn.Linear(2, 2)


def cases_of_config():
    def start(**changes):
        return lambda: zero.initialize(TinyModel(), settings(**changes))

    def by_name(name, **params):
        return start(optimizer={"type": name, "params": params})

    triple = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    scheduled = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    no_optimizer = settings(optimizer=None)
    return {
        "batch sizes that do not multiply": start(**triple),
        "a batch smaller than the ranks": start(train_batch_size=1, train_micro_batch_size_per_gpu=None),
        "an unknown section": start(zero_optimisation={"stage": 3}),
        "an unknown key": start(zero_optimization={"stagee": 3}),
        "a key in another section": start(stage=3),
        "a key that is not served": start(amp={"enabled": True}),
        "a stage that does not exist": start(zero_optimization={"stage": 4}),
        "a learning rate that nobody can settle": by_name("AdamW", lr="auto"),
        "a config that is a number": lambda: zero.initialize(TinyModel(), 3),
        "a misspelt optimizer": by_name("AdmaW"),
        "an optimizer like another": by_name("AdamX"),
        "an optimizer of nobody": by_name("Zyx"),
        "an optimizer of DeepSpeed": by_name("OneBitAdam"),
        "a misspelt optimizer argument": by_name("AdamW", weight_deca=0.1),
        "an optimizer argument out of range": by_name("AdamW", lr=-1.0),
        "an optimizer argument in quotes": by_name("AdamW", lr="3e-4"),
        "a misspelt scheduler": start(scheduler={"type": "WarmupLRR", "params": {}}),
        "a misspelt scheduler argument": start(scheduler={"type": "WarmupLR", "params": {"warmup_steps": 1}}),
        "a scheduler without an optimizer": start(optimizer=None, scheduler=scheduled),
        "two optimizers": lambda: zero.initialize(TinyModel(), settings(), optimizer=torch.optim.SGD),
        "two schedulers": lambda: zero.initialize(
            TinyModel(), settings(scheduler=scheduled), lr_scheduler=zero.WarmupLR
        ),
        "torch's Muon as a class": lambda: zero.initialize(TinyModel(), no_optimizer, optimizer=torch.optim.Muon),
        "Muon from a factory": lambda: zero.initialize(
            TinyModel(), no_optimizer, optimizer=lambda groups: torch.optim.Muon(groups, lr=0.1)
        ),
        "Adafactor from a factory": lambda: zero.initialize(
            TinyModel(), no_optimizer, optimizer=lambda groups: torch.optim.Adafactor(groups, lr=0.1)
        ),
        "LBFGS by name": by_name("LBFGS"),
        "groups that do not divide the ranks": start(zero_optimization={"stage": 3, "mics_shard_size": 3}),
    }


def cases_of_objects():
    bare = settings(optimizer=None)
    model, other = TinyModel(), TinyModel()

    def with_instance(make):
        def start():
            model = TinyModel()
            zero.initialize(model, bare, optimizer=make(model.parameters()))

        return start

    def states_before_sharding():
        with zero.Init():
            model = TinyModel()
        zero.initialize(model, bare, optimizer=torch.optim.Adagrad(model.parameters()))

    def with_groups(groups):
        return lambda: zero.initialize(model, settings(), model_parameters=groups)

    def other_schedule():
        optimizer = torch.optim.SGD(model.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(other.parameters()), 10)
        zero.initialize(model, bare, optimizer=optimizer, lr_scheduler=schedule)

    def on_meta():
        with torch.device("meta"):
            born = TinyModel()
        zero.initialize(born, settings())

    def edit_before_sharding():
        with zero.Init():
            born = TinyModel()
        with zero.GatheredParameters(born.head.weight, modifier_rank=0):
            raise AssertionError

    def in_mesh(**sizes):
        return lambda: zero.initialize(TinyModel(), settings(), mesh=build_mesh(**sizes))

    weight = model.head.weight
    return {
        "Adafactor as an instance": with_instance(torch.optim.Adafactor),
        "states of what Init made": states_before_sharding,
        "parameters of another model": with_groups(list(other.parameters())),
        "parameters in two groups": with_groups([{"params": [weight]}, {"params": [weight], "lr": 0.5}]),
        "a schedule on another optimizer": other_schedule,
        "meta parameters without Init": on_meta,
        "editing what Init made": edit_before_sharding,
        "a mesh without a data axis": in_mesh(tp=-1),
        "a mesh of too many ranks": in_mesh(dp=3),
        "a mesh axis of nobody": in_mesh(data=2),
        "a stage of shard that does not exist": lambda: zero.shard(TinyModel(), build_mesh(dp=-1), stage=5),
    }


def cases_of_calls():
    engine = zero.initialize(TinyModel(), settings())
    model, weight = engine.module, engine.module.head.weight
    accumulating = zero.initialize(TinyModel(), settings(gradient_accumulation_steps=2))

    def step_twice():
        train_step(engine, 0)
        engine.step()

    def step_without_an_optimizer():
        bare = zero.initialize(TinyModel(), settings(optimizer=None, gradient_accumulation_steps=2))
        for step in range(2):  # the first call has nothing to step
            assert bare.global_steps == 0 and bare.micro_steps == step
            train_step(bare, step)

    def end_inside_no_sync():
        with accumulating.no_sync():
            for step in range(2):
                accumulating.backward(accumulating(**batch(step)))
                accumulating.step()

    def save_in_mid_step():
        accumulating.save_checkpoint("nowhere")

    def without_graph():
        with torch.no_grad():
            loss = engine(**batch(0))
        engine.backward(loss)

    def backward_of_what_was_frozen_since():
        loss = engine(**batch(0))
        model.requires_grad_(False)
        try:
            engine.backward(loss)
        finally:
            model.requires_grad_(True)

    def clip_as_torch_does():
        engine.backward(engine(**batch(0)))
        try:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        finally:
            engine.step()

    return {
        "initialize twice": lambda: zero.initialize(model, settings()),
        "shard twice": lambda: zero.shard(Root(model), build_mesh(dp=-1)),
        "step without backward": engine.step,
        "step twice": step_twice,
        "backward without a graph": without_graph,
        "backward of a vector": lambda: engine.backward(torch.ones(3, requires_grad=True)),
        "backward of another loss": lambda: engine.backward(torch.ones((), requires_grad=True) * 2),
        "backward of what was frozen since": backward_of_what_was_frozen_since,
        "an argument of DeepSpeed's": lambda: zero.initialize(nn.Linear(2, 2), settings(), args=None),
        "an argument of nobody's": lambda: zero.initialize(nn.Linear(2, 2), settings(), optimiser="AdamW"),
        "a schedule by a metric": lambda: zero.initialize(
            nn.Linear(2, 2), settings(), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau
        ),
        "backward of no tensor": lambda: engine.backward(1.5),
        "step without an optimizer": step_without_an_optimizer,
        "last backward inside no_sync": end_inside_no_sync,
        "saving in mid-step": save_in_mid_step,
        "torch's clip_grad_norm_": clip_as_torch_does,
        "clipping a submodule": lambda: zero.clip_grad_norm_(model.head, 1.0),
        "state_dict": model.state_dict,
        "state_dict of a submodule": model.blocks.state_dict,
        "state_dict of a wrapper": nn.Sequential(model).state_dict,
        "load_state_dict": lambda: model.load_state_dict({}),
        "load_state_dict of a submodule": lambda: model.head.load_state_dict(nn.Linear(8, 17).state_dict()),
        "casting the sharded model": model.bfloat16,
        "copying a sharded parameter": lambda: weight.__deepcopy__({}),
        "consolidating a plain model": lambda: zero.consolidated_state_dict(nn.Linear(2, 2)),
    }


def collect_refusals():
    found = {name: refusal(act) for name, act in {**cases_of_config(), **cases_of_objects()}.items()}
    found |= {name: refusal(act) for name, act in cases_of_calls().items()}
    engine = zero.initialize(TinyModel(), settings())
    weight, x = engine.module.head.weight, torch.ones(1, 8)
    for name, act in OUTSIDE_WITH_GRAD.items():
        found[f"{name} with autograd"] = refusal(lambda act=act: act(weight, x))
    with torch.no_grad():
        for name, act in OUTSIDE_WITHOUT_GRAD.items():
            found[f"{name} without autograd"] = refusal(lambda act=act: act(weight, x))
    return found


@pytest.fixture(scope="module")
def refusals(ranks):
    return ranks(2, collect_refusals, group_timeout_s=5.0)


@pytest.mark.parametrize("case", REFUSALS)
def test_it_is_refused_in_one_paragraph(refusals, case):
    error, words = REFUSALS[case]
    message = refusals[0][case]
    assert message == refusals[1][case]
    assert message.startswith(f"{error}: ")
    assert [word for word in words if word not in message] == [], message
    assert is_paragraph(message), message


@pytest.mark.parametrize("case", [f"{name} with autograd" for name in OUTSIDE_WITH_GRAD])
def test_a_sharded_parameter_outside_forward_is_refused_by_name(refusals, case):
    message = refusals[0][case]
    assert message == refusals[1][case]
    assert message.startswith("StateError: head.weight (shape (17, 8)) is sharded")
    assert "GatheredParameters" in message
    assert is_paragraph(message)


@pytest.mark.parametrize("case", [f"{name} without autograd" for name in OUTSIDE_WITHOUT_GRAD])
def test_without_autograd_it_is_refused_as_well(refusals, case):
    message = refusals[0][case]
    assert message == refusals[1][case]
    assert message.startswith("StateError: head.weight (shape (17, 8)) is sharded")
    assert is_paragraph(message)


def test_no_refusal_is_left_to_torch(refusals):
    assert [case for case, message in refusals[0].items() if message.startswith("not ours")] == []


# Ranks that differ


class Wider(TinyModel):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 19)


class Frozen(TinyModel):
    def __init__(self):
        super().__init__()
        self.embed.weight.requires_grad_(False)


def half_model():
    return TinyModel().to(torch.bfloat16)


def longer_model():
    return TinyModel(num_blocks=3)


SHORT = {"group_timeout_s": 3.0, "deadline_s": 15.0}  # what hangs is a failure soon

# what the last rank does otherwise: (model, changes of the config, words of the message)
DIFFERENCES = {
    "a wider head": (Wider, {}, ["parameter.head.", "[17", "[19"]),
    "one more block": (longer_model, {}, ["blocks.2"]),
    "another dtype": (half_model, {}, ["parameter.", "float32", "bfloat16"]),
    "a frozen parameter": (Frozen, {}, ["parameter.embed.weight", "trainable", "frozen"]),
    "another learning rate": (
        TinyModel,
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.02}}},
        ["optimizer.params.lr", "0.01", "0.02"],
    ),
    "another optimizer": (TinyModel, {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}}, ["optimizer.type", "SGD"]),
    "no optimizer": (TinyModel, {"optimizer": None}, ["optimizer"]),
    "another stage": (TinyModel, {"zero_optimization": {"stage": 2}}, ["stage", "3", "2"]),
    "another threshold": (
        TinyModel,
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 200}},
        ["stage3_param_persistence_threshold is 16", "200"],
    ),
    "another precision": (TinyModel, {"bf16": {"enabled": True}}, ["bf16.enabled", "False", "True"]),
    "other accumulation": (TinyModel, {"gradient_accumulation_steps": 3}, ["gradient_accumulation_steps", "1", "3"]),
    "other groups": (
        TinyModel,
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 16, "mics_shard_size": 1}},
        ["mics_shard_size", "-1", "1"],
    ),
    "a batch that does not fit": (TinyModel, {"train_batch_size": 7}, ["train_batch_size", "None", "7"]),
}


def differ_in_everything():
    messages = {}
    for case, (make_model, changes, _) in DIFFERENCES.items():
        is_last = dist.get_rank() == dist.get_world_size() - 1
        model, config = (make_model(), settings(**changes)) if is_last else (TinyModel(), settings())
        messages[case] = refusal(lambda model=model, config=config: zero.initialize(model, config))
    return messages


@pytest.fixture(scope="module")
def differences(ranks):
    return ranks(2, differ_in_everything, **SHORT)


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_rank_that_differs_is_named_on_every_rank(differences, case):
    words = DIFFERENCES[case][2]
    messages = [by_case[case] for by_case in differences]
    for message in messages:
        assert message.startswith("MismatchError: "), messages
        assert [word for word in [*words, "[1]"] if word not in message] == [], message
        assert is_paragraph(message)


@pytest.mark.parametrize("case", ["a wider head", "another learning rate"])
def test_in_hybrid_sharding_a_difference_in_another_replica_is_named_on_every_rank(ranks, case):
    make_model, changes, words = DIFFERENCES[case]
    messages = ranks(4, differ_in_a_mesh, make_model, changes, **SHORT)
    for message in messages:
        assert message.startswith("MismatchError: "), messages
        assert [word for word in [*words, "[3]"] if word not in message] == [], message


def differ_in_a_mesh(make_model, changes):
    is_last = dist.get_rank() == dist.get_world_size() - 1
    mesh = build_mesh(dp_replicate=2, dp_shard=2)
    model = make_model() if is_last else TinyModel()
    config = settings(**(changes if is_last else {}))
    return refusal(lambda: zero.initialize(model, config, mesh=mesh))


def differ_in_objects(what):
    """Optimizers and groups that are passed as objects are not in the config, yet every rank must have the same."""
    is_last = dist.get_rank() == 1
    model = TinyModel()
    if what == "optimizer":
        source = torch.optim.SGD if is_last else torch.optim.AdamW
        return refusal(lambda: zero.initialize(model, settings(optimizer=None), optimizer=source))
    decayed = [param for name, param in model.named_parameters() if name.endswith("weight") != is_last]
    rest = [param for name, param in model.named_parameters() if name.endswith("weight") == is_last]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest}]
    return refusal(lambda: zero.initialize(model, settings(), model_parameters=groups))


@pytest.mark.parametrize("what", ["optimizer", "groups"])
def test_objects_that_differ_between_ranks_are_named_as_well(ranks, what):
    for message in ranks(2, differ_in_objects, what, **SHORT):
        assert message.startswith("MismatchError: "), message


def start_from(paths):
    zero.initialize(TinyModel(), paths[dist.get_rank()])


@pytest.mark.parametrize("text", [None, "{", '{"zero_optimization": {"stage": 4}}'])
def test_a_config_that_one_rank_cannot_read_ends_every_rank(ranks, tmp_path, text):
    sound, broken = tmp_path / "sound.json", tmp_path / "broken.json"
    sound.write_text("{}")
    if text is not None:
        broken.write_text(text)
    with pytest.raises(RankFailed) as caught:
        ranks(2, start_from, [sound, broken], **SHORT)
    other, reader = caught.value.failures
    assert (reader.type_name, other.type_name) == ("ConfigError", "CollectiveError")
    assert "broken.json" in reader.message
    assert "first error in the other ranks' output" in other.message


def shard_with_a_difference():
    model = Wider() if dist.get_rank() == 1 else TinyModel()
    return refusal(lambda: zero.shard(model, build_mesh(dp=-1), options=zero.ShardingOptions(small_numel=16)))


def test_shard_names_a_rank_that_differs_as_initialize_does(ranks):
    for message in ranks(2, shard_with_a_difference, **SHORT):
        assert message.startswith("MismatchError: ")
        assert "parameter.head." in message


# What is not finite


class Poisoned(TinyModel):
    """A model whose loss, or the gradient of whose head alone, is multiplied by `factor`."""

    def __init__(self):
        super().__init__()
        self.factor, self.where = 1.0, "loss"

    def forward(self, tokens, targets):
        loss = super().forward(tokens, targets)
        if self.where == "loss":
            return loss * self.factor
        return loss + 0.0 * loss.detach() if self.factor == 1.0 else _scale_gradient(loss, self.factor)


def _scale_gradient(loss, factor):
    held = loss.clone()
    held.register_hook(lambda grad: grad * factor)
    return held


def digest(engine):
    return tiny_models.digest(engine, without=("counters",))  # a refused step counts its micro-batches


def meet_a_bad_loss(zero_stage, changes, factor, where):
    """Two good steps, one that is bad on rank 1 only, two good ones; and the same without the bad one."""
    kept = []
    for has_bad_step in (True, False):
        engine = zero.initialize(Poisoned(), settings(zero_stage, **changes))
        steps = range(engine.config.gradient_accumulation_steps)

        def optimizer_step(number, engine=engine, steps=steps):
            for micro_step in steps:
                engine.backward(engine(**batch(10 * number + micro_step)))
                engine.step()

        optimizer_step(1)
        optimizer_step(2)
        before = digest(engine)
        message, norm = None, engine.get_global_grad_norm()
        if has_bad_step:
            engine.module.num_forwards -= len(steps)
            engine.module.where = where
            engine.module.factor = factor if dist.get_rank() == 1 else 1.0
            message = refusal(lambda: optimizer_step(3))
            engine.module.factor = 1.0
            assert digest(engine) == before
            assert (engine.global_steps, engine.skipped_steps) == (2, 1)
            assert engine.get_global_grad_norm() == norm
        optimizer_step(4)
        optimizer_step(5)
        kept.append((digest(engine), engine.global_steps, message))
    (with_bad, steps_with_bad, message), (without, steps_without, _) = kept
    assert steps_with_bad == steps_without == 4
    assert with_bad == without
    return message


SCHEDULED = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.1}}}


NOT_FINITE = {
    "nan loss": (0, {}, float("nan"), "loss"),
    "infinite loss": (1, {"gradient_clipping": 0.1}, float("inf"), "loss"),
    "nan loss of a micro-batch": (2, {"gradient_accumulation_steps": 2}, float("nan"), "loss"),
    "nan loss with a schedule": (3, {**SCHEDULED, "gradient_clipping": 0.1}, float("nan"), "loss"),
    "nan gradient in bf16": (3, {"bf16": {"enabled": True}}, float("nan"), "gradient"),
    "infinite gradient": (1, {}, float("inf"), "gradient"),
}


def meet_everything_bad():
    return {name: meet_a_bad_loss(*case) for name, case in NOT_FINITE.items()}


def test_a_step_that_is_not_finite_on_one_rank_is_refused_on_all_and_leaves_no_trace(ranks):
    messages = [
        (NOT_FINITE[name][3], each) for by_name in ranks(2, meet_everything_bad) for name, each in by_name.items()
    ]
    for where, message in messages:
        assert message.startswith(f"{NonFiniteError.__name__}: In optimizer step 3, "), message
        assert ("data ranks [1]" if where == "loss" else "norm of the gradients") in message
        assert "as before it" in message
        assert "catch" in message
        assert is_paragraph(message)


def names_of_deepspeed():
    engine = zero.initialize(TinyModel(), settings())
    said = []
    for name in ("train_batch_size", "set_lr", "nothing_like_it"):
        with pytest.raises(AttributeError) as caught:
            getattr(engine, name)
        said.append(str(caught.value))
    return said


def test_names_of_deepspeeds_engine_say_what_to_write(ranks):
    of_config, of_optimizer, unknown = ranks(1, names_of_deepspeed)[0]
    assert of_config.endswith("'train_batch_size', as DeepSpeed's has: write engine.config.train_batch_size.")
    assert "engine.optimizer.param_groups" in of_optimizer
    assert unknown == "zcore's Engine has no attribute 'nothing_like_it'."
