"""The sum or mean of quantised shards, quantised again, in one pass: within a quantised reduce-scatter.

ZeRO++, arXiv 2306.10209, section 3.3. The formula stands in native/include/zcore/dequantize_reduce_requantize.hpp.
"""

from collections.abc import Sequence

from torch import Tensor

from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.compiled import run
from zcore.kernels.ops.dequantize_blockwise import reference as dequantize
from zcore.kernels.ops.noise import word_of
from zcore.kernels.ops.operands import check_place, device_of
from zcore.kernels.ops.quantize_blockwise import reference as quantize
from zcore.kernels.ops.quantized import FORMATS, Quantized, QuantizedLayout, format_named
from zcore.kernels.ops.registering import register

__all__ = ["dequantize_reduce_requantize", "factor_of", "reference", "require_shards"]

OP = "dequantize_reduce_requantize"


def reference(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    *,
    format: str,
    block_size: int,
    numel: int,
    reduction: str = "mean",
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    """Codes, scales and zero points of the mean (or "sum") of shards that `quantize_blockwise` made, alike in layout.

    In fp32, added in the order of the list. seed, offset: as in `quantize_blockwise`, for the result.

    >>> import torch
    >>> ones, no_points = torch.tensor([127, 0], dtype=torch.int8), torch.empty(0, dtype=torch.int8)
    >>> scales = [torch.tensor([1.0]), torch.tensor([3.0])]
    >>> reference([ones] * 2, scales, [no_points] * 2, format="int8", block_size=2, numel=2)
    (tensor([127,   0], dtype=torch.int8), tensor([2.]), tensor([], dtype=torch.int8))
    """
    factor = factor_of(reduction, len(codes))
    is_symmetric = zero_points[0].numel() == 0
    total: Tensor | None = None
    for shard in zip(codes, scales, zero_points, strict=True):
        values = dequantize(*shard, format=format, block_size=block_size, numel=numel)
        total = values if total is None else total + values
    assert total is not None
    return quantize(
        total * factor, format=format, block_size=block_size, is_symmetric=is_symmetric, seed=seed, offset=offset
    )


def dequantize_reduce_requantize(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    *,
    format: str,
    block_size: int,
    numel: int,
    reduction: str = "mean",
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    """See `reference`; of contiguous memory, on the CPU or CUDA. Raises LayoutError and ConfigError for others."""
    factor = factor_of(reduction, len(codes))
    layout = require_shards(
        codes, scales, zero_points, format=format, block_size=block_size, numel=numel, offset=offset
    )
    device = device_of(codes[0])
    made = layout.empty(device)
    run(
        OP,
        device,
        [address for shard in zip(codes, scales, zero_points, strict=True) for address in layout.addresses(shard)],
        layout.addresses(made),
        factor=factor,
        numel=numel,
        block_size=block_size,
        format=layout.format.number,
        is_stochastic=seed is not None,
        seed=word_of(seed or 0),
        offset=offset,
    )
    return made


def require_shards(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    *,
    format: str,
    block_size: int,
    numel: int,
    offset: int,
) -> QuantizedLayout:
    """The layout of one shard or more; raises LayoutError and ConfigError unless all have it, on the first's device."""
    if not len(codes) == len(scales) == len(zero_points):
        raise LayoutError(
            f"{OP} got {len(codes)} codes, {len(scales)} scales and {len(zero_points)} zero_points; expected as many "
            "of each. Where blocks are symmetric, zero_points are empty tensors."
        )
    layout = QuantizedLayout(numel, block_size, format_named(OP, format), zero_points[0].numel() == 0)
    layout.require(OP)
    check_place(OP, offset)
    device = device_of(codes[0])
    for index, shard in enumerate(zip(codes, scales, zero_points, strict=True)):
        layout.require_operands(OP, *shard, device=device, index=f"[{index}]")
    return layout


def factor_of(reduction: str, num_shards: int) -> float:
    """What the sum of shards is multiplied by; raises LayoutError for no shards, ConfigError for no such reduction."""
    if num_shards < 1:
        raise LayoutError(f"{OP} got no shards; expected one or more.")
    if reduction not in {"mean", "sum"}:
        raise ConfigError(f"{OP}: reduction is {reduction}; expected mean or sum.")
    return 1.0 / num_shards if reduction == "mean" else 1.0


def _fake(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    *,
    format: str,
    block_size: int,
    numel: int,
    reduction: str = "mean",
    seed: int | None = None,
    offset: int = 0,
) -> Quantized:
    is_symmetric = zero_points[0].numel() == 0
    return QuantizedLayout(numel, block_size, format_named(OP, format), is_symmetric).empty(codes[0].device)


register(
    OP,
    "(Tensor[] codes, Tensor[] scales, Tensor[] zero_points, *, str format, SymInt block_size, SymInt numel,"
    ' str reduction="mean", int? seed=None, SymInt offset=0) -> (Tensor, Tensor, Tensor)',
    reference=reference,
    cpu=dequantize_reduce_requantize,
    cuda=dequantize_reduce_requantize,
    triton="dequantize_reduce_requantize",
    fake=_fake,
    dtypes=tuple(kind.dtype for kind in FORMATS.values()),
)
