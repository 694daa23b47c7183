"""The chunk loop of a linear cross-entropy: logits of some tokens, their losses, and at once what needs these logits.

    hidden   |rows|rows|rows|r|      for each chunk
    logits   [rows, vocabulary]      one buffer, into which every chunk's logits are written, and then their gradient
    dhidden  |rows|rows|rows|r|      gradient @ weight
    dweight  [vocabulary, hidden]    += gradient^T @ rows, in fp32

After Liger Kernel (arXiv 2410.10989), where gradients are computed in the forward as well; arXiv 2411.09009 goes
further, and has no logits in memory at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zcore.kernels.ops.cross_entropy_rows import RowSettings

__all__ = ["Needs", "Products", "Rows", "choose_chunk_rows", "chunked_products"]

# Fewer rows make the matrix products slow and add up the weight's gradient more often. With 2048 tokens, hidden 576 and
# vocabulary 49152 on one core of an EPYC with AVX-512, others at work beside it: in bf16 128 rows 6.2 s, 256 rows 5.5
# s, 512 rows 4.8 s; in fp32 128 and 256 rows 4.4 s, 512 rows 6.1 s.
LEAST_ROWS = 256
# Of the weight's gradient, at a time, where a product has to be widened before it is added.
WIDENED_ROWS = 4096

Rows = Callable[..., Tensor]  # zcore.kernels.ops.cross_entropy_rows.cross_entropy_rows, or one like it


class Needs(NamedTuple):
    """Which operands need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class Products(NamedTuple):
    """Losses of all tokens, and gradients: those of weight and bias in fp32 at least; empty where none is needed."""

    losses: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


def choose_chunk_rows(tokens: int, *, hidden: int, vocabulary: int) -> int:
    """How many rows of logits take about as much memory as `tokens` of hidden, but no fewer than products need.

    >>> choose_chunk_rows(2048, hidden=576, vocabulary=49152), choose_chunk_rows(65536, hidden=4096, vocabulary=131072)
    (256, 2048)
    """
    return max(LEAST_ROWS, tokens * hidden // max(1, vocabulary))


def empty_products(hidden: Tensor, weight: Tensor, needs: Needs) -> Products:
    """What `chunked_products` returns, unwritten."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return Products(
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if needs.hidden else 0),
        hidden.new_empty(weight.shape if needs.weight else 0, dtype=wide),
        hidden.new_empty(weight.shape[0] if needs.bias else 0, dtype=wide),
    )


def chunked_products(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor | None,
    *,
    settings: RowSettings,
    needs: Needs,
    chunk_rows: int,
    rows: Rows,
) -> Products:
    """Losses and gradients of hidden, [tokens, hidden], weight, [vocabulary, hidden], and bias, [vocabulary].

    The gradient of a token's loss counts `factors` times, once where there are none.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    products = empty_products(hidden, weight, needs)
    products.dweight.zero_()
    products.dbias.zero_()
    buffer = hidden.new_empty(min(chunk_rows, tokens), vocabulary)
    for start in range(0, tokens, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, tokens))
        taken = hidden[chunk]
        logits = buffer[: taken.shape[0]]
        if bias is None:
            torch.mm(taken, weight.T, out=logits)
        else:
            torch.addmm(bias, taken, weight.T, out=logits)
        products.losses[chunk] = rows(
            logits, targets[chunk], None if factors is None else factors[chunk], settings, writes_gradient=any(needs)
        )
        if needs.hidden:
            torch.mm(logits, weight, out=products.dhidden[chunk])
        if needs.weight:
            _add_product(products.dweight, logits, taken)
        if needs.bias:
            products.dbias.add_(logits.sum(0, dtype=products.dbias.dtype))
    return products


def _add_product(total: Tensor, gradient: Tensor, taken: Tensor) -> None:
    """Add gradient^T @ taken; what is narrower than total is widened a part at a time."""
    if total.dtype == taken.dtype:
        total.addmm_(gradient.T, taken)
        return
    for start in range(0, total.shape[0], WIDENED_ROWS):
        part = slice(start, start + WIDENED_ROWS)
        total[part].add_(torch.mm(gradient[:, part].T, taken))
