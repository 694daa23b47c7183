"""The layers against those of torch, on what is compiled and on what torch serves, alone and inside torch.compile."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.core.errors import ConfigError
from zcore.kernels.nn import BiasDropoutResidual, BiasGELU, ExpertMLPs, GeGLU, LayerNorm, RMSNorm, Rotary, SwiGLU

DTYPES = [torch.float32, torch.float64]  # compiled, and torch's


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ours", "torchs"), [(RMSNorm(12), nn.RMSNorm(12)), (LayerNorm(12), nn.LayerNorm(12))], ids=["rms", "layer"]
)
def test_norms_are_those_of_torch_and_add_a_residual(ours: nn.Module, torchs: nn.Module, dtype: torch.dtype) -> None:
    ours.to(dtype), torchs.to(dtype)
    x, residual = draw(12, 3, dtype=dtype).T, draw(3, 12, dtype=dtype)  # x is not contiguous
    torch.testing.assert_close(ours(x), torchs(x))
    y, added = ours(x, residual)
    assert torch.equal(added, x + residual)
    torch.testing.assert_close(y, torchs(added))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_take_two_tensors_or_the_halves_of_one(dtype: torch.dtype) -> None:
    packed = draw(3, 10, dtype=dtype)
    gate, up = packed.chunk(2, -1)
    for layer, activation in (
        (SwiGLU(), functional.silu),
        (GeGLU(), functional.gelu),
        (GeGLU("tanh"), nn.GELU("tanh")),
    ):
        torch.testing.assert_close(layer(gate, up), activation(gate) * up)
        torch.testing.assert_close(layer(packed), activation(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_adds_a_bias(dtype: torch.dtype) -> None:
    x, bias = draw(3, 5, dtype=dtype), draw(5, dtype=dtype)
    torch.testing.assert_close(BiasGELU()(x, bias), functional.gelu(x + bias))
    torch.testing.assert_close(BiasGELU("tanh")(x), functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotary_makes_scores_depend_on_distance_alone(is_interleaved: bool) -> None:
    layer = Rotary(8, num_positions=40, is_interleaved=is_interleaved)
    q, k = draw(1, 1, 8), draw(1, 2, 8)[:, 1:]

    def score(q_position: int, k_position: int) -> Tensor:
        turned, _ = layer(q, k, torch.tensor([q_position]))
        _, other = layer(q, k, torch.tensor([k_position]))
        return (turned * other).sum()

    torch.testing.assert_close(score(9, 4), score(35, 30))
    assert not torch.isclose(score(9, 4), score(9, 5))


def test_dropout_draws_a_mask_a_call_and_none_in_eval() -> None:
    layer, x, bias, residual = BiasDropoutResidual(0.5), torch.ones(50, 20), torch.ones(20), torch.zeros(50, 20)
    torch.manual_seed(3)
    first, second = layer(x, bias, residual), layer(x, bias, residual)
    assert not torch.equal(first, second)
    assert set(first.flatten().tolist()) == {0.0, 4.0}
    torch.manual_seed(3)
    assert torch.equal(layer(x, bias, residual), first)
    assert torch.equal(layer.eval()(x, bias, residual), x + bias)


def test_layers_compile_without_a_graph_break() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate, self.drop = RMSNorm(8), SwiGLU(), BiasDropoutResidual(0.25)

        def forward(self, x: Tensor) -> Tensor:
            y, added = self.norm(x, x)
            return self.drop(self.gate(y, added), None, added)

    block, x = Block().eval(), draw(3, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    block.train()
    assert compiled(x).shape == x.shape


def test_the_registry_finds_the_ops_by_itself() -> None:
    command = (
        "import torch; from zcore.core import ops;"
        "print(ops.get('swiglu', device=torch.device('cpu'), dtype=torch.half))"
    )
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "zcore.swiglu"


def test_operands_of_two_dtypes_are_widened_as_torch_does() -> None:
    x, wide = draw(3, 8).bfloat16(), draw(3, 8)
    for norm, torchs in ((RMSNorm(8), nn.RMSNorm(8)), (LayerNorm(8), nn.LayerNorm(8))):
        for one, other in ((x, wide), (wide, x)):
            y, added = norm(one, other)
            assert torch.equal(added, one + other)
            torch.testing.assert_close(y, torchs(added))
    torch.testing.assert_close(SwiGLU()(x, wide), functional.silu(x.float()) * wide)
    torch.testing.assert_close(GeGLU()(wide, x), functional.gelu(wide) * x)
    torch.testing.assert_close(BiasDropoutResidual().eval()(x, None, wide), x + wide)


def test_experts_are_cast_by_autocast_as_linear_layers_are() -> None:
    torch.manual_seed(3)
    experts, choices = ExpertMLPs(8, 6, num_experts=2), torch.tensor([[0], [1], [1]])
    expected = experts(draw(3, 8), choices, torch.ones(3, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(draw(3, 8).bfloat16(), choices, torch.ones(3, 1))
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("layer", [RMSNorm(4), LayerNorm(4), SwiGLU(), GeGLU(), BiasGELU()], ids=str)
def test_integers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"torch\.int64; expected a floating dtype"):
        layer(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("p", [-0.1, 2.0, float("nan")])
def test_dropout_of_no_probability_is_refused_when_it_is_made(p: float) -> None:
    with pytest.raises(ConfigError, match="expected a probability"):
        BiasDropoutResidual(p)
