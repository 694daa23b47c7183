"""The cross-entropy of a linear layer's outputs, of which no more than a chunk of rows is ever in memory.

    linear_cross_entropy(hidden, weight, targets, bias) -> loss

    hidden   [..., hidden]              weight   [vocabulary, hidden]
    targets  [...] int64                bias     [vocabulary], or none
    loss     one number, or [...] with reduction "none"; in fp32 at least

Gradients are computed in the forward, while a chunk's logits are there (ops/chunked_products.py), and of the sum of all
losses: in fp16 those of a mean would vanish before a loss scale reached them. They are kept until the backward, which
scales them in place. A second backward through a retained graph, and losses that are not reduced, whose tokens may
each have another gradient, go through the chunks again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.chunked_products import Needs, Products, choose_chunk_rows, chunked_products, empty_products
from zcore.kernels.ops.cross_entropy_rows import RowSettings, cross_entropy_rows
from zcore.kernels.ops.differentiable import register_backward
from zcore.kernels.ops.library import LIBRARY
from zcore.kernels.ops.pieces import FLOATS
from zcore.kernels.ops.registering import PRIORITY

__all__ = ["linear_cross_entropy", "reference"]

OP = "linear_cross_entropy"
SERVED = (*FLOATS, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
NO_NEEDS = Needs(False, False, False)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the ops below get, in the order of their schemas."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_softcap: float | None
    chunk_rows: int
    source: str  # who computes the losses of rows: "torch" or "triton"

    @property
    def of_rows(self) -> RowSettings:
        """What the loss of a row is made of."""
        return RowSettings(self.ignore_index, self.label_smoothing, self.z_loss, self.logit_softcap)

    @property
    def in_order(self) -> tuple[int, float, float, float | None, int, str]:
        """As an op takes them."""
        return (
            *(self.ignore_index, self.label_smoothing, self.z_loss),
            *(self.logit_softcap, self.chunk_rows, self.source),
        )


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,  # changes no result: all logits are one chunk here
) -> Tensor:
    """The cross_entropy of torch of all logits, widened to fp32 at least, plus z_loss * logsumexp(logits)^2.

    With a cap logits count as cap * tanh(logits / cap). The mean is over tokens that are not ignored; NaN of none.
    """
    logits = functional.linear(hidden, weight, bias)
    logits = logits.reshape(targets.numel(), weight.shape[0]).to(torch.promote_types(logits.dtype, torch.float32))
    if logit_softcap is not None:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    flat = targets.reshape(-1)
    losses = functional.cross_entropy(
        logits, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    is_kept = flat != ignore_index
    if z_loss:
        losses = losses + torch.where(is_kept, torch.logsumexp(logits, -1).square() * z_loss, 0.0)
    return _reduced(losses, is_kept, targets.shape, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    source: str | None = None,
) -> Tensor:
    """See `reference`; for fp32, bf16, fp16 and fp64 of any strides. Under autocast operands are cast as linear's are.

    chunk_rows: tokens whose logits are in memory at once; None for about as many bytes as hidden has, at least of 256
    tokens. source: who computes their losses, "torch" or "triton"; None for Triton on a CUDA device that has it.
    Raises LayoutError and ConfigError for operands and settings that cannot be served.

    >>> linear_cross_entropy(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))  # log(4)
    tensor(1.3863)
    """
    device = hidden.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check_operands(hidden, weight, targets, bias)
    if reduction not in REDUCTIONS:
        raise ConfigError(f"{OP}: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}.")
    if chunk_rows is None:
        chunk_rows = choose_chunk_rows(targets.numel(), hidden=hidden.shape[-1], vocabulary=weight.shape[0])
    if source is None:
        source = "triton" if device.type == "cuda" and hidden.dtype in FLOATS and _why_no_triton() is None else "torch"
    settings = Settings(ignore_index, label_smoothing, z_loss, logit_softcap, chunk_rows, source)
    _check_settings(settings)
    flat, rows = targets.reshape(-1), hidden.reshape(targets.numel(), hidden.shape[-1])
    needs = NO_NEEDS
    if reduction != "none" and torch.is_grad_enabled():
        needs = Needs(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    loss: Tensor = torch.ops.zcore.linear_cross_entropy_forward(
        rows, weight, flat, bias, *settings.in_order, reduction, list(needs)
    )[0]
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Of rows: the loss, the gradients that are needed of the sum of losses, and what they count in the loss."""
    *given, reduction, needs = rest
    products = _products(hidden, weight, targets, bias, None, Settings(*given), Needs(*needs))
    is_kept = targets != given[0]
    loss = _reduced(products.losses, is_kept, targets.shape, reduction)
    share = loss.new_ones(())
    if reduction == "mean":
        share = share / is_kept.sum().clamp(min=1)  # of no tokens, gradients are zero and not NaN, as torch's are
    return loss, *products[1:], share


def fake_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """What `linear_cross_entropy_forward` returns, unwritten."""
    *_, reduction, needs = rest
    losses, *gradients = empty_products(hidden, weight, Needs(*needs))
    return losses if reduction == "none" else losses.new_empty(()), *gradients, losses.new_empty(())


def linear_cross_entropy_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Of rows, whose losses have the gradients `dloss`, [tokens]: the gradients that are needed."""
    *given, needs = rest
    return tuple(_products(hidden, weight, targets, bias, dloss, Settings(*given), Needs(*needs))[1:])


def fake_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """What `linear_cross_entropy_backward` returns, unwritten."""
    return tuple(empty_products(hidden, weight, Needs(*rest[-1]))[1:])


def _products(  # noqa: PLR0917 - as the schemas have it
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    factors: Tensor | None,
    settings: Settings,
    needs: Needs,
) -> Products:
    _check_targets(targets, weight.shape[0], settings.ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):  # operands have been cast
        return chunked_products(
            hidden,
            weight,
            bias,
            targets,
            factors,
            settings=settings.of_rows,
            needs=needs,
            chunk_rows=settings.chunk_rows,
            rows=_rows_of(settings.source),
        )


def _reduced(losses: Tensor, is_kept: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / is_kept.sum() if reduction == "mean" else losses.sum()


def _rows_of(source: str) -> Callable[..., Tensor]:
    if source == "torch":
        return cross_entropy_rows
    found: Callable[..., Tensor] = import_module("zcore.kernels.triton.cross_entropy_rows").cross_entropy_rows
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, *ctx.given, ctx.reduction, _ = inputs
    _, *kept, share = output
    ctx.mark_non_differentiable(*kept, share)
    ctx.set_materialize_grads(False)  # zeros of the size of the weight, for what has no gradient
    ctx.save_for_backward(hidden, weight, targets, bias, share)
    # Not by save_for_backward: they are given away at the first backward, whose gradients they become.
    ctx.kept = None if ctx.reduction == "none" else [each.detach() for each in kept]


def _backward(ctx: Any, dloss: Tensor | None, *_of_kept: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * (len(ctx.given) + 6)
    hidden, weight, targets, bias, share = ctx.saved_tensors
    scale = dloss * share
    needs = [bool(each) for each in (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])]
    kept, ctx.kept = ctx.kept, None
    if kept is None or torch.is_grad_enabled():  # by an op of its own, which refuses to be differentiated
        gradients = torch.ops.zcore.linear_cross_entropy_backward(
            scale.expand(targets.shape), hidden, weight, targets, bias, *ctx.given, needs
        )
    else:
        gradients = [each.mul_(scale) if is_needed else each for each, is_needed in zip(kept, needs, strict=True)]
    dhidden, dweight, dbias = (
        each.to(hidden.dtype) if is_needed else None for each, is_needed in zip(gradients, needs, strict=True)
    )
    return dhidden, dweight, None, dbias, *(None for _ in ctx.given), None, None


def _check_operands(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise LayoutError(
            f"{OP}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected [..., hidden] "
            "and [vocabulary, hidden]."
        )
    if targets.shape != hidden.shape[:-1]:
        raise LayoutError(
            f"{OP}: targets have shape {tuple(targets.shape)}; expected {tuple(hidden.shape[:-1])}, one for each row "
            "of hidden."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LayoutError(f"{OP}: bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape[:1])}.")
    if targets.dtype is not torch.int64:
        raise ConfigError(f"{OP}: targets are {targets.dtype}; expected torch.int64. Convert them.")
    if hidden.dtype not in SERVED:
        raise ConfigError(f"{OP}: hidden is {hidden.dtype}; expected {', '.join(map(str, SERVED))}. Convert it.")
    for name, each in (("weight", weight), ("bias", bias), ("targets", targets)):
        if each is not None and each.device != hidden.device:
            raise LayoutError(
                f"{OP}: {name} is on {each.device}; expected {hidden.device}, as hidden is. Move it there."
            )
        if each is not None and each is not targets and each.dtype is not hidden.dtype:
            raise ConfigError(
                f"{OP}: {name} is {each.dtype}; expected {hidden.dtype}, as hidden is. Convert one of them."
            )


def _check_settings(settings: Settings) -> None:
    if not 0.0 <= settings.label_smoothing <= 1.0:
        raise ConfigError(f"{OP}: label_smoothing is {settings.label_smoothing}; expected 0 to 1.")
    if settings.logit_softcap is not None and not settings.logit_softcap > 0.0:
        raise ConfigError(f"{OP}: logit_softcap is {settings.logit_softcap}; expected more than 0, or None for no cap.")
    if settings.chunk_rows < 1:
        raise ConfigError(f"{OP}: chunk_rows is {settings.chunk_rows}; expected 1 or more, or None to have it chosen.")
    if settings.source not in {"torch", "triton"}:
        raise ConfigError(f"{OP}: source is {settings.source!r}; expected torch or triton, or None to have it chosen.")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if not targets.is_cpu or not targets.numel():  # on another device this would wait for it
        return
    kept = targets.where(targets != ignore_index, 0)
    least, most = int(kept.min()), int(kept.max())
    if least < 0 or most >= vocabulary:
        raise LayoutError(
            f"{OP}: targets are from {least} to {most}; expected 0 to {vocabulary - 1}, the rows of weight, or "
            f"ignore_index, {ignore_index}."
        )


@cache  # looks through the folders of sys.path
def _why_no_triton() -> str | None:
    return None if find_spec("triton") else "needs Triton: pip install 'zcore-kernels[triton]'"


_OPERANDS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
_GIVEN = "int ignore_index, float label_smoothing, float z_loss, float? logit_softcap, int chunk_rows, str source"
_KEYWORDS = (
    "int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, float? logit_softcap=None, "
    'str reduction="mean", int? chunk_rows=None, str? source=None'
)

register_backward(
    "linear_cross_entropy_backward",
    f"(Tensor dloss, {_OPERANDS}, {_GIVEN}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    cpu=linear_cross_entropy_backward,
    fake=fake_backward,
)
LIBRARY.define(
    f"linear_cross_entropy_forward({_OPERANDS}, {_GIVEN}, str reduction, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("linear_cross_entropy_forward", linear_cross_entropy_forward, "CPU")
LIBRARY.impl("linear_cross_entropy_forward", linear_cross_entropy_forward, "CUDA")
LIBRARY.impl("linear_cross_entropy_backward", linear_cross_entropy_backward, "CUDA")
torch.library.register_fake("zcore::linear_cross_entropy_forward", fake_forward, lib=LIBRARY)
torch.library.register_autograd("zcore::linear_cross_entropy_forward", _backward, setup_context=_setup, lib=LIBRARY)
LIBRARY.define(f"{OP}({_OPERANDS}=None, *, {_KEYWORDS}) -> Tensor")
LIBRARY.impl(OP, linear_cross_entropy, "CompositeImplicitAutograd")
ops.reference(OP)(reference)
ops.implementation(OP, source="torch", priority=PRIORITY, devices=("cpu", "cuda"), dtypes=SERVED)(
    partial(linear_cross_entropy, source="torch")
)
ops.implementation(
    OP, source="triton", priority=PRIORITY + 1, devices=("cuda",), dtypes=FLOATS, why_unavailable=_why_no_triton
)(partial(linear_cross_entropy, source="triton"))
