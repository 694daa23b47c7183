"""Tensors that show what quantising ops do at their edges, and on how many threads torch works."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = [
    "CHECKS_OF_FLOAT8",
    "FLOAT_DTYPES",
    "FORMATS_AND_SYMMETRY",
    "equal_bits",
    "moved",
    "on_threads",
    "some_values",
    "values_of",
]

FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS_AND_SYMMETRY = [
    ("int8", True),
    ("int8", False),
    ("int4", True),
    ("int4", False),
    ("float8_e4m3fn", True),
    ("float8_e5m2", True),
]
# The others of torch.library.opcheck compare results by a product, and torch has none for floats of 8 bits.
CHECKS_OF_FLOAT8 = ("test_autograd_registration", "test_faketensor")
SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-38, 3e38, -3e38, 65504.0]


def values_of(numel: int, *, seed: int, dtype: torch.dtype = torch.float32, num_special: int = 0) -> Tensor:
    """Numbers of many magnitudes; `num_special` of them zero, tiny, huge or not finite."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 6, (numel,), generator=generator)
    values = torch.randn(numel, generator=generator).ldexp(exponents)
    for _ in range(num_special if numel else 0):
        place, kind = torch.randint(0, numel, (1,), generator=generator), torch.randint(0, len(SPECIAL), (1,))
        values[place] = SPECIAL[int(kind)]
    return values.to(dtype)


@st.composite
def some_values(draw: st.DrawFn) -> Tensor:
    """Of any floating-point dtype and length, and at any alignment."""
    numel, start = draw(st.integers(0, 700)), draw(st.integers(0, 5))
    dtype, num_special = draw(st.sampled_from(FLOAT_DTYPES)), draw(st.integers(0, 3))
    return values_of(numel + start, seed=draw(st.integers(0, 1000)), dtype=dtype, num_special=num_special)[start:]


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, where one NaN is as good as another."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.is_floating_point:
        one, other = one.float(), other.float()
        signs_agree = torch.equal(one.signbit() & ~one.isnan(), other.signbit() & ~other.isnan())
        return (
            signs_agree
            and torch.equal(one.isnan(), other.isnan())
            and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    return torch.equal(one, other)


def moved(value: Any, device: str) -> Any:
    """`value` with all tensors in it on `device`, those of a slice as far into their storage as before."""

    def move(tensor: Tensor) -> Tensor:
        storage = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
        return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return torch.utils._pytree.tree_map_only(Tensor, move, value)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Inside, ops use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
