"""Operands to try every op with, for `zcore kernels check` and `bench`: a row for each op in CASES.

They are of the size and dtype asked for, drawn from one seed: two draws are equal. A dtype below fp32 is that of
activations, of gradients and of the copies that a step writes; what an optimizer keeps stays fp32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zcore.core import ops

__all__ = ["CASES", "Call", "Operands", "tensors_in"]

HIDDEN = 1024  # elements of a row
HEADS, HEAD_DIM = 8, 64
BLOCK = 256
NUM_EXPERTS, CHOSEN = 16, 2
VOCABULARY = 2500  # logits of a token
STEP = {"lr": 1e-3, "weight_decay": 0.1}
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "bias_correction1": 0.1, "bias_correction2": 0.001}

ADAM_ONLY = {key: value for key, value in ADAM.items() if not key.startswith("beta")}


@dataclass(frozen=True, slots=True)
class Call:
    """What an op is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All operands, in order."""
        return list(tensors_in((self.args, tuple(self.kwargs.values()))))

    def copied(self) -> "Call":
        """The same with operands of its own."""
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, (self.args, self.kwargs))
        return Call(args, kwargs)


class Operands:
    """Draws tensors of about `numel` elements."""

    def __init__(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.numel, self.dtype, self.device = numel, dtype, device
        self.rows = max(1, numel // HIDDEN)
        self._random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, in the dtype asked for if no other is named."""
        return torch.randn(shape, generator=self._random).to(self.device, dtype or self.dtype)

    def flat(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All elements in a row."""
        return self.normal(self.numel, dtype=dtype)

    def squares(self) -> Tensor:
        """A state that is never below zero, fp32."""
        return self.flat().square_()

    def noise(self) -> Tensor:
        """int32 in [0, 2^16), one for each element."""
        drawn = torch.randint(1 << 16, (self.numel,), generator=self._random, dtype=torch.int32)
        return drawn.to(self.device)

    def experts(self) -> Tensor:
        """int64, `CHOSEN` different ones of a token for each row."""
        return self.normal(self.rows, NUM_EXPERTS, dtype=torch.float32).topk(CHOSEN).indices

    def copies(self) -> list[Tensor]:
        """What a step writes beside an fp32 parameter: none where activations are fp32, too."""
        return [] if self.dtype is torch.float32 else [self.flat(self.dtype)]

    def quantised(self, *, format: str = "int8") -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points, as the reference makes them."""
        with ops.force("reference"):
            quantize = ops.get("quantize_blockwise", device=self.device, dtype=torch.float32)
            made: tuple[Tensor, Tensor, Tensor] = quantize(self.flat(), format=format, block_size=BLOCK)
        return made


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and single values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from tensors_in(each)


def _adamw(draw: Operands) -> Call:
    states = [draw.flat()], [draw.squares()]
    return Call(([draw.flat()], [draw.flat(draw.dtype)], *states, draw.copies()), {**STEP, **ADAM, "grad_factor": 0.5})


def _lamb_apply(draw: Operands) -> Call:
    ratios = torch.ones(1, dtype=torch.float64, device=draw.device)
    return Call(
        ([draw.flat()], [draw.flat()], [draw.squares()], draw.copies()), {"ratios": ratios, **STEP, **ADAM_ONLY}
    )


def _lamb_average(draw: Operands) -> Call:
    operands = [draw.flat()], [draw.flat(draw.dtype)], [draw.flat()], [draw.squares()]
    return Call(operands, {"weight_decay": 0.1, **ADAM})


def _one_state(state: Callable[[Operands], Tensor], **settings: float) -> Callable[[Operands], Call]:
    def make(draw: Operands) -> Call:
        return Call(([draw.flat()], [draw.flat(draw.dtype)], [state(draw)], draw.copies()), {**STEP, **settings})

    return make


def _rows(num: int, *, weights: int = 0, **settings: object) -> Callable[[Operands], Call]:
    """`num` tensors of rows, then `weights` of one row."""

    def make(draw: Operands) -> Call:
        of_rows = (draw.normal(draw.rows, HIDDEN) for _ in range(num))
        return Call((*of_rows, *(draw.normal(HIDDEN) for _ in range(weights))), dict(settings))

    return make


def _packed(draw: Operands) -> Call:
    return Call((draw.normal(draw.rows, 2 * HIDDEN),))


def _rotary(draw: Operands) -> Call:
    tokens = max(1, draw.numel // (HEADS * HEAD_DIM))
    angles = torch.outer(torch.arange(tokens), 10_000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))).repeat(
        1, 2
    )
    q, k = (draw.normal(1, tokens, HEADS, HEAD_DIM) for _ in range(2))
    positions = torch.arange(tokens).view(1, tokens)
    return Call((q, k, *(each.to(draw.device) for each in (angles.cos(), angles.sin(), positions))))


def _linear_cross_entropy(draw: Operands) -> Call:
    """`numel` logits of about 1."""
    tokens = max(1, draw.numel // VOCABULARY)
    hidden, weight = draw.normal(tokens, HIDDEN), draw.normal(VOCABULARY, HIDDEN) / HIDDEN**0.5
    targets = (torch.arange(tokens) * 7 % VOCABULARY).to(draw.device)
    return Call((hidden, weight, targets), {"label_smoothing": 0.1, "z_loss": 1e-4})


def _dropout(draw: Operands) -> Call:
    x, residual = (draw.normal(draw.rows, HIDDEN) for _ in range(2))
    return Call((x, draw.normal(HIDDEN), residual, torch.tensor([7]), 0.1))


def _gate(draw: Operands) -> Call:
    return Call((draw.normal(max(1, draw.numel // NUM_EXPERTS), NUM_EXPERTS), CHOSEN))


def _permute(draw: Operands) -> Call:
    return Call((draw.normal(draw.rows, HIDDEN), draw.experts(), NUM_EXPERTS))


def _unpermute(draw: Operands) -> Call:
    places = draw.experts().flatten().argsort(stable=True).view(draw.rows, CHOSEN)
    return Call((draw.normal(draw.rows * CHOSEN, HIDDEN), places, draw.normal(draw.rows, CHOSEN)))


def _grouped_matmul(draw: Operands) -> Call:
    counts = torch.bincount(draw.experts().flatten(), minlength=NUM_EXPERTS)
    rows, weights = draw.normal(draw.rows * CHOSEN, HEAD_DIM), draw.normal(NUM_EXPERTS, HEAD_DIM, HEAD_DIM)
    return Call((rows, weights, counts))


def _matrix(draw: Operands) -> Call:
    side = max(2, math.isqrt(min(draw.numel, 1 << 18)))
    return Call((draw.normal(side, side),))


def _signs(draw: Operands) -> tuple[Tensor, Tensor]:
    with ops.force("reference"):
        pack = ops.get("pack_signs", device=draw.device, dtype=torch.float32)
        made: tuple[Tensor, Tensor] = pack(draw.flat(), draw.flat() * 0, block_size=BLOCK)
    return made


CASES: dict[str, Callable[[Operands], Call]] = {
    "adagrad_step": _one_state(Operands.squares, eps=1e-10),
    "adamw_step": _adamw,
    "bias_dropout_residual": _dropout,
    "bias_gelu": _rows(1, weights=1),
    "copy_stochastic": lambda draw: Call((draw.flat(torch.bfloat16), draw.flat()), {"seed": 7}),
    "dequantize_blockwise": lambda draw: Call(
        draw.quantised(), {"format": "int8", "block_size": BLOCK, "numel": draw.numel, "dtype": draw.dtype}
    ),
    "dequantize_reduce_requantize": lambda draw: Call(
        tuple(map(list, zip(draw.quantised(), draw.quantised(), strict=True))),
        {"format": "int8", "block_size": BLOCK, "numel": draw.numel},
    ),
    "geglu": _rows(2),
    "geglu_packed": _packed,
    "grouped_matmul": _grouped_matmul,
    "lamb_apply": _lamb_apply,
    "lamb_average": _lamb_average,
    "layer_norm": _rows(1, weights=2, eps=1e-5),
    "layer_norm_residual": _rows(2, weights=2, eps=1e-5),
    "linear_cross_entropy": _linear_cross_entropy,
    "lion_step": _one_state(Operands.flat, beta1=0.9, beta2=0.99),
    "newton_schulz": _matrix,
    "pack_signs": lambda draw: Call((draw.flat(draw.dtype), draw.flat()), {"block_size": BLOCK}),
    "permute": _permute,
    "quantize_blockwise": lambda draw: Call((draw.flat(draw.dtype),), {"format": "int8", "block_size": BLOCK}),
    "rms_norm": _rows(1, weights=1, eps=1e-6),
    "rms_norm_residual": _rows(2, weights=1, eps=1e-6),
    "rotary": _rotary,
    "round_stochastic": lambda draw: Call((draw.flat(),), {"seed": 7}),
    "round_with_noise": lambda draw: Call((draw.flat(), draw.noise())),
    "sgd_step": _one_state(Operands.flat, momentum=0.9, dampening=0.0),
    "squared_norm": lambda draw: Call((draw.flat(draw.dtype),)),
    "swiglu": _rows(2),
    "swiglu_packed": _packed,
    "topk_gate": _gate,
    "unpack_signs": lambda draw: Call(_signs(draw), {"block_size": BLOCK, "numel": draw.numel, "dtype": draw.dtype}),
    "unpermute": _unpermute,
}
