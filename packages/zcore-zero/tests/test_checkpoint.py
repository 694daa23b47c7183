"""Save, load, continue: the same bits as the run that was never interrupted, or an error before anything changed."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import TinyModel, batch, digest, is_paragraph, refusal, settings, train_step, train_steps
from torch import nn

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.core.testing import RankFailed
from zcore.zero import checkpoints

SCHEDULED = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}}}


def noisy_model(seed=0):
    return TinyModel(seed=seed, dropout=0.3)


def start(zero_stage=3, *, model=None, mesh_sizes=None, **changes):
    mesh = build_mesh(**mesh_sizes) if mesh_sizes else None
    return zero.initialize(model or noisy_model(), settings(zero_stage, **changes), mesh=mesh)


def for_each(cases, act, *args):
    """Several cases in one run of the ranks: starting ranks costs more than training a tiny model."""
    for case in cases:
        try:
            act(*case, *args)
        except BaseException as error:
            error.add_note(f"in the case {case}")
            raise


def draws():
    """One number of each generator that a run may use."""
    return torch.rand(()).item(), random.random()


def continue_or_interrupt(zero_stage, changes, mesh_sizes, parent):
    """Six steps in one go; and three, a checkpoint, three more in an engine that starts from other values."""
    folder = parent / f"{zero_stage} {len(str(changes))}"
    changes = {**SCHEDULED, "gradient_clipping": 0.5, **changes}
    micro_steps = changes.get("gradient_accumulation_steps", 1)
    first, second = range(3 * micro_steps), range(3 * micro_steps, 6 * micro_steps)
    random.seed(dist.get_rank())
    engine = start(zero_stage, mesh_sizes=mesh_sizes, **changes)
    torch.manual_seed(100 + dist.get_rank())
    losses = train_steps(engine, first)
    path = engine.save_checkpoint(folder, client_state={"epoch": 1, "rank": dist.get_rank()})
    losses += train_steps(engine, second)
    uninterrupted = losses, digest(engine), draws()

    random.seed(0)
    engine = start(zero_stage, model=noisy_model(seed=5), mesh_sizes=mesh_sizes, **changes)
    train_steps(engine, range(2 * micro_steps))  # what it did before is forgotten
    client_state = engine.load_checkpoint(folder)
    assert client_state == {"epoch": 1, "rank": dist.get_rank()}
    assert engine.global_steps == 3
    continued = [*losses[: len(first)], *train_steps(engine, second)], digest(engine), draws()
    assert continued == uninterrupted
    data = [f"rank_{rank:05d}.{kind}" for rank in range(dist.get_world_size()) for kind in ("json", "safetensors")]
    assert sorted(each.name for each in path.iterdir()) == sorted(["manifest.json", *data])
    assert (folder / "latest").read_text().strip() == "global_step3"
    assert sorted(each.name for each in folder.iterdir()) == ["global_step3", "latest"]  # nothing half-done stays


BF16 = {"bf16": {"enabled": True}}
ACCUMULATED = {"gradient_accumulation_steps": 2}
OPTIMIZERS = [
    {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    {"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False, "amsgrad": True}},
    {"type": "RAdam", "params": {"lr": 0.01}},
]
CONTINUED = {
    "fp32": [(0, {}, None), (1, ACCUMULATED, None), (2, {}, None), (3, ACCUMULATED, None)],
    "bf16": [(zero_stage, BF16, None) for zero_stage in range(4)],
    "other optimizers": [(3 - index, {"optimizer": each}, None) for index, each in enumerate(OPTIMIZERS)],
}


@pytest.mark.parametrize("kind", CONTINUED)
def test_a_run_that_continues_is_bit_equal_to_one_that_was_not_interrupted(ranks, tmp_path, kind):
    ranks(2, for_each, CONTINUED[kind], continue_or_interrupt, tmp_path)


def test_a_hybrid_run_continues_bit_equal_too(ranks, tmp_path):
    ranks(4, for_each, [(3, {}, {"dp_replicate": 2, "dp_shard": 2})], continue_or_interrupt, tmp_path)


# What else a run may be made of


def make_milestones(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.1)


def make_one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def make_sequence(optimizer):
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[2])


def make_lambda(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def resume_with_a_schedule(make, parent):
    folder = parent / make.__name__
    engine = start_with_schedule(make)
    train_steps(engine, range(1))
    engine.save_checkpoint(folder)
    rates = [engine.get_lr() for step in range(1, 6) if train_step(engine, step) or True]
    resumed = start_with_schedule(make)
    resumed.load_checkpoint(folder)
    resumed_rates = [resumed.get_lr() for step in range(1, 6) if train_step(resumed, step) or True]
    assert resumed_rates == rates
    assert digest(resumed) == digest(engine)


def start_with_schedule(make):
    return zero.initialize(TinyModel(), settings(), lr_scheduler=make)


def test_any_schedule_of_torch_resumes_where_it_was(ranks, tmp_path):
    cases = [(make,) for make in (make_one_cycle, make_sequence, make_lambda, make_milestones)]
    ranks(2, for_each, cases, resume_with_a_schedule, tmp_path)


def start_with_groups(lrs=(0.1, 0.01), make=torch.optim.AdamW):
    model = noisy_model()
    matrices = [param for param in model.parameters() if param.dim() > 1]
    rest = [param for param in model.parameters() if param.dim() <= 1]
    groups = [{"params": each, "lr": lr} for each, lr in zip((matrices, rest), lrs, strict=False)]
    if len(lrs) == 1:
        groups = [{"params": [*matrices, *rest], "lr": lrs[0]}]
    return zero.initialize(model, settings(optimizer=None), optimizer=make, model_parameters=groups)


def resume_with_groups(folder):
    engine = start_with_groups()
    train_steps(engine, range(2))
    engine.optimizer.param_groups[1]["lr"] = 0.05  # by hand, as a user may
    engine.save_checkpoint(folder)
    train_steps(engine, range(2, 4))
    resumed = start_with_groups()
    resumed.load_checkpoint(folder)
    assert resumed.get_lr() == [0.1, 0.05]
    train_steps(resumed, range(2, 4))
    assert digest(resumed) == digest(engine)


def test_parameter_groups_come_back_with_what_was_set_by_hand(ranks, tmp_path):
    ranks(2, resume_with_groups, tmp_path)


def save_twice_and_choose(folder):
    engine = start()
    digests = {}
    for step in range(3):
        train_step(engine, step)
        engine.save_checkpoint(folder, tag="best" if step == 1 else None)
        digests[step] = digest(engine)
    engine.save_checkpoint(folder)  # over the same tag
    for tag, step in (("global_step1", 0), ("best", 1), (None, 2)):
        engine.load_checkpoint(folder, tag)
        assert digest(engine) == digests[step]


def test_tags_are_kept_apart_and_the_newest_is_the_default(ranks, tmp_path):
    ranks(2, save_twice_and_choose, tmp_path)
    assert (tmp_path / "latest").read_text().strip() == "global_step3"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["best", "global_step1", "global_step3", "latest"]


def save_without_an_optimizer(folder):
    engine = start(optimizer=None)
    engine.save_checkpoint(folder)
    before = digest(engine)
    other = start(optimizer=None, model=noisy_model(seed=3))
    assert digest(other) != before
    other.load_checkpoint(folder)
    assert digest(other) == before


def test_an_engine_that_only_evaluates_saves_and_loads(ranks, tmp_path):
    ranks(2, save_without_an_optimizer, tmp_path)


def evaluate_what_was_trained(folder):
    trained = start()
    train_step(trained, 0)
    trained.save_checkpoint(folder)
    evaluated = start(optimizer=None, model=noisy_model(seed=3))
    evaluated.load_checkpoint(folder)
    with torch.no_grad():
        assert torch.equal(evaluated.eval()(**batch(1)), trained.eval()(**batch(1)))


def test_an_engine_without_an_optimizer_evaluates_what_another_trained(ranks, tmp_path):
    ranks(2, evaluate_what_was_trained, tmp_path)


def test_files_are_what_json_and_safetensors_read(ranks, tmp_path):
    ranks(2, save_once, tmp_path, 3)
    folder = tmp_path / "global_step1"
    for path in folder.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    from safetensors.torch import load_file

    names = {name.split("/")[0] for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert names == {"master", "optimizer", "buffer", "random"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def save_once(folder, zero_stage, mesh_sizes=None):
    engine = start(zero_stage, mesh_sizes=mesh_sizes, **SCHEDULED)
    train_step(engine, 0)
    engine.save_checkpoint(folder)


# What cannot be loaded


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ranks(2, save_once, folder, 3)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def lose_a_key(path):
    content = json.loads(path.read_text())
    del content["files"]
    path.write_text(json.dumps(content))


def become_a_list(path):
    path.write_text("[]")


# name: (file, damage, words of the message where it is met)
DAMAGES = {
    "a cut tensor file": ("rank_00001.safetensors", cut, ["rank_00001.safetensors", "SHA-256"]),
    "a flipped bit in a tensor file": ("rank_00000.safetensors", flip, ["rank_00000.safetensors", "SHA-256"]),
    "a flipped bit in a JSON file": ("rank_00001.json", flip, ["rank_00001.json", "SHA-256"]),
    "a missing tensor file": ("rank_00001.safetensors", remove, ["rank_00001.safetensors"]),
    "an empty tensor file": ("rank_00000.safetensors", empty, ["rank_00000.safetensors", "SHA-256"]),
    "a missing manifest": ("manifest.json", remove, ["no complete checkpoint", "manifest.json"]),
    "a cut manifest": ("manifest.json", cut, ["manifest.json"]),
    "an empty manifest": ("manifest.json", empty, ["manifest.json"]),
    "a manifest without its files": ("manifest.json", lose_a_key, ["manifest.json"]),
    "a manifest of another form": ("manifest.json", become_a_list, ["manifest.json"]),
}


def damage(folder, case):
    name, act, _ = DAMAGES[case]
    act(folder / "global_step1" / name)


def load_what_is_damaged(folders):
    engine = start(**SCHEDULED)
    train_step(engine, 5)
    before, state = digest(engine), torch.get_rng_state()
    messages = {case: refusal(lambda folder=folder: engine.load_checkpoint(folder)) for case, folder in folders.items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(engine) == before
    train_step(engine, 6)  # and it goes on
    return messages


@pytest.fixture(scope="module")
def damaged(ranks, saved, tmp_path_factory):
    folders = {}
    for number, case in enumerate(DAMAGES):
        folders[case] = tmp_path_factory.mktemp("damaged") / str(number)
        shutil.copytree(saved, folders[case])
        damage(folders[case], case)
    folders["nothing"] = tmp_path_factory.mktemp("nothing")
    return ranks(2, load_what_is_damaged, folders, group_timeout_s=5.0)


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_on_every_rank_before_anything_changes(damaged, case):
    messages = [by_case[case] for by_case in damaged]
    for message in messages:
        assert message.startswith("CheckpointError: "), messages
        assert is_paragraph(message), message
    assert any(all(word in message for word in DAMAGES[case][2]) for message in messages), messages


def test_a_folder_without_a_checkpoint_says_so(damaged):
    for by_case in damaged:
        assert "has no complete checkpoint" in by_case["nothing"]


class OtherBuffer(TinyModel):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_forwards", torch.zeros(3))


class OneBufferMore(TinyModel):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(2))


class OtherHead(TinyModel):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 19)


def cases_of_other_runs(folder):
    def load(**changes):
        engine = start(**{**SCHEDULED, **changes})
        return load_into(engine)

    def load_into(engine):
        train_step(engine, 1)
        before = digest(engine)
        message = refusal(lambda: engine.load_checkpoint(folder))
        return message, digest(engine) == before

    half = TinyModel().to(torch.bfloat16)
    return {
        "another stage": load(zero_stage=2),
        "another model": load(model=OtherHead()),
        "another buffer": load(model=OtherBuffer()),
        "one buffer more": load(model=OneBufferMore()),
        "one block more": load(model=TinyModel(num_blocks=3)),
        "another dtype": load(model=half),
        "another optimizer": load(optimizer={"type": "SGD", "params": {"lr": 0.1}}),
        "a checkpoint without an optimizer": load_what_never_trained(folder.parent / "untrained"),
        "no schedule": load(scheduler=None),
        "another schedule": load(scheduler={"type": "StepLR", "params": {"step_size": 3}}),
        "more groups": load_into(start_with_groups()),
        "another threshold": load(zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 200}),
    }


def load_what_never_trained(folder):
    start(optimizer=None).save_checkpoint(folder)
    engine = start()
    before = digest(engine)
    return refusal(lambda: engine.load_checkpoint(folder)), digest(engine) == before


@pytest.fixture(scope="module")
def others(ranks, saved):
    return ranks(2, cases_of_other_runs, saved, group_timeout_s=5.0)


OTHERS = {
    "another stage": ["ZeRO stage 3", "2"],
    "another model": ["parameters"],
    "another buffer": ["num_forwards"],
    "one buffer more": ["buffer/scale"],
    "one block more": ["parameters"],
    "another dtype": ["bfloat16"],
    "another optimizer": ["AdamW", "SGD"],
    "a checkpoint without an optimizer": ["optimizer"],
    "no schedule": ["WarmupCosineLR"],
    "another schedule": ["WarmupCosineLR", "StepLR"],
    "more groups": ["parameter groups", "1", "2"],
    "another threshold": ["layout"],
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(others, case):
    for by_case in others:
        message, is_unchanged = by_case[case]
        assert message.startswith("CheckpointError: "), message
        assert is_unchanged
        assert [word for word in OTHERS[case] if word not in message] == [], message
        assert is_paragraph(message)


@pytest.mark.parametrize(("world_size", "mesh_sizes"), [(1, None), (3, None), (2, {"dp_replicate": 2, "dp_shard": 1})])
def test_another_number_or_grouping_of_ranks_is_refused(ranks, saved, world_size, mesh_sizes):
    for message in ranks(world_size, load_in_another_world, saved, mesh_sizes):
        assert message.startswith("CheckpointError: ")
        words = ["data-parallel ranks 2", f"has {world_size}"] if world_size != 2 else ["share one copy 2", "has 1"]
        assert [word for word in words if word not in message] == [], message


def load_in_another_world(folder, mesh_sizes):
    engine = start(mesh_sizes=mesh_sizes)
    return refusal(lambda: engine.load_checkpoint(folder))


# What cannot be saved


def save_what_is_wrong(folder):
    engine = start()
    train_step(engine, 0)
    engine.save_checkpoint(folder, tag="good")
    before = digest(engine)
    is_first = dist.get_rank() == 0
    blocked = folder / "blocked"
    if is_first:
        blocked.write_text("a file where a folder should be")
    dist.barrier()
    messages = {
        "a set": refusal(lambda: engine.save_checkpoint(folder, client_state={"seen": {1, 2}})),
        "a tensor on one rank": refusal(
            lambda: engine.save_checkpoint(folder, client_state={"t": torch.ones(1)} if is_first else None)
        ),
        "a folder that cannot be made": refusal(lambda: engine.save_checkpoint(blocked / "inside")),
        "a tag that is a path": refusal(lambda: engine.save_checkpoint(folder, tag="../outside")),
        "a hidden tag": refusal(lambda: engine.save_checkpoint(folder, tag=".hidden")),
        "tags that differ": refusal(lambda: engine.save_checkpoint(folder, tag=f"rank{dist.get_rank()}")),
    }
    assert digest(engine) == before
    engine.load_checkpoint(folder)
    assert digest(engine) == before
    return messages


def test_a_save_that_fails_is_an_error_on_every_rank_and_the_last_checkpoint_stays(ranks, tmp_path):
    both = ranks(2, save_what_is_wrong, tmp_path, group_timeout_s=5.0)
    for messages in both:
        for case, message in messages.items():
            assert message.startswith("CheckpointError: "), (case, message)
            assert is_paragraph(message), (case, message)
    assert "client_state" in both[0]["a set"]
    assert "ranks [0]" in both[1]["a tensor on one rank"]
    assert (tmp_path / "latest").read_text().strip() == "good"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["blocked", "good", "latest"]


def save_numbered(folder):
    engine = start()
    message = refusal(lambda: engine.save_checkpoint(folder, client_state={"seen": {1: "one"}}))
    return message if message.startswith("CheckpointError") else engine.load_checkpoint(folder)


def test_client_state_comes_back_as_it_was_or_is_refused(ranks, tmp_path):
    for outcome in ranks(2, save_numbered, tmp_path):
        assert outcome == {"seen": {1: "one"}} or str(outcome).startswith("CheckpointError: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_on_every_rank(ranks, tmp_path):
    tmp_path.chmod(0o500)
    for message in ranks(2, save_into, tmp_path):
        assert message.startswith("CheckpointError: ")


def save_into(folder):
    engine = start()
    return refusal(lambda: engine.save_checkpoint(folder))


# A rank that dies while it saves

DEATHS = {
    "before the tensors": (1, checkpoints, "save_file"),
    "between its files": (1, checkpoints, "_write_json"),
    "while it hashes": (0, checkpoints, "_fingerprint"),
    "before the rename": (0, Path, "rename"),
    "before latest is moved": (0, Path, "replace"),
}


def die_while_saving(folder, case):
    victim, owner, name = DEATHS[case]
    engine = start()
    train_step(engine, 0)
    engine.save_checkpoint(folder)
    before = digest(engine)
    if dist.get_rank() == 0:
        (folder / "digest").write_text(before)
    train_step(engine, 1)
    if dist.get_rank() == victim:
        setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    engine.save_checkpoint(folder)


def load_after_a_death(folder):
    engine = start(model=noisy_model(seed=9))
    engine.load_checkpoint(folder)
    if dist.get_rank() == 0:
        assert digest(engine) == (folder / "digest").read_text()
    train_step(engine, 1)
    engine.save_checkpoint(folder)  # what the dead one left is in nobody's way
    return engine.global_steps


@pytest.mark.parametrize("case", DEATHS)
def test_a_rank_that_dies_in_mid_save_leaves_the_previous_checkpoint(ranks, tmp_path, case):
    with pytest.raises(RankFailed) as caught:
        ranks(2, die_while_saving, tmp_path, case)
    victim = DEATHS[case][0]
    died, survivor = caught.value.failures[victim], caught.value.failures[1 - victim]
    assert (died.type_name, survivor.type_name) == ("Died", "CollectiveError")
    assert (tmp_path / "latest").read_text().strip() == "global_step1"
    assert ranks(2, load_after_a_death, tmp_path) == [2, 2]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["digest", "global_step1", "global_step2", "latest"]


def die_while_replacing(folder):
    engine = start()
    engine.save_checkpoint(folder, tag="last")
    train_step(engine, 0)
    if dist.get_rank() == 0:
        rename = Path.rename

        def rename_once(self, target):
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = rename_once
    engine.save_checkpoint(folder, tag="last")


def load_latest(folder):
    engine = start()
    engine.load_checkpoint(folder)
    return engine.global_steps


def test_a_rank_that_dies_while_a_tag_is_written_over_loses_neither(ranks, tmp_path):
    with pytest.raises(RankFailed):
        ranks(2, die_while_replacing, tmp_path)
    assert set(ranks(2, load_latest, tmp_path)) <= {0, 1}
