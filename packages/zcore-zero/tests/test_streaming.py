"""Weights of safetensors files that are loaded inside `zero.Init` are those of plain loading, and nobody holds them."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel, refusal
from torch import Tensor, nn

from zcore import zero
from zcore.core.mesh import build_mesh
from zcore.zero.deferred import recording_of
from zcore.zero.sharding import sharding_of

Ranks = Callable[..., Any]
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by all their names, and buffers, those that are not persistent too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The same of a model of zero.Init, each materialised by itself."""
    return {
        name: recording_of(model, tensor, name).materialize(tensor) if tensor.is_meta else tensor
        for name, tensor in tensors_of(model).items()
    }


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names that one has and the other has not, or with another dtype, shape or bit."""
    wrong = [name for name in {**found, **expected} if (name in found) != (name in expected)]
    return wrong + [
        name
        for name, value in expected.items()
        if name in found and (found[name].dtype != value.dtype or not torch.equal(found[name], value))
    ]


def ties_of(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return [each for each in names.values() if len(each) > 1]


# Models of transformers, as their users load them.


def save_models(folder: Path) -> None:
    """One folder for each kind of checkpoint."""
    import transformers as hf

    torch.manual_seed(1)
    tied = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True))
    tied.save_pretrained(folder / "tied")
    tied.save_pretrained(folder / "in files", max_shard_size="5KB")
    tied.to(torch.bfloat16).save_pretrained(folder / "bf16")
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(folder / "untied", max_shard_size="5KB")
    hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(folder / "experts")
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder / "gpt2")
    hf.BertModel(
        hf.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(folder / "bert")
    (folder / "pickled").mkdir()
    torch.save(tied.state_dict(), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "config.json").write_text((folder / "tied" / "config.json").read_text())


CAUSAL, CLASSIFIER, BARE = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel"
LOADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied embeddings": (CAUSAL, "tied", {}),
    "several files": (CAUSAL, "in files", {}),
    "several files, not tied, bf16": (CAUSAL, "untied", {"dtype": torch.bfloat16}),
    "bf16 as fp32": (CAUSAL, "bf16", {"dtype": torch.float32}),
    "bf16 as stored": (CAUSAL, "bf16", {"dtype": "auto"}),
    "a new head": (CLASSIFIER, "tied", {}),
    "a new head in bf16": (CLASSIFIER, "in files", {"dtype": torch.bfloat16, "num_labels": 3}),
    "a head that is not wanted": (BARE, "untied", {}),
    "a body under another prefix": (CAUSAL, "bert", {"is_decoder": True}),
    "a mismatched embedding": (CAUSAL, "tied", {"vocab_size": 50, "ignore_mismatched_sizes": True}),
    "experts that are stacked": (CAUSAL, "experts", {}),
    "experts in fp16": (CAUSAL, "experts", {"dtype": torch.float16}),
    "gpt2": (CAUSAL, "gpt2", {}),
    "pickled": (CAUSAL, "pickled", {"dtype": torch.bfloat16}),  # held, not streamed
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of `save_models`."""
    pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("pretrained")
    save_models(made)
    return made


def load(name: str, folder: Path) -> Any:
    import transformers as hf

    kind, which, settings = LOADS[name]
    return getattr(hf, kind).from_pretrained(folder / which, **settings)


@pytest.mark.parametrize("name", LOADS)
def test_from_pretrained_inside_init_gives_the_weights_of_plain_loading(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    plain = load(name, folder)
    next_draw = torch.rand(3)
    torch.manual_seed(0)
    with zero.Init():
        model = load(name, folder)
    assert torch.equal(torch.rand(3), next_draw)
    assert different(values_of(model), tensors_of(plain)) == []
    assert ties_of(model) == ties_of(plain)
    assert (model.training, model.config.to_dict()) == (plain.training, plain.config.to_dict())
    trained = [(param.requires_grad, param.shape) for param in plain.parameters()]
    assert [(param.requires_grad, param.shape) for param in model.parameters()] == trained
    if name != "pickled":
        assert [key for key, tensor in tensors_of(model).items() if not tensor.is_meta] == []


def shard_loaded(folder: Path, names: list[str]) -> list[str]:
    """What differs from plain loading, on any rank, in any stage."""
    wrong = []
    mesh = build_mesh(dp=-1)
    for name in names:
        torch.manual_seed(0)
        plain = load(name, folder)
        for stage in range(4):
            torch.manual_seed(dist.get_rank())  # a new head is that of rank 0
            with zero.Init():
                model = load(name, folder)
            zero.shard(model, mesh, stage=stage, options=zero.ShardingOptions(small_numel=20))
            found = zero.consolidated_state_dict(model, rank=None)
            wrong += [f"{name}, stage {stage}: {key}" for key in different(found, plain.state_dict())]
            buffers = dict(plain.named_buffers())
            wrong += [f"{name}, stage {stage}: {key}" for key in different(dict(model.named_buffers()), buffers)]
    return wrong


def test_every_stage_starts_from_the_weights_of_plain_loading_on_every_rank(ranks: Ranks, folder: Path) -> None:
    names = ["several files", "several files, not tied, bf16", "a new head", "experts in fp16"]
    assert ranks(2, shard_loaded, folder, names, deadline_s=240) == [[], []]


# What is measured: anonymous memory, since pages of files that are mapped are the kernel's to drop.


@contextmanager
def peak_anonymous_bytes() -> Iterator[list[int]]:
    """By how much the private memory of this process grows inside, at most; a sample each millisecond."""
    # Else glibc keeps freed pieces below 32 MiB, now more of them and now fewer.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    page = os.sysconf("SC_PAGE_SIZE")
    over = threading.Event()
    peak = [0]

    def now() -> int:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
        return (int(resident) - int(shared)) * page

    start = now()

    def watch() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], now() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], now() - start)
        over.set()
        thread.join()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 4096), nn.Linear(4096, 512)


class Layers(nn.Module):
    """144 MiB of fp32 in nine layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(9))


def load_layers(path: Path, how: str) -> tuple[int, int, int]:
    """The peak while the model is built, loaded and sharded; bytes of this rank's shards and of the largest bucket."""
    mesh = build_mesh(dp=-1)
    options = zero.ShardingOptions(small_numel=0)
    zero.shard(nn.Linear(64, 64), mesh, options=options)  # what the first use of anything takes
    with peak_anonymous_bytes() as peak:
        with zero.Init():
            model = Layers()
            if how == "load_state_dict":
                model.load_state_dict(load_file(path))
        if how == "before sharding":
            zero.load_pretrained(model, path)
        zero.shard(model, mesh, stage=3, options=options)
        if how == "after sharding":
            zero.load_pretrained(model, path)
    sharding = sharding_of(model)
    shards = sum(bucket.memory.master.nbytes for bucket in sharding.buckets)
    return peak[0], shards, max(bucket.plan.layout.numel * 4 for bucket in sharding.buckets)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("how", ["load_state_dict", "before sharding", "after sharding"])
def test_each_rank_needs_its_shard_and_a_bucket_however_weights_are_loaded(
    ranks: Ranks, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "layers.safetensors"
    save_file(
        {name: torch.ones(param.shape, dtype=torch.bfloat16) for name, param in Layers().named_parameters()}, path
    )
    for peak, shard_bytes, bucket_bytes in ranks(2, load_layers, path, how):
        assert (shard_bytes, bucket_bytes) == pytest.approx((72 * MIB, 16 * MIB), rel=0.01)
        assert shard_bytes <= peak <= shard_bytes + 2 * bucket_bytes, (how, peak / MIB)  # the whole takes 144 MiB


LARGE = {**SIZES, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_key_value_heads": 2}


def load_large(folder: Path) -> tuple[int, int, int]:
    import transformers as hf

    mesh = build_mesh(dp=-1)
    options = zero.ShardingOptions(small_numel=0)
    zero.shard(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), mesh, options=options)
    with peak_anonymous_bytes() as peak:
        with zero.Init():
            model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        zero.shard(model, mesh, stage=3, options=options)
    sharding = sharding_of(model)
    shards = sum(bucket.memory.master.nbytes for bucket in sharding.buckets)
    return peak[0], shards, max(bucket.plan.layout.numel * 4 for bucket in sharding.buckets)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_each_rank_needs_its_shard_and_a_bucket_for_a_model_of_transformers(ranks: Ranks, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    hf.LlamaForCausalLM(hf.LlamaConfig(**LARGE)).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20MB")
    for peak, shard_bytes, bucket_bytes in ranks(2, load_large, tmp_path, deadline_s=240):
        assert shard_bytes > 5 * bucket_bytes
        assert shard_bytes <= peak <= shard_bytes + 2 * bucket_bytes, peak / MIB  # the whole takes twice the shard


# The seam.


def test_files_are_opened_as_ever_after_the_block_also_by_modules_that_were_imported_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.arange(6.0)}, tmp_path / "a.safetensors")
    (tmp_path / "reads_inside_init.py").write_text("from safetensors import safe_open\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain = safetensors.safe_open
    with zero.Init():
        import reads_inside_init  # type: ignore[import-not-found]  # written above

        with reads_inside_init.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert list(file.keys()) == ["weight"]
            assert file.metadata() is None
            assert file.get_slice("weight").get_shape() == [6]
            part, whole = file.get_slice("weight")[2:4], file.get_tensor("weight")
    module = nn.Module()
    module.register_buffer("part", part)
    module.register_buffer("whole", whole)
    assert reads_inside_init.safe_open is safetensors.safe_open is safetensors.torch.safe_open is plain
    assert torch.equal(load_file(tmp_path / "a.safetensors")["weight"], torch.arange(6.0))


def test_values_that_a_program_reads_inside_the_block_are_those_of_the_file(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(6.0), "steps": torch.tensor(7)}, tmp_path / "a.safetensors")
    with zero.Init():
        found = load_file(tmp_path / "a.safetensors")
        assert found["steps"].item() == 7
        assert found["weight"].tolist() == [0, 1, 2, 3, 4, 5]
        assert bool((found["weight"] > 4).any())
        constant = torch.zeros(6)
        constant.copy_(found["weight"])  # a small constant has values, so this is done at once
        assert constant.sum() == 15


def test_other_threads_read_at_once(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(6.0)}, tmp_path / "a.safetensors")
    found = {}
    with zero.Init(), safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        lazy = file.get_slice("weight")
        thread = threading.Thread(target=lambda: found.update(weight=lazy[...].to(torch.float64)))
        thread.start()
        thread.join()
    assert found["weight"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_block_that_raises_inside_another_leaves_files_as_the_outer_block_wants_them(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(6.0)}, tmp_path / "a.safetensors")
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    plain = safetensors.safe_open
    with zero.Init():
        with pytest.raises(ZeroDivisionError), zero.Init():
            1 / 0  # noqa: B018
        assert safetensors.safe_open is not plain
    assert safetensors.safe_open is plain
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before


def test_a_file_that_changed_before_the_model_was_sharded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TinyModel().state_dict(), path)
    with zero.Init():
        model = TinyModel()
        model.load_state_dict(load_file(path))
    weight = model.embed.weight
    os.utime(path, ns=(0, 0))
    told = refusal(lambda: recording_of(model, weight, "weight").materialize(weight))
    assert told.startswith("CheckpointError")
    assert "until `zero.initialize`" in told
    path.unlink()
    assert "removed" in refusal(lambda: recording_of(model, weight, "weight").materialize(weight))
