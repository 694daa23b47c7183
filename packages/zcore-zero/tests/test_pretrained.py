"""`zero.load_pretrained`: weights of files go into a model of any kind, or nothing is changed and names are told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import TinyModel, is_paragraph, refusal, settings, train_step
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import CheckpointError
from zcore.core.mesh import build_mesh
from zcore.zero.weight_files import find_weights

Ranks = Callable[..., Any]


def weights() -> dict[str, Tensor]:
    model = TinyModel(seed=3)
    model.num_forwards += 5
    return model.state_dict()


def write_index(folder: Path, tensors: dict[str, Tensor], num_files: int) -> None:
    """The tensors in turn in several files, and their index."""
    names = list(tensors)
    files = {f"model-{part + 1:05}-of-{num_files:05}.safetensors": names[part::num_files] for part in range(num_files)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def wrong_after_loading(path: Path, expected: dict[str, Tensor]) -> list[str]:
    """Every kind of model, every stage: what differs from the files."""
    mesh = build_mesh(dp=-1)
    options = zero.ShardingOptions(small_numel=20, precision=zero.Precision(torch.bfloat16))
    wrong = []
    for stage in range(4):
        for how in ("inside Init", "after Init", "plain", "sharded"):
            with zero.Init(enabled="Init" in how):
                model = TinyModel(seed=dist.get_rank())
                if how == "inside Init":
                    zero.load_pretrained(model, path)
            if how in ("after Init", "plain"):
                zero.load_pretrained(model, path)
            zero.shard(model, mesh, stage=stage, options=options)
            if how == "sharded":
                found = zero.load_pretrained(model, path)
                assert set(found.loaded_keys) == set(expected)
            whole = zero.consolidated_state_dict(model, rank=None)
            wrong += [
                f"{how}, stage {stage}: {name}" for name in expected if not torch.equal(whole[name], expected[name])
            ]
    return wrong


def test_every_kind_of_model_has_the_weights_of_the_files_in_every_stage(ranks: Ranks, tmp_path: Path) -> None:
    write_index(tmp_path, weights(), num_files=3)
    assert ranks(2, wrong_after_loading, tmp_path, weights()) == [[], []]


def losses_after_loading(path: Path, is_loaded_late: bool) -> list[float]:
    model = TinyModel(seed=dist.get_rank())
    if not is_loaded_late:
        zero.load_pretrained(model, path)
    engine = zero.initialize(model, settings(zero_stage=3))
    if is_loaded_late:
        engine.eval()(tokens=torch.zeros(1, 5, dtype=torch.long), targets=torch.zeros(1, 5, dtype=torch.long))
        zero.load_pretrained(engine.train(), path)  # what evaluation had gathered is out of date now
    return [train_step(engine, step) for step in range(3)]


def losses_in_both_orders(path: Path) -> tuple[list[float], list[float]]:
    return losses_after_loading(path, False), losses_after_loading(path, True)


def test_an_engine_trains_alike_whether_weights_came_before_or_after(ranks: Ranks, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    for before, after in ranks(2, losses_in_both_orders, tmp_path):
        assert before == after


def refusals_on_ranks(folder: Path) -> list[str]:
    rank = dist.get_rank()
    engine = zero.initialize(TinyModel(), settings(zero_stage=3))
    before = engine.consolidated_state_dict()
    told = [
        refusal(lambda: zero.load_pretrained(engine, folder / "none")),
        refusal(lambda: zero.load_pretrained(engine, folder / ("whole" if rank == 0 else "none"))),
        refusal(lambda: zero.load_pretrained(engine, folder / "renamed")),
    ]
    with zero.GatheredParameters(engine.module.head.weight):
        told.append(refusal(lambda: zero.load_pretrained(engine, folder / "whole")))
    after = engine.consolidated_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return told


def test_all_ranks_are_refused_alike_and_nothing_is_changed(ranks: Ranks, tmp_path: Path) -> None:
    for name in ("whole", "renamed"):
        (tmp_path / name).mkdir()
        prefix = "model." if name == "renamed" else ""
        save_file({prefix + key: value for key, value in weights().items()}, tmp_path / name / "model.safetensors")
    first, second = ranks(2, refusals_on_ranks, tmp_path)
    missing, uneven, renamed, gathered = first
    assert all(is_paragraph(each) for each in (*first, *second))
    assert missing.startswith("CheckpointError")
    assert uneven.startswith("MismatchError")
    assert "Ranks [1]" in uneven
    assert "start with 'model.'" in renamed
    assert gathered.startswith("StateError")
    assert [missing, renamed, gathered] == [second[0], second[2], second[3]]


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda held: without(held, "head.bias"), "1 missing: head.bias."),
    "unexpected": (lambda held: {**held, "extra": torch.zeros(2)}, "1 unexpected: extra."),
    "another shape": (
        lambda held: {**held, "head.bias": torch.zeros(3)},
        r"1 mismatched: head.bias is \[3\] and the model's \[17\]",
    ),
    "another kind of number": (
        lambda held: {**held, "head.bias": torch.zeros(17, dtype=torch.int32)},
        "head.bias is torch.int32 and the model's torch.float32",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("is_deferred", [False, True])
def test_what_does_not_fit_is_refused_by_name_or_reported(tmp_path: Path, name: str, is_deferred: bool) -> None:
    change, message = MISFITS[name]
    save_file(change(weights()), tmp_path / "model.safetensors")
    with zero.Init(enabled=is_deferred):
        model = TinyModel()
    with pytest.raises(CheckpointError, match=message) as refused:
        zero.load_pretrained(model, tmp_path)
    assert is_paragraph(str(refused.value))
    plain = TinyModel()
    found = zero.load_pretrained(plain, tmp_path, strict=False)
    reported = (*found.missing_keys, *found.unexpected_keys, *found.mismatched_keys)
    assert reported == (("extra",) if name == "unexpected" else ("head.bias",))
    kept = TinyModel().head.bias if name != "unexpected" else weights()["head.bias"]
    assert torch.equal(plain.head.bias, kept)
    assert torch.equal(plain.embed.weight, weights()["embed.weight"])


def test_names_of_the_files_can_be_translated(tmp_path: Path) -> None:
    save_file({f"model.{name}": value for name, value in weights().items()}, tmp_path / "any-name.safetensors")
    model = TinyModel()
    zero.load_pretrained(model, tmp_path, rename=lambda name: name.removeprefix("model."))
    assert all(torch.equal(value, weights()[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="`rename` makes 'same' of both"):
        zero.load_pretrained(model, tmp_path, rename=lambda name: "same")


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is the only rank, and none at all afterwards."""
    zero.init_distributed()
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_values_are_cast_to_the_dtypes_of_the_model(tmp_path: Path) -> None:
    save_file({name: value.double() / 3 for name, value in weights().items()}, tmp_path / "model.safetensors")
    with zero.Init():
        model = TinyModel().to(torch.bfloat16)
    zero.load_pretrained(model, tmp_path)
    zero.shard(model, build_mesh(dp=-1))
    found = zero.consolidated_state_dict(model)
    for name, value in weights().items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], (value.double() / 3).to(torch.bfloat16)), name


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stored", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
@pytest.mark.parametrize("is_deferred", [False, True])
def test_a_tied_parameter_is_found_under_any_of_its_names(tmp_path: Path, stored: list[str], is_deferred: bool) -> None:
    value = torch.rand(6, 4)
    save_file({name: value.clone() for name in stored}, tmp_path / "model.safetensors")
    with zero.Init(enabled=is_deferred):
        model = Tied()
    zero.load_pretrained(model, tmp_path)
    zero.shard(model, build_mesh(dp=-1))
    found = zero.consolidated_state_dict(model)
    assert torch.equal(found["embed.weight"], value)
    assert torch.equal(found["head.weight"], value)


def test_different_values_for_the_names_of_a_tied_parameter_are_refused(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.rand(6, 4), "head.weight": torch.rand(6, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one tied parameter in this Tied"):
        zero.load_pretrained(Tied(), tmp_path)


# Folders that cannot be loaded.


def empty(folder: Path) -> Path:
    return folder


def of_pickles(folder: Path) -> Path:
    torch.save(weights(), folder / "pytorch_model.bin")
    return folder


def of_a_pickle(folder: Path) -> Path:
    return of_pickles(folder) / "pytorch_model.bin"


def of_two_models(folder: Path) -> Path:
    for name in ("a", "b"):
        save_file(weights(), folder / f"{name}.safetensors")
    return folder


def cut_short(folder: Path) -> Path:
    save_file(weights(), folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5])
    return folder / "model.safetensors"


def without_a_file(folder: Path) -> Path:
    write_index(folder, weights(), num_files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def of_another_index(folder: Path) -> Path:
    write_index(folder, weights(), num_files=2)
    save_file({"embed.weight": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    return folder


def with_a_broken_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return folder


def quantised(folder: Path) -> Path:
    save_file({"weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}, folder / "model.safetensors")
    return folder


REFUSED: dict[Callable[[Path], Path], str] = {
    empty: "has no safetensors file; it holds nothing",
    of_pickles: r"it holds pytorch_model\.bin\. Weights are streamed from safetensors only",
    of_a_pickle: r"pytorch_model\.bin is no safetensors file, but by its name one of torch\.save",
    of_two_models: r"has 2 files that end with \.safetensors \(a\.safetensors, b\.safetensors\)",
    cut_short: "damaged or not whole",
    without_a_file: r"00002-of-00002\.safetensors cannot be read: No such file",
    of_another_index: "has no tensor of that name",
    with_a_broken_index: "cannot be read as an index of weights",
    quantised: "is stored as F8_E4M3, a quantised or unusual format",
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda each: each.__name__)
def test_a_folder_that_cannot_be_loaded_is_refused_with_what_to_do(
    tmp_path: Path, prepare: Callable[[Path], Path]
) -> None:
    with pytest.raises(CheckpointError, match=REFUSED[prepare]) as refused:
        find_weights(prepare(tmp_path))
    assert is_paragraph(str(refused.value))


def test_a_folder_with_an_index_is_read_by_it_whatever_else_it_holds(tmp_path: Path) -> None:
    write_index(tmp_path, weights(), num_files=2)
    save_file({"adapter": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    assert set(find_weights(tmp_path)) == set(weights())
    assert torch.equal(find_weights(tmp_path)["head.bias"].read(), weights()["head.bias"])
