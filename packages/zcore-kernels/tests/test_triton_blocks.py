"""Triton's kernels of quantised blocks and signs: the bits of the ops compiled for the CPU; see triton_device.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_inputs import FLOAT_DTYPES, FORMATS_AND_SYMMETRY, equal_bits, moved, some_values, values_of
from torch import Tensor
from triton_device import DEVICE, WHY_SKIPPED

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.triton.loading import is_interpreted

if WHY_SKIPPED:
    pytest.skip(WHY_SKIPPED, allow_module_level=True)

from zcore.kernels.ops import dequantize_blockwise as dequantizing
from zcore.kernels.ops import dequantize_reduce_requantize as reducing
from zcore.kernels.ops import pack_signs as packing
from zcore.kernels.ops import quantize_blockwise as quantizing
from zcore.kernels.ops import unpack_signs as unpacking
from zcore.kernels.triton.dequantize_blockwise import dequantize_blockwise
from zcore.kernels.triton.dequantize_reduce_requantize import dequantize_reduce_requantize
from zcore.kernels.triton.pack_signs import pack_signs
from zcore.kernels.triton.quantize_blockwise import quantize_blockwise
from zcore.kernels.triton.unpack_signs import unpack_signs

NAMES = [
    "quantize_blockwise",
    "dequantize_blockwise",
    "dequantize_reduce_requantize",
    "pack_signs",
    "unpack_signs",
]
# NumPy, which the interpreter computes with, warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(equal_bits(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def there(value: Any) -> Any:
    """All tensors where the kernels run, as far into their storage as they are on the CPU."""
    return moved(value, DEVICE.type)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    values=some_values(),
    kind=st.sampled_from(FORMATS_AND_SYMMETRY),
    block_size=st.sampled_from([2, 6, 32, 64, 250, 256, 4096]),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    offset=st.sampled_from([0, 1, 2**33 - 100, 2**40]),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_codes_and_values_are_those_of_the_compiled_ops(
    *, values: Tensor, kind: tuple[str, bool], block_size: int, seed: int | None, offset: int, dtype: torch.dtype
) -> None:
    name, is_symmetric = kind
    options: dict[str, Any] = {"format": name, "block_size": block_size, "is_symmetric": is_symmetric}
    options |= {"seed": seed, "offset": offset}
    expected = quantizing.quantize_blockwise(values, **options)
    assert same(quantize_blockwise(there(values), **options), expected)
    sizes: dict[str, Any] = {"format": name, "block_size": block_size, "numel": values.numel(), "dtype": dtype}
    read = dequantizing.dequantize_blockwise(*expected, **sizes)
    assert same((dequantize_blockwise(*there(expected), **sizes),), (read,))


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_every_code_is_read(name: str) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = every if name == "int4" else every.view(quantizing.format_named("a test", name).dtype)
    numel = 512 if name == "int4" else 256
    operands = codes, torch.tensor([0.3]), torch.empty(0, dtype=torch.int8)
    sizes: dict[str, Any] = {"format": name, "block_size": numel, "numel": numel}
    expected = dequantizing.dequantize_blockwise(*operands, **sizes)
    assert same((dequantize_blockwise(*there(operands), **sizes),), (expected,))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    count=st.integers(1, 5),
    numel=st.integers(0, 300),
    kind=st.sampled_from(FORMATS_AND_SYMMETRY),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.none() | st.integers(0, 100),
    num_special=st.integers(0, 1),
)
def test_reduced_shards_are_those_of_the_compiled_op(
    *, count: int, numel: int, kind: tuple[str, bool], reduction: str, seed: int | None, num_special: int
) -> None:
    name, is_symmetric = kind
    made = [
        quantizing.quantize_blockwise(
            values_of(numel, seed=each, num_special=num_special), format=name, block_size=32, is_symmetric=is_symmetric
        )
        for each in range(count)
    ]
    shards = [list(column) for column in zip(*made, strict=True)]
    options: dict[str, Any] = {"format": name, "block_size": 32, "numel": numel, "reduction": reduction, "seed": seed}
    expected = reducing.dequantize_reduce_requantize(*shards, **options, offset=7)
    assert same(dequantize_reduce_requantize(*there(shards), **options, offset=7), expected)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    values=some_values(),
    block_size=st.sampled_from([8, 24, 64, 256, 520]),
    start=st.integers(0, 5),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
def test_signs_scales_and_errors_are_those_of_the_compiled_ops(
    values: Tensor, block_size: int, start: int, dtype: torch.dtype
) -> None:
    error = values_of(values.numel() + start, seed=9)[start:]
    of_compiled = error.clone()
    expected = packing.pack_signs(values, of_compiled, block_size=block_size)
    error = there(error)
    assert same(pack_signs(there(values), error, block_size=block_size), expected)
    assert same((error,), (of_compiled,))
    sizes: dict[str, Any] = {"block_size": block_size, "numel": values.numel(), "dtype": dtype}
    assert same((unpack_signs(*there(expected), **sizes),), (unpacking.unpack_signs(*expected, **sizes),))


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_has_it_for_both_devices_and_takes_it_on_the_cpu_only_when_forced(name: str) -> None:
    (triton,) = (each for each in ops.implementations()[name] if each.source == "triton")
    assert triton.devices == ({"cpu", "cuda"} if is_interpreted() else {"cuda"})
    assert (ops.implementations()[name][-1] is triton) == is_interpreted()


def test_torch_comes_to_the_kernel_where_triton_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    values = there(values_of(70, seed=1))
    launched: list[object] = []
    from zcore.kernels.triton import quantize_blockwise as file

    kernel = file.quantize_kernel
    monkeypatch.setattr(file, "quantize_kernel", {(1,): lambda *args, **kwargs: launched.append(kernel)})
    with ops.force("triton"):
        torch.ops.zcore.quantize_blockwise(values, format="int8", block_size=32)
    if is_interpreted():  # on a GPU it may serve without being asked for
        torch.ops.zcore.quantize_blockwise(values, format="int8", block_size=32)
    assert len(launched) == 1


ONES = torch.ones(64, device=DEVICE)
CODES, SCALES, NO_POINTS = there(quantizing.quantize_blockwise(ONES.cpu(), format="int8", block_size=32))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: quantize_blockwise(ONES.double(), format="int8", block_size=32),
            ConfigError,
            "quantize_blockwise: values is torch.float64",
        ),
        (
            lambda: quantize_blockwise(ONES.view(8, 8).t(), format="int8", block_size=32),
            LayoutError,
            "values, of shape (8, 8), has strides",
        ),
        (lambda: quantize_blockwise(ONES, format="int8", block_size=0), ConfigError, "block_size is 0"),
        (
            lambda: dequantize_blockwise(CODES, SCALES[:1], NO_POINTS, format="int8", block_size=32, numel=64),
            LayoutError,
            "dequantize_blockwise: scales has 1 elements; expected 2",
        ),
        (
            lambda: dequantize_reduce_requantize([], [], [], format="int8", block_size=32, numel=64),
            LayoutError,
            "got no shards",
        ),
        (lambda: pack_signs(ONES, ONES.half(), block_size=32), ConfigError, "pack_signs: error is torch.float16"),
        (
            lambda: unpack_signs(CODES, SCALES, block_size=32, numel=64),
            ConfigError,
            "unpack_signs: signs is torch.int8; expected torch.uint8",
        ),
    ],
)
def test_operands_that_cannot_be_served_are_refused_by_name(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
