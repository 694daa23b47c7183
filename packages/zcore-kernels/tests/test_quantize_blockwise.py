"""quantize_blockwise and dequantize_blockwise: as their references say, for every format, dtype, length and block."""

import pytest
import torch
from devices import DEVICES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_inputs import (
    CHECKS_OF_FLOAT8,
    FLOAT_DTYPES,
    FORMATS_AND_SYMMETRY,
    equal_bits,
    moved,
    on_threads,
    some_values,
    values_of,
)
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops import dequantize_blockwise as dequantizing
from zcore.kernels.ops import quantize_blockwise as quantizing
from zcore.kernels.ops.dequantize_blockwise import dequantize_blockwise
from zcore.kernels.ops.quantize_blockwise import quantize_blockwise

BLOCK_SIZES = [2, 6, 32, 64, 250, 256, 4096]
CPU = torch.device("cpu")


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=300)
@given(
    values=some_values(),
    kind=st.sampled_from(FORMATS_AND_SYMMETRY),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    offset=st.sampled_from([0, 1, 2**32 - 100, 2**40]),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_codes_and_values_are_those_of_the_references(
    *,
    device: str,
    values: Tensor,
    kind: tuple[str, bool],
    block_size: int,
    seed: int | None,
    offset: int,
    dtype: torch.dtype,
) -> None:
    name, is_symmetric = kind
    options = {"format": name, "block_size": block_size, "is_symmetric": is_symmetric, "seed": seed, "offset": offset}
    made = quantize_blockwise(moved(values, device), **options)
    expected = quantizing.reference(values, **options)
    assert all(equal_bits(each.cpu(), other) for each, other in zip(made, expected, strict=True))
    sizes = {"format": name, "block_size": block_size, "numel": values.numel(), "dtype": dtype}
    assert equal_bits(dequantize_blockwise(*made, **sizes).cpu(), dequantizing.reference(*expected, **sizes))


@pytest.mark.parametrize(("format", "is_symmetric"), FORMATS_AND_SYMMETRY)
def test_a_block_that_is_not_finite_reads_as_nan_and_spoils_no_other(format: str, is_symmetric: bool) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        values = values_of(100, seed=1)
        values[40] = bad
        made = quantize_blockwise(values, format=format, block_size=32, is_symmetric=is_symmetric)
        read = dequantize_blockwise(*made, format=format, block_size=32, numel=100)
        assert read.isnan().nonzero().flatten().tolist() == list(range(32, 64))


@pytest.mark.parametrize(("format", "is_symmetric"), FORMATS_AND_SYMMETRY)
def test_zero_stays_zero(format: str, is_symmetric: bool) -> None:
    values = torch.tensor([0.0, 3.0, 5.0, 0.0, -0.0, -7.0, 0.0])
    for seed in (None, 3):
        made = quantize_blockwise(values, format=format, block_size=4, is_symmetric=is_symmetric, seed=seed)
        read = dequantize_blockwise(*made, format=format, block_size=4, numel=7)
        assert read[values == 0].tolist() == [0.0] * 4


@pytest.mark.parametrize(("format", "is_symmetric"), FORMATS_AND_SYMMETRY)
def test_stochastic_rounding_is_right_on_average(format: str, is_symmetric: bool) -> None:
    value, numel = 0.7283, 1 << 17
    values = torch.full((numel,), value)
    values[::64] = 1.3  # the largest of each block, so that `value` is no multiple of the scale
    made = quantize_blockwise(values, format=format, block_size=16384, is_symmetric=is_symmetric, seed=5)
    read = dequantize_blockwise(*made, format=format, block_size=16384, numel=numel).double()
    small = read[values == torch.tensor(value)]
    assert len(small.unique()) == 2
    low, high = small.min().item(), small.max().item()
    chance = (value - low) / (high - low)
    deviation = (chance * (1 - chance) / len(small)) ** 0.5
    assert abs((small == high).double().mean().item() - chance) < 5 * deviation


def test_the_number_of_threads_changes_nothing() -> None:
    values = values_of(300_001, seed=2)
    results = []
    for count in (1, 2):
        with on_threads(count):
            made = quantize_blockwise(values, format="int4", block_size=128, is_symmetric=False, seed=4)
            results.append((*made, dequantize_blockwise(*made, format="int4", block_size=128, numel=300_001)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_part_is_rounded_as_it_is_in_the_whole() -> None:
    values = values_of(1000, seed=3)
    codes, scales, _ = quantize_blockwise(values, format="int8", block_size=100, seed=4)
    part, of_part, _ = quantize_blockwise(values[300:], format="int8", block_size=100, seed=4, offset=300)
    assert torch.equal(codes[300:], part) and torch.equal(scales[3:], of_part)


@needs_cuda
@pytest.mark.parametrize("block_size", [1, 48, 100, 256, 1024, 5000, 16384])
@pytest.mark.parametrize("kind", FORMATS_AND_SYMMETRY)
def test_a_gpu_has_the_bits_of_the_cpu(kind: tuple[str, bool], block_size: int) -> None:
    name, is_symmetric = kind
    block_size += block_size % 2 if name == "int4" else 0
    values = values_of(1_000_003, seed=2, num_special=5)
    for seed in (None, 4):
        options = {"format": name, "block_size": block_size, "is_symmetric": is_symmetric, "seed": seed}
        made, expected = (quantize_blockwise(values.to(device), **options) for device in ("cuda", "cpu"))
        assert all(equal_bits(each.cpu(), other) for each, other in zip(made, expected, strict=True))
        sizes = {"format": name, "block_size": block_size, "numel": values.numel()}
        assert equal_bits(dequantize_blockwise(*made, **sizes).cpu(), dequantize_blockwise(*expected, **sizes))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("format", "is_symmetric"), [("int8", True), ("int4", False), ("float8_e5m2", True)])
def test_torch_knows_the_ops(format: str, is_symmetric: bool, device: str) -> None:
    values = values_of(77, seed=1).to(device)
    options = {"format": format, "block_size": 32, "is_symmetric": is_symmetric, "seed": 3}
    tests = CHECKS_OF_FLOAT8 if format.startswith("float8") else "ALL"
    torch.library.opcheck(torch.ops.zcore.quantize_blockwise.default, (values,), options, test_utils=tests)
    made = quantize_blockwise(values, **options)
    sizes = {"format": format, "block_size": 32, "numel": 77, "dtype": torch.bfloat16}
    torch.library.opcheck(torch.ops.zcore.dequantize_blockwise.default, made, sizes, test_utils=tests)


def test_the_registry_serves_the_compiled_ops() -> None:
    registered = ops.implementations()
    for op in ("quantize_blockwise", "dequantize_blockwise"):
        assert [item.source for item in registered[op]] == ["cpp", "cuda", "triton", "reference"]
    serve = ops.get("quantize_blockwise", device=CPU, dtype=torch.bfloat16)
    read = ops.get("dequantize_blockwise", device=CPU, dtype=torch.float8_e4m3fn)
    made = serve(torch.ones(3, dtype=torch.bfloat16), format="float8_e4m3fn", block_size=2)
    assert read(*made, format="float8_e4m3fn", block_size=2, numel=3).tolist() == [1.0, 1.0, 1.0]


ONES = torch.ones(64)
MADE = quantize_blockwise(ONES, format="int8", block_size=32)


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        (ONES.double(), {}, ConfigError, "values is torch.float64; expected torch.float32, torch.bfloat16"),
        (ONES.to("meta"), {}, LayoutError, "values is on meta; expected the CPU"),
        (ONES.view(8, 8).t(), {}, LayoutError, "has strides (1, 8); expected contiguous"),
        (ONES, {"format": "int7"}, ConfigError, "format is int7; expected int8, int4, float8_e4m3fn, float8_e5m2"),
        (ONES, {"block_size": 0}, ConfigError, "block_size is 0; expected from 1 to 16384"),
        (ONES, {"block_size": 16385}, ConfigError, "block_size is 16385"),
        (ONES, {"format": "int4", "block_size": 33}, ConfigError, "expected an even number from 2"),
        (ONES, {"format": "float8_e5m2", "is_symmetric": False}, ConfigError, "float8_e5m2 has no zero points"),
        (ONES, {"offset": -1}, ConfigError, "offset is -1; expected the place"),
    ],
)
def test_quantising_refuses_by_name(
    values: Tensor, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        quantize_blockwise(values, **({"format": "int8", "block_size": 32} | options))  # type: ignore[arg-type]
    assert message in str(caught.value) and str(caught.value).startswith("quantize_blockwise: ")


@pytest.mark.parametrize(
    ("changed", "options", "error", "message"),
    [
        ({0: MADE[0].to(torch.uint8)}, {}, ConfigError, "codes is torch.uint8; expected torch.int8"),
        ({0: MADE[0][:63]}, {}, LayoutError, "codes has 63 elements; expected 64"),
        ({0: MADE[0].expand(2, 64)[:, ::2]}, {}, LayoutError, "codes, of shape (2, 32), has strides"),
        ({1: MADE[1][:1]}, {}, LayoutError, "scales has 1 elements; expected 2"),
        ({1: MADE[1].half()}, {}, ConfigError, "scales is torch.float16"),
        ({2: torch.zeros(3, dtype=torch.int8)}, {}, LayoutError, "zero_points has 3 elements; expected 2"),
        ({}, {"numel": 65}, LayoutError, "codes has 64 elements; expected 65"),
        ({}, {"numel": -1}, ConfigError, "numel is -1"),
        ({}, {"dtype": torch.float64}, ConfigError, "the result is torch.float64"),
    ],
)
def test_reading_refuses_by_name(
    changed: dict[int, Tensor], options: dict[str, object], error: type[Exception], message: str
) -> None:
    operands = [changed.get(index, each) for index, each in enumerate(MADE)]
    sizes = {"format": "int8", "block_size": 32, "numel": 64} | options
    with pytest.raises(error) as caught:
        dequantize_blockwise(*operands, **sizes)  # type: ignore[arg-type]
    assert message in str(caught.value) and str(caught.value).startswith("dequantize_blockwise: ")
