"""Blocks are recognised in models as people write them, and every parameter is found once, with all its sites."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from parity import MODELS
from torch import nn

from zcore.zero.units import find_blocks, find_parameters, find_units


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Special(Layer):
    """A block of another class than its neighbours."""


class Declared(nn.Module):
    """Says itself what must not be split, as Hugging Face models do."""

    _no_split_modules = ("Special",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.encoder = Special()
        self.decoder = Special()


def in_list() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": nn.ModuleList([Layer(), Layer(), Layer()])})


def in_sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Layer(), Layer(), nn.LayerNorm(4))


def nested() -> nn.Module:
    """Blocks that hold blocks: the outer ones count."""
    outer = [nn.Sequential(OrderedDict(a=Layer(), b=Layer(), norm=nn.LayerNorm(4))) for _ in range(2)]
    return nn.ModuleDict({"stages": nn.ModuleList(outer)})


def of_two_kinds() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([Layer(), Special(), Layer(), Special(), nn.Linear(4, 4)])})


def of_bare_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def with_one_layer() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([Layer()])})


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (in_list, ["layers.0", "layers.1", "layers.2"]),
        (in_sequential, ["1", "2"]),
        (nested, ["stages.0", "stages.1"]),
        (of_two_kinds, ["layers.0", "layers.1", "layers.2", "layers.3"]),
        (Declared, ["encoder", "decoder"]),
        (of_bare_layers, []),
        (with_one_layer, []),
        (MODELS["gpt"], ["h.0", "h.1"]),
        (MODELS["mlp"], []),
        (MODELS["encoder"], ["layers.layers.0", "layers.layers.1"]),
        (
            lambda: nn.Transformer(8, 2, 2, 2, 8),
            [f"{half}.layers.{i}" for half in ("encoder", "decoder") for i in (0, 1)],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # of nn.Transformer
def test_blocks_are_recognised(build: Callable[[], nn.Module], expected: list[str]) -> None:
    assert list(find_blocks(build())) == expected


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, num_hidden_layers=2, **sizes))


def tiny_t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_gpt2, ["transformer.h.0", "transformer.h.1"]),
        (tiny_llama, ["model.layers.0", "model.layers.1"]),
        (tiny_t5, [f"{half}.block.{index}" for half in ("encoder", "decoder") for index in range(2)]),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers' imports
def test_blocks_of_transformers_models_are_recognised(build: Callable[[], nn.Module], expected: list[str]) -> None:
    model = build()
    assert list(find_blocks(model)) == expected
    parameters = find_parameters(model)
    assert len(parameters) == len(list(model.parameters()))
    units = find_units(model, parameters)
    assert [unit.name for unit in units if unit.is_block] == expected


@pytest.mark.parametrize("build", [*MODELS.values(), in_list, in_sequential, nested, of_two_kinds, Declared])
def test_units_hold_every_parameter_once_in_registration_order(build: Callable[[], nn.Module]) -> None:
    model = build()
    parameters = find_parameters(model)
    units = find_units(model, parameters)
    found = [each.fqn for unit in units for each in unit.params]
    assert found == [name for name, _ in model.named_parameters()]
    blocks = find_blocks(model)
    for unit in units:
        inside = [each.fqn.startswith(f"{unit.name}.") for each in unit.params]
        assert unit.is_block == (unit.name in blocks)
        assert not unit.is_block or all(inside)


def test_runs_between_blocks_are_named_by_their_ends() -> None:
    model = MODELS["gpt"]()
    units = find_units(model, find_parameters(model))
    assert [unit.name for unit in units] == ["wte to wpe", "h.0", "h.1", "ln_f"]


def test_a_tied_parameter_is_found_once_with_all_its_sites() -> None:
    model = MODELS["gpt"]()
    (tied,) = [each for each in find_parameters(model) if len(each.sites) > 1]
    assert tied.spec.fqn == "wte.weight"
    assert [(module, name) for module, name in tied.sites] == [(model.wte, "weight"), (model.head, "weight")]


def test_a_module_in_two_places_has_its_parameters_once() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert [each.spec.fqn for each in find_parameters(model)] == ["first.weight", "first.bias"]


def test_a_block_in_two_places_is_one_block() -> None:
    layer = Layer()
    model = nn.ModuleDict({"layers": nn.ModuleList([layer, Layer(), layer])})
    units = find_units(model, find_parameters(model))
    assert [unit.name for unit in units] == ["layers.0", "layers.1"]


def test_what_is_known_of_a_parameter() -> None:
    model = MODELS["odd"]()
    specs = {each.spec.fqn: each.spec for each in find_parameters(model)}
    assert specs["scale"].shape == () and specs["scale"].numel == 1
    assert specs["empty"].shape == (0, 3) and specs["empty"].numel == 0
    assert specs["second.weight"].dtype is torch.float64
    assert not specs["lone_frozen"].trainable and specs["twice.bias"].trainable


def test_a_model_without_parameters_has_no_units() -> None:
    assert find_units(nn.ReLU(), find_parameters(nn.ReLU())) == ()
