"""The layers against those of torch, on what is compiled and on what torch serves, alone and inside torch.compile."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.kernels.nn import BiasDropoutResidual, BiasGELU, GeGLU, LayerNorm, RMSNorm, Rotary, SwiGLU

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
