"""The Triton kernel of cross-entropy beside the one in torch; see triton_device.py.

This file starts one pytest on itself, in the interpreter. Without a GPU its other tests are run only there.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE, WHY_NOT_INTERPRETED, WHY_SKIPPED, run_interpreted

from zcore.core import ops
from zcore.kernels.ops.cross_entropy_rows import RowSettings, cross_entropy_rows
from zcore.kernels.ops.linear_cross_entropy import linear_cross_entropy
from zcore.kernels.triton.loading import is_interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
launching = pytest.mark.skipif(WHY_SKIPPED is not None, reason=str(WHY_SKIPPED))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SETTINGS = [
    RowSettings(-100, 0.0, 0.0, None),
    RowSettings(-100, 0.0, 0.1, None),
    RowSettings(2, 0.2, 0.0, 3.0),
    RowSettings(-100, 0.1, 0.05, 2.0),
]


@pytest.mark.skipif(is_interpreted(), reason="is the one that was started")
@pytest.mark.skipif(WHY_NOT_INTERPRETED is not None, reason=str(WHY_NOT_INTERPRETED))
def test_the_tests_of_this_file_pass_in_the_interpreter() -> None:
    assert " passed" in run_interpreted("test_triton_cross_entropy.py")


def in_triton(*operands: Any, columns: int = 16, **given: Any) -> Tensor:
    """With so few columns at a time that a row takes several turns."""
    import zcore.kernels.triton.cross_entropy_rows as kernel

    kernel.MOST_COLUMNS = columns
    losses: Tensor = kernel.cross_entropy_rows(*operands, **given)
    return losses


def draw(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in memory that is wider than they are, targets and factors."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = (torch.randn(rows, vocabulary + 3, generator=generator) * 3).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    factors = torch.randn(rows, generator=generator)
    return logits.to(DEVICE)[:, :vocabulary], targets.to(DEVICE), factors.to(DEVICE)


def compare(logits: Tensor, targets: Tensor, factors: Tensor | None, settings: RowSettings) -> None:
    """Of rows with a gradient and without one."""
    expected, found = logits.double(), logits.clone(memory_format=torch.preserve_format)
    allowed = TOLERANCE[logits.dtype]
    right = cross_entropy_rows(expected, targets, factors, settings, writes_gradient=True)
    alone = in_triton(logits, targets, factors, settings, writes_gradient=False)
    torch.testing.assert_close(logits, found, atol=0.0, rtol=0.0, equal_nan=True)  # untouched so far
    losses = in_triton(found, targets, factors, settings, writes_gradient=True)
    torch.testing.assert_close(losses, alone, equal_nan=True)
    torch.testing.assert_close(losses.double(), right, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.double(), expected, atol=allowed, rtol=allowed, equal_nan=True)


@launching
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [*((torch.float32, each) for each in SETTINGS), (torch.bfloat16, SETTINGS[-1]), (torch.float16, SETTINGS[-1])],
    ids=str,
)
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 3), (4, 16), (3, 17), (2, 70)])
def test_rows_are_those_of_torch_in_float64(
    rows: int, vocabulary: int, dtype: torch.dtype, settings: RowSettings
) -> None:
    logits, targets, factors = draw(rows, vocabulary, dtype)
    targets[1::3] = settings.ignore_index
    compare(logits, targets, factors, settings)
    compare(logits, targets, None, settings)


@launching
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 20, slice(0, 16)], ids=str)
def test_what_is_not_finite_comes_out_as_in_torch(special: float, at: int | slice) -> None:
    for settings in SETTINGS[:2]:
        logits, targets, factors = draw(3, 40, torch.float32)
        targets[0] = 33
        logits[0, at] = special
        compare(logits, targets, factors, settings)


@launching
def test_a_target_beyond_the_vocabulary_has_the_loss_nan() -> None:
    logits, _, _ = draw(3, 20, torch.float32)
    losses = in_triton(logits, torch.tensor([19, 20, -1], device=DEVICE), None, SETTINGS[0], writes_gradient=True)
    assert losses.isnan().tolist() == [False, True, True]


@launching
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_whole_op_is_the_same_with_either(reduction: str) -> None:
    found = []
    for source in ("torch", "triton"):
        generator = torch.Generator().manual_seed(5)
        drawn = [torch.randn(*shape, generator=generator) for shape in ((7, 4), (30, 4), (30,))]
        floats = [each.to(DEVICE).requires_grad_() for each in drawn]
        targets = torch.arange(7, device=DEVICE) * 4
        loss = linear_cross_entropy(
            *floats[:2], targets, floats[2], chunk_rows=3, z_loss=0.1, reduction=reduction, source=source
        )
        found.append([loss, *torch.autograd.grad(loss.square().sum(), floats)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_triton_serves_cuda_and_not_the_cpu() -> None:
    (offered,) = (each for each in ops.registered()["linear_cross_entropy"] if each.source == "triton")
    assert offered.refusal("cuda", torch.bfloat16) is None
    assert offered.refusal("cpu", torch.bfloat16) == "serves cuda only"
    assert "serves" in str(offered.refusal("cuda", torch.float64))
