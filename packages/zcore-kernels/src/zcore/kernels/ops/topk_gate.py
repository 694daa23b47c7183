"""The gate of a mixture of experts; formulas in native/include/zcore/topk_gate.hpp (arXiv 1701.06538, 2412.19437).

topk_gate(logits, k, scoring, normalise, bias) -> weights, experts

    logits    [tokens, num_experts]
    bias      [num_experts]         moves the choice, never a weight, and gets no gradient
    weights   [tokens, k] fp32      scores of the chosen, normalised to a sum of 1
    experts   [tokens, k] int64     best first; of equals the lower, and NaN above all, as torch.topk has it

A choice without a bias is made of the logits themselves, with which both scores grow, so it is the same on any machine.
"""

from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels import _cpu
from zcore.kernels.ops.differentiable import register_backward, register_differentiable
from zcore.kernels.ops.operands import CPU, check, check_indices, operand

__all__ = ["SMALLEST_TOTAL", "check_operands", "check_operands_backward", "fake", "reference", "topk_gate"]

SCORINGS = {"softmax": 0, "sigmoid": 1}  # as zcore::Scoring counts them
SMALLEST_TOTAL = 1e-20  # added to the sum of the chosen scores, which may all be 0


def reference(
    logits: Tensor, k: int, scoring: str = "softmax", normalise: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of each token the `k` best experts, and by how much each counts; computed in fp32 at least.

    Raises LayoutError unless logits are a matrix, ConfigError for a `k` or `scoring` there is not.
    """
    _check_choice("topk_gate", logits, k, scoring)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    values = wide if bias is None else scores + bias.to(wide.dtype)
    experts = values.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    weights = scores.gather(-1, experts)
    return weights / (weights.sum(-1, keepdim=True) + SMALLEST_TOTAL) if normalise else weights, experts


def _check_choice(op: str, logits: Tensor, k: int, scoring: str) -> None:
    if logits.ndim != 2:
        raise LayoutError(f"{op}: logits has shape {tuple(logits.shape)}; expected [tokens, num_experts].")
    if scoring not in SCORINGS:
        raise ConfigError(f"{op}: scoring is {scoring!r}; expected {' or '.join(map(repr, SCORINGS))}.")
    if not 1 <= k <= logits.shape[1]:
        raise ConfigError(f"{op}: k is {k}; expected 1 to {logits.shape[1]}, the number of experts.")


def check_operands(logits: Tensor, k: int, scoring: str, bias: Tensor | None, *, device: torch.device = CPU) -> None:
    """Raise LayoutError or ConfigError unless `topk_gate` takes these on `device`."""
    _check_choice("topk_gate", logits, k, scoring)
    check("topk_gate", "logits", logits, device=device)
    if bias is not None:
        check("topk_gate", "bias", bias, shape=logits.shape[1:], device=device)


def check_operands_backward(
    dweights: Tensor,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    scoring: str,
    *,
    device: torch.device = CPU,
) -> None:
    """The same for its gradient, but for the values of `experts`."""
    op = "topk_gate_backward"
    _check_choice(op, logits, experts.shape[-1], scoring)
    check(op, "logits", logits, device=device)
    check(op, "experts", experts, shape=(logits.shape[0], experts.shape[-1]), dtypes=(torch.int64,), device=device)
    for name, each in (("dweights", dweights), ("weights", weights)):
        check(op, name, each, shape=experts.shape, dtypes=(torch.float32,), device=device)


def topk_gate(
    logits: Tensor, k: int, scoring: str = "softmax", normalise: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference`; on the CPU, for fp32, bf16 and fp16. Raises LayoutError and ConfigError for other operands."""
    check_operands(logits, k, scoring, bias)
    tokens, num_experts = logits.shape
    weights, experts = fake(logits, k, scoring, normalise, bias)
    _cpu.topk_gate(
        operand(logits),
        operand(bias),
        weights.data_ptr(),
        experts.data_ptr(),
        tokens,
        num_experts,
        k,
        SCORINGS[scoring],
        normalise,
        torch.get_num_threads(),
    )
    return weights, experts


def fake(
    logits: Tensor, k: int, scoring: str = "softmax", normalise: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `topk_gate` returns, unwritten."""
    shape = logits.shape[0], k
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def topk_gate_backward(  # noqa: PLR0917 - as the schema has it
    dweights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, scoring: str, normalise: bool
) -> Tensor:
    """The gradient of logits from that of weights."""
    check_operands_backward(dweights, logits, weights, experts, scoring)
    tokens, num_experts = logits.shape
    check_indices("topk_gate_backward", "experts", experts, num_experts, "the width of logits")
    dlogits = torch.empty_like(logits)
    _cpu.topk_gate_backward(
        dweights.data_ptr(),
        operand(logits),
        weights.data_ptr(),
        experts.data_ptr(),
        operand(dlogits),
        tokens,
        num_experts,
        experts.shape[-1],
        SCORINGS[scoring],
        normalise,
        torch.get_num_threads(),
    )
    return dlogits


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.scoring, ctx.normalise, _ = inputs
    ctx.save_for_backward(logits, *output)


def _backward(ctx: Any, dweights: Tensor, _dexperts: None) -> tuple[Tensor | None, ...]:
    operands = dweights.contiguous(), *ctx.saved_tensors
    return torch.ops.zcore.topk_gate_backward(*operands, ctx.scoring, ctx.normalise), None, None, None, None


register_backward(
    "topk_gate_backward",
    "(Tensor dweights, Tensor logits, Tensor weights, Tensor experts, str scoring, bool normalise) -> Tensor",
    cpu=topk_gate_backward,
    fake=lambda dweights, logits, weights, experts, scoring, normalise: torch.empty_like(logits),
    triton="topk_gate",
)
register_differentiable(
    "topk_gate",
    '(Tensor logits, int k, str scoring="softmax", bool normalise=True, Tensor? bias=None) -> (Tensor, Tensor)',
    reference=reference,
    cpu=topk_gate,
    fake=fake,
    setup_context=_setup,
    backward=_backward,
    triton="topk_gate",
)
