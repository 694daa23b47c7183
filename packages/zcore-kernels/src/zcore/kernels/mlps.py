"""The MLPs of Hugging Face models with what lies between their projections compiled.

The projections are those of the original, under their names there, so that a state dict has the keys it had.
"""

from typing import Protocol, cast

from torch import Tensor, nn

from zcore.kernels.nn.bias_gelu import BiasGELU
from zcore.kernels.nn.geglu import GeGLU
from zcore.kernels.nn.swiglu import SwiGLU

__all__ = ["GPT2MLP", "FusedGatedMLP", "GatedMLP"]


class _Projection(Protocol):
    weight: Tensor  # [in, out]
    bias: Tensor  # [out]


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), as Llama, Mistral, Qwen2 and Gemma have it."""

    def __init__(self, original: nn.Module, gated: SwiGLU | GeGLU) -> None:
        super().__init__()
        self.gate_proj = original.get_submodule("gate_proj")
        self.up_proj = original.get_submodule("up_proj")
        self.down_proj = original.get_submodule("down_proj")
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        found: Tensor = self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
        return found


class FusedGatedMLP(nn.Module):
    """The same with gate and up from one projection, gate_up_proj, as Phi3 has it."""

    def __init__(self, original: nn.Module, gated: SwiGLU | GeGLU) -> None:
        super().__init__()
        self.gate_up_proj = original.get_submodule("gate_up_proj")
        self.down_proj = original.get_submodule("down_proj")
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        found: Tensor = self.down_proj(self.gated(self.gate_up_proj(x)))
        return found


class GPT2MLP(nn.Module):
    """dropout(c_proj(gelu(c_fc(x)))), whose c_fc holds its weight as [in, out]; its bias is added within the GELU."""

    c_fc: _Projection

    def __init__(self, original: nn.Module, bias_gelu: BiasGELU) -> None:
        super().__init__()
        self.c_fc = cast(_Projection, original.get_submodule("c_fc"))
        self.c_proj = original.get_submodule("c_proj")
        self.bias_gelu = bias_gelu
        self.dropout = original.get_submodule("dropout")

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        found: Tensor = self.dropout(self.c_proj(self.bias_gelu(x @ self.c_fc.weight, self.c_fc.bias)))
        return found
