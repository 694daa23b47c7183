"""pack_signs and unpack_signs: one bit an element, and nothing lost that the error does not keep."""

import pytest
import torch
from devices import DEVICES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_inputs import FLOAT_DTYPES, equal_bits, moved, on_threads, some_values, values_of
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops import pack_signs as packing
from zcore.kernels.ops import unpack_signs as unpacking
from zcore.kernels.ops.pack_signs import pack_signs
from zcore.kernels.ops.unpack_signs import unpack_signs


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=200)
@given(
    values=some_values(),
    block_size=st.sampled_from([8, 24, 64, 256, 4096, 12024, 12272]),
    start=st.integers(0, 5),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_signs_scales_and_errors_are_those_of_the_references(
    device: str, values: Tensor, block_size: int, start: int, dtype: torch.dtype
) -> None:
    error = values_of(values.numel() + start, seed=9)[start:]
    of_reference, there = error.clone(), moved(error, device)
    made = pack_signs(moved(values, device), there, block_size=block_size)
    signs, scales, error = (each.cpu() for each in (*made, there))
    expected_signs, expected_scales = packing.reference(values, of_reference, block_size=block_size)
    assert torch.equal(signs, expected_signs)
    # The reference adds up in another order: in double, so that only the last bit of a scale can differ.
    torch.testing.assert_close(scales, expected_scales, rtol=2e-7, atol=1e-45, equal_nan=True)
    slack = 2e-7 * scales.nan_to_num(posinf=0.0).repeat_interleave(block_size)[: values.numel()] + 1e-45
    is_near = (error - of_reference).abs() <= slack + 2e-7 * error.abs()
    assert bool((is_near | (error == of_reference) | (error.isnan() & of_reference.isnan())).all())
    sizes = {"block_size": block_size, "numel": values.numel(), "dtype": dtype}
    assert equal_bits(unpack_signs(*made, **sizes).cpu(), unpacking.reference(signs, scales, **sizes))


def test_what_a_call_loses_the_next_ones_add() -> None:
    values, error = values_of(256, seed=1) * 0.01, torch.zeros(256)
    total = torch.zeros(256, dtype=torch.float64)
    for calls in range(1, 201):
        signs, scales = pack_signs(values, error, block_size=64)
        total += unpack_signs(signs, scales, block_size=64, numel=256)
        torch.testing.assert_close(total + error, values.double() * calls, rtol=1e-4, atol=1e-4)


def test_a_block_that_is_not_finite_reads_as_nan_and_keeps_its_error() -> None:
    values, error = values_of(100, seed=1), values_of(100, seed=2)
    before, values[50] = error.clone(), torch.inf
    read = unpack_signs(*pack_signs(values, error, block_size=32), block_size=32, numel=100)
    assert read.isnan().nonzero().flatten().tolist() == list(range(32, 64))
    assert (error == before).nonzero().flatten().tolist() == list(range(32, 64))


def test_the_number_of_threads_changes_nothing() -> None:
    values, results = values_of(300_001, seed=2), []
    for count in (1, 2):
        with on_threads(count):
            error = values_of(300_001, seed=3)
            made = pack_signs(values, error, block_size=4096)
            results.append((*made, error, unpack_signs(*made, block_size=4096, numel=300_001)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@needs_cuda
@pytest.mark.parametrize("block_size", [8, 24, 256, 2048, 5000, 16384])
def test_a_gpu_has_the_bits_of_the_cpu(block_size: int) -> None:
    values, error = values_of(1_000_003, seed=2), values_of(1_000_003, seed=3)
    values[500_000] = torch.inf
    made, results = {}, []
    for device in ("cuda", "cpu"):
        made[device] = error.to(device, copy=True)
        found = pack_signs(values.to(device), made[device], block_size=block_size)
        results.append((*found, made[device], unpack_signs(*found, block_size=block_size, numel=1_000_003)))
    assert all(equal_bits(there.cpu(), here) for there, here in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_knows_the_ops(device: str) -> None:
    values, error = values_of(77, seed=1).to(device), torch.zeros(77, device=device)
    torch.library.opcheck(torch.ops.zcore.pack_signs.default, (values, error), {"block_size": 32})
    made = pack_signs(values, error, block_size=32)
    torch.library.opcheck(torch.ops.zcore.unpack_signs.default, made, {"block_size": 32, "numel": 77})


def test_the_registry_serves_the_compiled_ops() -> None:
    registered = ops.implementations()
    for op in ("pack_signs", "unpack_signs"):
        assert [item.source for item in registered[op]] == ["cpp", "cuda", "triton", "reference"]


ONES = torch.ones(64)


@pytest.mark.parametrize(
    ("values", "error_buffer", "block_size", "error", "message"),
    [
        (ONES.double(), ONES, 32, ConfigError, "values is torch.float64"),
        (ONES, ONES.half(), 32, ConfigError, "error is torch.float16; expected torch.float32"),
        (ONES, ONES[1:], 32, LayoutError, "error has 63 elements; expected 64"),
        (ONES, ONES.to("meta"), 32, LayoutError, "error is on meta"),
        (ONES.view(8, 8).t(), ONES, 32, LayoutError, "values, of shape (8, 8), has strides (1, 8)"),
        (ONES, ONES, 12, ConfigError, "block_size is 12; expected a multiple of 8 from 8 to 16384"),
        (ONES, ONES, 0, ConfigError, "block_size is 0"),
    ],
)
def test_packing_refuses_by_name(
    values: Tensor, error_buffer: Tensor, block_size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        pack_signs(values, error_buffer, block_size=block_size)
    assert message in str(caught.value) and str(caught.value).startswith("pack_signs: ")


@pytest.mark.parametrize(
    ("signs", "scales", "options", "error", "message"),
    [
        (torch.zeros(8), torch.ones(2), {}, ConfigError, "signs is torch.float32; expected torch.uint8"),
        (torch.zeros(7, dtype=torch.uint8), torch.ones(2), {}, LayoutError, "signs has 7 elements; expected 8"),
        (torch.zeros(8, dtype=torch.uint8), torch.ones(1), {}, LayoutError, "scales has 1 elements; expected 2"),
        (
            torch.zeros(8, dtype=torch.uint8),
            torch.ones(2),
            {"dtype": torch.int8},
            ConfigError,
            "the result is torch.int8",
        ),
        (torch.zeros(8, dtype=torch.uint8), torch.ones(2), {"numel": -1}, ConfigError, "numel is -1"),
    ],
)
def test_unpacking_refuses_by_name(
    signs: Tensor, scales: Tensor, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        unpack_signs(signs, scales, **({"block_size": 32, "numel": 64} | options))  # type: ignore[arg-type]
    assert message in str(caught.value) and str(caught.value).startswith("unpack_signs: ")
