"""The Triton kernel of cross-entropy beside the one in torch, in Triton's interpreter and on CPU tensors.

Triton asks for the interpreter when its own modules are loaded, so it has to be set before, and it would stay for every
other test. So this file starts one pytest on itself, with TRITON_INTERPRET=1, and only there are its other tests run.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from zcore.core import ops
from zcore.kernels.ops.cross_entropy_rows import RowSettings, cross_entropy_rows
from zcore.kernels.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the pytest that the first test starts")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SETTINGS = [
    RowSettings(-100, 0.0, 0.0, None),
    RowSettings(-100, 0.0, 0.1, None),
    RowSettings(2, 0.2, 0.0, 3.0),
    RowSettings(-100, 0.1, 0.05, 2.0),
]


@pytest.mark.skipif(IS_INTERPRETED, reason="is the one that was started")
def test_the_tests_of_this_file_pass_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def in_triton(*operands: Any, columns: int = 16, **given: Any) -> Tensor:
    """With so few columns at a time that a row takes several turns."""
    import zcore.kernels.triton.cross_entropy_rows as kernel

    kernel.MOST_COLUMNS = columns
    losses: Tensor = kernel.cross_entropy_rows(*operands, **given)
    return losses


def draw(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in memory that is wider than they are, targets and factors."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = (torch.randn(rows, vocabulary + 3, generator=generator) * 3).to(dtype)[:, :vocabulary]
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return logits, targets, torch.randn(rows, generator=generator)


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


@interpreted
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


@interpreted
@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 20, slice(0, 16)], ids=str)
def test_what_is_not_finite_comes_out_as_in_torch(special: float, at: int | slice) -> None:
    for settings in SETTINGS[:2]:
        logits, targets, factors = draw(3, 40, torch.float32)
        targets[0] = 33
        logits[0, at] = special
        compare(logits, targets, factors, settings)


@interpreted
def test_a_target_beyond_the_vocabulary_has_the_loss_nan() -> None:
    logits, _, _ = draw(3, 20, torch.float32)
    losses = in_triton(logits, torch.tensor([19, 20, -1]), None, SETTINGS[0], writes_gradient=True)
    assert losses.isnan().tolist() == [False, True, True]


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_whole_op_is_the_same_with_either(reduction: str) -> None:
    found = []
    for source in ("torch", "triton"):
        generator = torch.Generator().manual_seed(5)
        floats = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((7, 4), (30, 4), (30,))]
        targets = torch.arange(7) * 4
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
