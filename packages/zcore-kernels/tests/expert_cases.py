"""The ops of experts as tests call them: `make` of each draws its arguments, with a `Draw` and of some `Sizes`."""

from dataclasses import dataclass

import torch
from op_calls import Arguments, Op
from torch import Tensor

import zcore.kernels.ops.grouped_matmul
import zcore.kernels.ops.permute
import zcore.kernels.ops.topk_gate  # noqa: F401 - each registers its ops


@dataclass(frozen=True)
class Sizes:
    """How much of each there is."""

    tokens: int
    hidden: int
    num_experts: int
    k: int  # at most num_experts


class Draw:
    """Operands of one dtype and seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 7) -> None:
        self.dtype, self._random = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._random).to(dtype or self.dtype).requires_grad_()

    def experts(self, size: Sizes) -> Tensor:
        """The last expert gets none, so that there is one without rows."""
        used = max(size.num_experts - 1, 1)
        return torch.randint(used, (size.tokens, size.k), generator=self._random)

    def places(self, size: Sizes) -> Tensor:
        return torch.randperm(size.tokens * size.k, generator=self._random).view(size.tokens, size.k)


def gate(scoring: str, normalise: bool, *, is_biased: bool = False) -> Op:
    def make(draw: Draw, size: Sizes) -> Arguments:
        logits = draw(size.tokens, size.num_experts)
        return logits, size.k, scoring, normalise, draw(size.num_experts).detach() if is_biased else None

    return Op("topk_gate", make, f" {scoring}{' normalised' * normalise}{' biased' * is_biased}")


def grouped(is_transposed: bool) -> Op:
    def make(draw: Draw, size: Sizes) -> Arguments:
        counts = torch.bincount(draw.experts(size).flatten(), minlength=size.num_experts)
        into, out = size.hidden, size.hidden // 2 + 1
        sides = (out, into) if is_transposed else (into, out)
        return draw(size.tokens * size.k, into), draw(size.num_experts, *sides), counts, is_transposed

    return Op("grouped_matmul", make, " transposed" * is_transposed)


OPS = [
    gate("softmax", normalise=True),
    gate("softmax", normalise=False),
    gate("softmax", normalise=True, is_biased=True),
    gate("sigmoid", normalise=True, is_biased=True),
    gate("sigmoid", normalise=False),
    Op("permute", lambda draw, size: (draw(size.tokens, size.hidden), draw.experts(size), size.num_experts)),
    Op(
        "unpermute",
        lambda draw, size: (
            draw(size.tokens * size.k, size.hidden),
            draw.places(size),
            draw(size.tokens, size.k, dtype=torch.float32),
        ),
    ),
    Op(
        "unpermute",
        lambda draw, size: (draw(size.tokens * size.k, size.hidden), draw.places(size), draw(size.tokens, size.k)),
        " weights in the dtype of rows",
    ),
    Op("unpermute", lambda draw, size: (draw(size.tokens * size.k, size.hidden), draw.places(size)), " no weights"),
    grouped(is_transposed=False),
    grouped(is_transposed=True),
]
SMALL = Sizes(tokens=5, hidden=6, num_experts=4, k=2)
