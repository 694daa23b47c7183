"""The symmetric product and Newton-Schulz in Triton against torch; see triton_device.py."""

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, WHY_SKIPPED

from zcore.core import ops

if WHY_SKIPPED:
    pytest.skip(WHY_SKIPPED, allow_module_level=True)

import zcore.kernels.ops.newton_schulz
from zcore.kernels.ops.newton_schulz import reference
from zcore.kernels.triton.newton_schulz import symmetric_product

UNIT = 2.0**-7  # of bf16: the interpreter of triton 3.7 cuts off what a GPU rounds to the nearest
SHAPES = [(1, 1), (1, 9), (7, 123), (128, 64), (129, 65), (200, 300), (257, 3)]


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(DEVICE, dtype)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("rows", "depth"), SHAPES)
def test_the_product_is_right_and_symmetric_to_the_bit(rows: int, depth: int, is_transposed: bool) -> None:
    a = drawn(depth, rows).T if is_transposed else drawn(rows, depth)
    square = drawn(rows, rows)
    square = (square + square.T).contiguous()
    found = symmetric_product(a, square, alpha=0.5, beta=-2.0)
    right = 0.5 * (a.double() @ a.double().T) - 2.0 * square.double()
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), right, rtol=UNIT, atol=1e-4 * depth)
    torch.testing.assert_close(symmetric_product(a).double(), a.double() @ a.double().T, rtol=UNIT, atol=1e-4 * depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 9), (140, 150)])
def test_the_iteration_is_that_of_the_reference_but_for_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = drawn(*shape, dtype)
    kept = matrix.clone()
    with ops.force("triton"):
        serve = ops.get("newton_schulz", device=matrix.device, dtype=dtype)
    found, right = serve(matrix), reference(matrix)
    exact = _iterated(matrix.double())
    assert torch.equal(matrix, kept)
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    # Steps magnify rounding, the reference's as well, and what is cut off twice as much.
    allowed = 3.0 * (right.double() - exact).abs().max() + 8 * UNIT
    assert (found.double() - exact).abs().max() <= allowed
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.5 and values.max() < 1.3


def _iterated(x: Tensor) -> Tensor:
    """The same without rounding."""
    a, b, c = zcore.kernels.ops.newton_schulz.COEFFICIENTS
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_no_rows_and_zeros_are_served() -> None:
    serve = zcore.kernels.ops.newton_schulz.newton_schulz
    assert serve(torch.ones(0, 4, device=DEVICE)).shape == (0, 4)
    assert torch.equal(serve(torch.zeros(3, 4, device=DEVICE)).cpu(), torch.zeros(3, 4, dtype=torch.bfloat16))


def test_it_is_never_chosen_by_itself_on_the_cpu() -> None:
    chosen = ops.choose("newton_schulz", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert chosen.source == "reference"
