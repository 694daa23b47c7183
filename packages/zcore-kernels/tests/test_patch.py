"""patch() on models of Hugging Face made from small configs: the same losses and gradients, and an honest list."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from zcore.kernels import patch
from zcore.kernels.nn import RMSNorm

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
    assert report.left == ()
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

    class GatedMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
            self.act_fn = nn.Linear(6, 6)

    report = patch(nn.Sequential(TimedNorm(8), GatedMLP(), nn.GroupNorm(2, 8)))
    assert report.swapped == ()
    assert ["cannot be tried" in each.why for each in report.left] == [True, False, True]


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
