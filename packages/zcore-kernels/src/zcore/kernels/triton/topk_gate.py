"""The gate of a mixture of experts in Triton; operands as in ops/topk_gate.py, formulas in native/.../topk_gate.hpp.

A program keeps its rows of logits in registers and takes the best of each k times. What it compares are integers:

    key    | the value, its bits in an order that integers have | COLUMNS - 1 - expert |       32 bits each

NaN, of either sign, has the largest of values, and both zeros have one. So the largest key is of the expert that the
CPU's op chooses, ties and NaN as there. Without a bias choices are those of the CPU to the last; with one they are made
of scores, which may differ from the CPU's by rounding. It reads logits once, and writes 12 bytes a choice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zcore.kernels.ops.topk_gate import SMALLEST_TOTAL, check_operands, check_operands_backward, fake
from zcore.kernels.triton.tiles import plan_whole_rows

__all__ = ["topk_gate", "topk_gate_backward"]

SMALLEST = tl.constexpr(SMALLEST_TOTAL)
TAKEN = tl.constexpr(-(2**63) + 1)  # below every key


@triton.jit
def total_of(x: tl.tensor, is_inside: tl.tensor, IS_SOFTMAX: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of each row the largest logit and the sum of exp(logit - largest), which only softmax needs."""
    largest = tl.max(tl.where(is_inside, x, -float("inf")), 1, keep_dims=True)
    total = largest
    if IS_SOFTMAX:
        total = tl.sum(tl.where(is_inside, tl.exp(x - largest), 0.0), 1, keep_dims=True)
    return largest, total


@triton.jit
def score_of(x: tl.tensor, largest: tl.tensor, total: tl.tensor, IS_SOFTMAX: tl.constexpr) -> tl.tensor:
    """Of logits."""
    if IS_SOFTMAX:
        return tl.exp(x - largest) / total
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def key_of(value: tl.tensor, column: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """An int64 that is larger for what comes first."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    is_nan = value != value  # noqa: PLR0124
    ordered = tl.where(is_nan, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (ordered.to(tl.int64) << 32) | (COLUMNS - 1 - column).to(tl.int64)


@triton.jit
def forward_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    k: tl.tensor,
    IS_SOFTMAX: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
) -> None:
    """The choices of ROWS tokens; `bias` may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_expert = column < num_experts
    is_inside = (row < tokens) & is_expert
    x = tl.load(logits + row * num_experts + column, mask=is_inside, other=0.0).to(tl.float32)
    largest, sum_of_row = total_of(x, is_expert, IS_SOFTMAX)
    scores = score_of(x, largest, sum_of_row, IS_SOFTMAX)
    values = x
    if bias is not None:
        values = scores + tl.load(bias + column, mask=is_expert, other=0.0).to(tl.float32)
    keys = tl.where(is_expert, key_of(values, column, COLUMNS), TAKEN)

    slot = tl.arange(0, CHOICES)[None, :]
    chosen = tl.zeros([ROWS, CHOICES], tl.int64)
    found = tl.zeros([ROWS, CHOICES], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32) + SMALLEST
    for choice in range(k):
        best = tl.max(keys, 1, keep_dims=True)
        is_best = keys == best
        score = tl.sum(tl.where(is_best, scores, 0.0), 1, keep_dims=True)
        chosen = tl.where(slot == choice, COLUMNS - 1 - (best & 0xFFFFFFFF), chosen)
        found = tl.where(slot == choice, score, found)
        total += score
        keys = tl.where(is_best, TAKEN, keys)
    if IS_NORMALISED:
        found = found / total
    at = row * k + slot
    is_choice = (row < tokens) & (slot < k)
    tl.store(weights + at, found, mask=is_choice)
    tl.store(experts + at, chosen, mask=is_choice)


@triton.jit
def backward_kernel(
    dweights: tl.tensor,
    logits: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    dlogits: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    k: tl.tensor,
    IS_SOFTMAX: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradient of ROWS tokens' logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_token = row < tokens
    is_inside = is_token & (column < num_experts)
    x = tl.load(logits + row * num_experts + column, mask=is_inside, other=0.0).to(tl.float32)
    largest, sum_of_row = total_of(x, column < num_experts, IS_SOFTMAX)

    total = tl.zeros([ROWS, 1], tl.float32) + 1.0
    shared = tl.zeros([ROWS, 1], tl.float32)  # the gradient of a score is (dweight - shared) / total
    if IS_NORMALISED:
        total = tl.zeros([ROWS, 1], tl.float32) + SMALLEST
        for choice in range(k):
            at = row * k + choice
            expert = tl.load(experts + at, mask=is_token, other=0)
            is_known = is_token & (expert >= 0) & (expert < num_experts)
            logit = tl.load(logits + row * num_experts + expert, mask=is_known, other=0.0).to(tl.float32)
            total += tl.where(is_known, score_of(logit, largest, sum_of_row, IS_SOFTMAX), 0.0)
            dweight = tl.load(dweights + at, mask=is_known, other=0.0)
            shared += dweight * tl.load(weights + at, mask=is_known, other=0.0)
    is_chosen = tl.zeros([ROWS, COLUMNS], tl.int1)
    dscores = tl.zeros([ROWS, COLUMNS], tl.float32)
    for choice in range(k):
        expert = tl.load(experts + row * k + choice, mask=is_token, other=-1)
        dscore = (tl.load(dweights + row * k + choice, mask=is_token, other=0.0) - shared) / total
        is_this = (column == expert) & (column < num_experts)
        dscores = tl.where(is_this, dscore, dscores)
        is_chosen = is_chosen | is_this
    scores = score_of(x, largest, sum_of_row, IS_SOFTMAX)
    if IS_SOFTMAX:
        along = tl.sum(tl.where(is_chosen, dscores * scores, 0.0), 1, keep_dims=True)
        found = scores * (dscores - along)
    else:
        found = tl.where(is_chosen, scores * (1.0 - scores) * dscores, 0.0)
    tl.store(dlogits + row * num_experts + column, found.to(dlogits.dtype.element_ty), mask=is_inside)


def topk_gate(
    logits: Tensor, k: int, scoring: str = "softmax", normalise: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and experts of each token; raises LayoutError and ConfigError for operands that are not served."""
    check_operands(logits, k, scoring, bias, device=logits.device)
    tokens, num_experts = logits.shape
    weights, experts = fake(logits, k, scoring, normalise, bias)
    tile = plan_whole_rows("topk_gate", num_experts)
    if tokens:
        forward_kernel[(triton.cdiv(tokens, tile.rows),)](
            logits,
            bias,
            weights,
            experts,
            tokens,
            num_experts,
            k,
            IS_SOFTMAX=scoring == "softmax",
            IS_NORMALISED=normalise,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            CHOICES=triton.next_power_of_2(k),
            num_warps=tile.num_warps,
        )
    return weights, experts


def topk_gate_backward(
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, scoring: str, normalise: bool
) -> Tensor:
    """The gradient of logits from that of weights. An expert that there is not counts as if it had not been chosen."""
    check_operands_backward(dweights, logits, weights, experts, scoring, device=logits.device)
    tokens, num_experts = logits.shape
    dlogits, tile = torch.empty_like(logits), plan_whole_rows("topk_gate_backward", num_experts)
    if tokens:
        backward_kernel[(triton.cdiv(tokens, tile.rows),)](
            dweights,
            logits,
            weights,
            experts,
            dlogits,
            tokens,
            num_experts,
            experts.shape[1],
            IS_SOFTMAX=scoring == "softmax",
            IS_NORMALISED=normalise,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return dlogits
