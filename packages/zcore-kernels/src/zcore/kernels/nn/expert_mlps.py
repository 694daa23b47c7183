"""The experts of a mixture as one layer: gated MLPs (arXiv 2002.05202), each of which sees the tokens sent to it.

    x -> rows sorted by expert -> gate and up of each -> silu(gate) * up -> down of each -> sums of each token's rows

What the router says comes in, so that any router will do: `TopKRouter`, or that of a Hugging Face model, whose experts
(Qwen2-MoE, Mixtral) have the same parameters under the same names. On CUDA, where Triton is installed, nothing of this
waits for the device.
"""

import torch
from torch import Tensor, nn

from zcore.kernels.nn.serving import serving
from zcore.kernels.ops import grouped_matmul, permute, swiglu

__all__ = ["ExpertMLPs"]


class ExpertMLPs(nn.Module):
    """`num_experts` MLPs, down(silu(gate(x)) * up(x)), without biases; they start as nn.Linear does.

    >>> experts = ExpertMLPs(4, 8, num_experts=3)
    >>> experts(torch.randn(2, 4), torch.tensor([[0, 2], [2, 1]]), torch.full((2, 2), 0.5)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts

        def weight(out: int, into: int) -> nn.Parameter:
            bound = into**-0.5 if into else 0.0
            drawn = torch.empty(num_experts, out, into, device=device, dtype=dtype).uniform_(-bound, bound)
            return nn.Parameter(drawn)

        self.gate_up_proj = weight(2 * intermediate, hidden)  # gate first
        self.down_proj = weight(hidden, intermediate)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [..., hidden]; experts: [tokens, k] int64; weights: [tokens, k]; sums over k are in fp32 at least.

        Under autocast x and the experts' parameters are cast as a linear layer's are.
        """
        gate_up_proj: Tensor = self.gate_up_proj
        down_proj: Tensor = self.down_proj
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, gate_up_proj, down_proj = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
        rows, counts, places = serving("permute", permute.reference, x)(
            x.flatten(0, -2).contiguous(), experts.contiguous(), self.num_experts
        )
        product = serving("grouped_matmul", grouped_matmul.reference, x)
        gated: Tensor = serving("swiglu_packed", swiglu.reference_packed, x)(product(rows, gate_up_proj, counts, True))
        unsort = serving("unpermute", permute.reference_unpermute, x)
        found: Tensor = unsort(product(gated, down_proj, counts, True), places, weights.contiguous())
        return found.view(x.shape)

    def extra_repr(self) -> str:
        """As print(model) shows it."""
        num_experts, hidden, intermediate = self.down_proj.shape
        return f"{hidden}, {intermediate}, {num_experts=}"
