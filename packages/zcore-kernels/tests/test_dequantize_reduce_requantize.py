"""dequantize_reduce_requantize: what three ops do in three passes, in one."""

from collections.abc import Callable

import pytest
import torch
from devices import DEVICES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_inputs import CHECKS_OF_FLOAT8, FORMATS_AND_SYMMETRY, equal_bits, moved, on_threads, values_of
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.dequantize_blockwise import dequantize_blockwise
from zcore.kernels.ops.dequantize_reduce_requantize import dequantize_reduce_requantize, reference
from zcore.kernels.ops.quantize_blockwise import quantize_blockwise

Columns = tuple[list[Tensor], list[Tensor], list[Tensor]]


def shards_of(count: int, numel: int, *, format: str, is_symmetric: bool, num_special: int = 0) -> Columns:
    made = [
        quantize_blockwise(
            values_of(numel, seed=each, num_special=num_special),
            format=format,
            block_size=32,
            is_symmetric=is_symmetric,
        )
        for each in range(count)
    ]
    codes, scales, zero_points = zip(*made, strict=True)
    return list(codes), list(scales), list(zero_points)


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=150)
@given(
    count=st.integers(1, 5),
    numel=st.integers(0, 300),
    kind=st.sampled_from(FORMATS_AND_SYMMETRY),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.none() | st.integers(0, 100),
    num_special=st.integers(0, 1),
)
def test_it_is_what_the_reference_says(
    *,
    device: str,
    count: int,
    numel: int,
    kind: tuple[str, bool],
    reduction: str,
    seed: int | None,
    num_special: int,
) -> None:
    name, is_symmetric = kind
    shards = shards_of(count, numel, format=name, is_symmetric=is_symmetric, num_special=num_special)
    options = {"format": name, "block_size": 32, "numel": numel, "reduction": reduction, "seed": seed, "offset": 7}
    made = dequantize_reduce_requantize(*moved(shards, device), **options)
    assert all(equal_bits(each.cpu(), other) for each, other in zip(made, reference(*shards, **options), strict=True))


def test_the_mean_is_within_half_a_code_of_the_mean_in_double() -> None:
    shards = shards_of(8, 1000, format="int8", is_symmetric=False)
    sizes = {"format": "int8", "block_size": 32, "numel": 1000}
    made = dequantize_reduce_requantize(*shards, **sizes)
    exact = sum(dequantize_blockwise(*shard, **sizes).double() for shard in zip(*shards, strict=True)) / 8
    distance = (dequantize_blockwise(*made, **sizes).double() - exact).abs()
    assert bool((distance <= 0.5001 * made[1].repeat_interleave(32)[:1000]).all())


def test_the_number_of_threads_changes_nothing() -> None:
    shards = shards_of(3, 150_001, format="int4", is_symmetric=True)
    results = []
    for count in (1, 2):
        with on_threads(count):
            results.append(dequantize_reduce_requantize(*shards, format="int4", block_size=32, numel=150_001, seed=1))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@needs_cuda
@pytest.mark.parametrize("count", [2, 16, 17, 130])
def test_a_gpu_has_the_bits_of_the_cpu_for_few_shards_and_many(count: int) -> None:
    shards = shards_of(count, 100_001, format="int4", is_symmetric=False)
    options = {"format": "int4", "block_size": 32, "numel": 100_001, "seed": 3}
    made, expected = (dequantize_reduce_requantize(*moved(shards, device), **options) for device in ("cuda", "cpu"))
    assert all(equal_bits(each.cpu(), other) for each, other in zip(made, expected, strict=True))


@needs_cuda
def test_a_gpu_refuses_more_shards_than_a_launch_can_name() -> None:
    shards = moved(shards_of(1, 64, format="int8", is_symmetric=True), "cuda")
    with pytest.raises(ValueError, match="dequantize_reduce_requantize got 1025 shards; expected 1 to 1024"):
        dequantize_reduce_requantize(*(each * 1025 for each in shards), format="int8", block_size=32, numel=64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("format", "is_symmetric"), [("int8", True), ("int4", False), ("float8_e5m2", True)])
def test_torch_knows_the_op(format: str, is_symmetric: bool, device: str) -> None:
    shards = moved(shards_of(2, 77, format=format, is_symmetric=is_symmetric), device)
    options = {"format": format, "block_size": 32, "numel": 77}
    tests = CHECKS_OF_FLOAT8 if format.startswith("float8") else "ALL"
    torch.library.opcheck(torch.ops.zcore.dequantize_reduce_requantize.default, shards, options, test_utils=tests)


def test_the_registry_serves_the_compiled_op() -> None:
    sources = [item.source for item in ops.implementations()["dequantize_reduce_requantize"]]
    assert sources == ["cpp", "cuda", "triton", "reference"]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda c, s, z: ([], [], []), {}, LayoutError, "got no shards"),
        (lambda c, s, z: (c, s[:1], z), {}, LayoutError, "got 2 codes, 1 scales and 2 zero_points"),
        (lambda c, s, z: ([c[0], c[1][1:]], s, z), {}, LayoutError, "codes[1] has 63 elements; expected 64"),
        (lambda c, s, z: ([c[0], c[1].view(torch.uint8)], s, z), {}, ConfigError, "codes[1] is torch.uint8"),
        (lambda c, s, z: (c, [s[0], s[1].to("meta")], z), {}, LayoutError, "scales[1] is on meta"),
        (lambda c, s, z: (c, s, [z[0], c[0][:2]]), {}, LayoutError, "zero_points[1] has 2 elements; expected 0"),
        (lambda c, s, z: (c, s, z), {"reduction": "max"}, ConfigError, "reduction is max; expected mean or sum"),
        (lambda c, s, z: (c, s, z), {"format": "int5"}, ConfigError, "format is int5"),
    ],
)
def test_it_refuses_by_name(
    change: Callable[..., Columns], options: dict[str, object], error: type[Exception], message: str
) -> None:
    shards = change(*shards_of(2, 64, format="int8", is_symmetric=True))
    with pytest.raises(error) as caught:
        dequantize_reduce_requantize(*shards, **({"format": "int8", "block_size": 32, "numel": 64} | options))
    assert message in str(caught.value) and "dequantize_reduce_requantize" in str(caught.value)
