"""patch() on models of Hugging Face made from small configs: the same losses and gradients, and an honest list."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.kernels import patch
from zcore.kernels.nn import RMSNorm
from zcore.kernels.unserved import WHY_EXPERTS, WHY_LOSS, WHY_MLP, WHY_ROTARY, WHY_ROUTER

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
# Of a model of two layers: classes that are swapped, and how often.
MODELS = {
    "Llama": (SIZES, {"LlamaRMSNorm": 5, "LlamaMLP": 2}),
    "Qwen2": (SIZES, {"Qwen2RMSNorm": 5, "Qwen2MLP": 2}),
    "Mistral": (SIZES, {"MistralRMSNorm": 5, "MistralMLP": 2}),
    "Gemma2": ({**SIZES, "head_dim": 8}, {"Gemma2RMSNorm": 9, "Gemma2MLP": 2}),
    "Phi3": ({**SIZES, "pad_token_id": 0}, {"Phi3RMSNorm": 5, "Phi3MLP": 2}),
    "GPT2": (
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"LayerNorm": 5, "GPT2MLP": 2},
    ),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**MODELS[family][0])
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model: nn.Module = getattr(transformers, family + head)(config)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.1 * torch.randn(each.shape))  # norms are ones or zeros otherwise
    return model


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(99, (2, 17), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", MODELS)
def test_a_patched_model_has_the_loss_and_the_gradients_it_had(family: str) -> None:
    model = build(family)
    keys, parameters = list(model.state_dict()), {id(each) for each in model.parameters()}
    loss, gradients = loss_and_gradients(model)
    report = patch(model)
    assert Counter(each.original for each in report.swapped) == MODELS[family][1], str(report)
    assert {each.why for each in report.left} <= {WHY_ROTARY, WHY_LOSS}, str(report)
    assert sorted(model.state_dict()) == sorted(keys)
    assert {id(each) for each in model.parameters()} == parameters
    patched_loss, patched_gradients = loss_and_gradients(model)
    torch.testing.assert_close(patched_loss, loss, rtol=1e-5, atol=1e-5)
    assert patched_gradients.keys() == gradients.keys()
    for name, each in gradients.items():
        largest = each.abs().max().item()
        torch.testing.assert_close(patched_gradients[name], each, rtol=0, atol=1e-4 * largest + 1e-8, msg=name)


def test_a_model_in_bf16_is_patched_too() -> None:
    model = build("Llama").bfloat16()
    loss, _ = loss_and_gradients(model)
    report = patch(model)
    assert len(report.swapped) == 7, str(report)
    torch.testing.assert_close(loss_and_gradients(model)[0], loss, rtol=2e-2, atol=0)


class PlainRMSNorm(nn.Module):
    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps, self.power = 1e-6, power

    def forward(self, x: Tensor) -> Tensor:
        return self.weight**self.power * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def test_what_only_looks_alike_is_left_and_said() -> None:
    model = nn.Sequential(PlainRMSNorm(), PlainRMSNorm(power=2.0), nn.BatchNorm1d(8), nn.LayerNorm((2, 4)))
    report = patch(model)
    assert [each.name for each in report.swapped] == ["0"]
    assert [each.name for each in report.left] == ["1", "2", "3"]
    assert "computes something else" in report.left[0].why
    assert str(report).count("\n") == 3


def test_a_layer_that_cannot_be_tried_is_left_and_said() -> None:
    class TimedNorm(nn.LayerNorm):
        def forward(self, x: Tensor, *, time: Tensor) -> Tensor:
            return super().forward(x * time)

    report = patch(nn.Sequential(TimedNorm(8), nn.GroupNorm(2, 8)))
    assert report.swapped == ()
    assert [each.why.split(":")[0].split(";")[0] for each in report.left] == [
        "whose forward takes x, time",
        "which cannot be tried in eval mode",
    ]


def test_layers_in_two_places_with_hooks_or_in_fp64() -> None:
    shared, hooked, wide = nn.RMSNorm(8), nn.RMSNorm(8), nn.RMSNorm(8).double()
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(shared, hooked, wide, nn.Sequential(shared))
    report = patch(model)
    assert [each.name for each in report.swapped] == ["0", "3.0"]
    assert isinstance(model[0], RMSNorm)
    assert model[0] is model[3][0]
    assert ["hooks" in report.left[0].why, "float64" in report.left[1].why] == [True, True]
    assert patch(model).swapped == ()


def test_a_patched_model_compiles_without_a_graph_break() -> None:
    model = nn.Sequential(PlainRMSNorm(), nn.Linear(8, 8), nn.LayerNorm(8))
    patch(model)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class MLP(nn.Module):
    """A gated MLP, of which the classes below change one thing."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.act_fn, self.intermediate_size, self.p = nn.SiLU(), 6, p

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MLPWithDropout(MLP):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class MLPThatDropsInItsForward(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), p=self.p, training=self.training)


class MLPOfTwoInputs(MLP):
    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return super().forward(x) * (1.0 if scale is None else scale)


class MLPWithAnotherPart(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(8, 8)


class MLPWithLearnedActivation(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.Linear(6, 6)


class GatedNorm(PlainRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * functional.silu(gate))


class CountingNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


class NormWithExtraState(PlainRMSNorm):
    def get_extra_state(self) -> int:
        return 3


class NoisyNorm(PlainRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (MLPWithDropout(), "dropout of p=0.5 a swap would lose"),
        (MLPThatDropsInItsForward(), "in train mode"),
        (NoisyNorm(), "in train mode"),
        (MLPOfTwoInputs(), "takes x, scale; a replacement takes one input"),
        (GatedNorm(), "takes x, gate; a replacement takes one input"),
        (MLPWithAnotherPart(), "a part beside the known: adapter"),
        (MLPWithLearnedActivation(), "act_fn has parameters"),
        (NormWithExtraState(), "state dict is made in its own way"),
        (CountingNorm(), "buffers a swap would lose: seen"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_layer_that_a_replacement_would_change_is_left_and_said(layer: nn.Module, why: str) -> None:
    model = nn.Sequential(layer).eval()
    (left,) = patch(model).left
    assert why in left.why
    assert model[0] is layer


def test_a_forward_put_on_the_layer_itself_is_left() -> None:
    layer = nn.RMSNorm(8)
    layer.forward = layer.forward  # type: ignore[method-assign]  # as libraries do that wrap layers
    assert "not that of its class" in patch(nn.Sequential(layer)).left[0].why


def test_a_swap_keeps_attributes_mode_and_parts_without_effect() -> None:
    norm, mlp, dropping_nothing = PlainRMSNorm(), MLP(), MLPWithDropout(p=0.0)
    norm.variance_epsilon = norm.eps
    model = nn.Sequential(norm, mlp, dropping_nothing)
    model[1].eval()
    keys, state = list(model.state_dict()), torch.get_rng_state()
    assert len(patch(model).swapped) == 3
    assert (model[0].power, model[0].variance_epsilon) == (1.0, 1e-6)
    assert (model[1].act_fn, model[1].intermediate_size) == (mlp.act_fn, 6)
    assert model[1].gated is not model[2].gated
    assert model[2].dropout is dropping_nothing.dropout
    assert [each.training for each in model] == [True, False, True]
    assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad, lambda: torch.device("meta")],
    ids=["autocast", "inference", "no gradients", "meta"],
)
def test_what_is_swapped_does_not_depend_on_the_mode_of_the_caller(mode: Callable[[], Any]) -> None:
    model = nn.Sequential(PlainRMSNorm(), MLP())
    with mode():
        assert len(patch(model).swapped) == 2


def test_layers_that_are_alike_are_tried_once_and_small() -> None:
    class WideMLP(MLP):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.gate_proj.weight.shape)
            return super().forward(x)

    calls: list[torch.Size] = []
    layers = [WideMLP() for _ in range(4)]
    for each in layers:
        each.gate_proj, each.up_proj, each.down_proj = nn.Linear(99, 500), nn.Linear(99, 500), nn.Linear(500, 99)
    layers[3].act_fn = nn.GELU()
    model = nn.Sequential(*layers)
    x = torch.randn(2, 99)
    expected = model(x)
    calls.clear()
    assert len(patch(model).swapped) == 4
    assert calls == [(24, 16)] * 4  # for each of two activations, in both modes
    torch.testing.assert_close(model(x), expected)


def test_kinds_that_are_never_swapped_have_a_line_each() -> None:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    report = patch(transformers.MixtralForCausalLM(config))
    assert {each.why: (each.name, each.count) for each in report.left} == {
        WHY_ROTARY: ("model.rotary_emb", 1),
        WHY_EXPERTS: ("model.layers.0.mlp.experts", 2),
        WHY_ROUTER: ("model.layers.0.mlp.gate", 2),
        WHY_LOSS: ("lm_head", 1),
    }
    assert "left     model.layers.0.mlp.experts and 1 more: MixtralExperts, which" in str(report)


@pytest.mark.parametrize("family", ["Bert", "OPT", "GPTNeoX", "Phi"])
def test_mlps_of_other_names_are_said_once(family: str) -> None:
    given = {**SIZES, "ffn_dim": 56, "word_embed_proj_dim": 32} if family == "OPT" else SIZES
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**given))
    assert [each.count for each in patch(model).left if each.why == WHY_MLP] == [2]
