"""Triton's kernels of layers against the references in float64, called through torch's ops; see triton_device.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import EPS, OPS, drawing
from op_calls import (
    DTYPES,
    Arguments,
    Op,
    check_close,
    check_graph,
    each_elsewhere,
    each_spoilt,
    everything,
    gradients,
    moved,
    widened,
)
from triton_device import DEVICE, WHY_SKIPPED

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.kernels.triton.loading import is_interpreted

if WHY_SKIPPED:
    pytest.skip(WHY_SKIPPED, allow_module_level=True)

from zcore.kernels.triton.bias_dropout_residual import bias_dropout_residual
from zcore.kernels.triton.tiles import LONGEST_ROW, num_programs, plan_pieces, plan_whole_rows

every_op = pytest.mark.parametrize("op", OPS, ids=str)
# Of a matrix with many rows; rotary has a program for each token, and nothing to put together.
every_tiled_op = pytest.mark.parametrize("op", [op for op in OPS if op.name != "rotary"], ids=str)
NAMES = sorted({op.name for op in OPS})
# Of 40 elements: more tiles than programs, and the last tile is not full.
MANY_ROWS = max(plan_pieces(40).rows, plan_whole_rows("", 40).rows) * num_programs(DEVICE) + 6
CPU = torch.device("cpu")
# NumPy, which the interpreter computes with, warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def by_triton() -> Iterator[None]:
    with ops.force("triton"):
        yield


def on_device(op: Op, dtype: torch.dtype, rows: int, hidden: int, seed: int = 7) -> Arguments:
    return moved(op.make(drawing(dtype, seed), rows, hidden), DEVICE)


def check_parity(op: Op, arguments: Arguments) -> None:
    wide = widened(moved(arguments, CPU))
    results, expected = op(*arguments), op.reference(*wide)
    assert all(each.dtype == arguments[0].dtype for each in results)
    check_close(results, expected)
    # A weight's gradient sums over rows, and rounding grows as a random walk does.
    check_close(gradients(results, arguments), gradients(expected, wide), 1.0 + len(arguments[0]) ** 0.5)


@every_op
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 33]),
    hidden=st.sampled_from([0, 2, 6, 32, 66, 258]) | st.integers(1, 80).map(lambda half: 2 * half),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_op_and_its_gradients_are_those_of_the_reference_in_float64(
    op: Op, rows: int, hidden: int, dtype: torch.dtype, seed: int
) -> None:
    check_parity(op, on_device(op, dtype, rows, hidden, seed))


@every_tiled_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 2050), (MANY_ROWS, 40)], ids=["two pieces of a row", "many tiles"])
def test_several_tiles_are_put_together(op: Op, dtype: torch.dtype, rows: int, hidden: int) -> None:
    check_parity(op, on_device(op, dtype, rows, hidden))


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_code_for_the_cpu_has_the_same_results(op: Op, dtype: torch.dtype) -> None:
    arguments = op.make(drawing(dtype), 5, 70)
    found = op(*moved(arguments, DEVICE))
    with ops.force("cpp"):
        expected = op(*arguments)
    check_close(found, expected, 0.5)


@every_op
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_in_torch(op: Op, special: float) -> None:
    arguments = op.make(drawing(torch.float32), 3, 70)
    with torch.no_grad():
        arguments[0].view(-1)[70 + 5] = special  # the second row
    check_close(op(*moved(arguments, DEVICE)), op.reference(*widened(arguments)))


@every_tiled_op
def test_results_are_equal_from_run_to_run(op: Op) -> None:
    arguments = on_device(op, torch.float32, MANY_ROWS, 40)
    assert all(map(torch.equal, everything(op, arguments), everything(op, arguments)))


@every_op
def test_torch_finds_the_registration_right(op: Op) -> None:
    function = getattr(torch.ops.zcore, op.name).default
    torch.library.opcheck(function, on_device(op, torch.float32, 3, 10))


@every_op
def test_torch_compile_passes_without_a_graph_break(op: Op) -> None:
    check_graph(op, on_device(op, torch.float32, 3, 10))


@every_op
def test_operands_that_cannot_be_served_are_refused_by_name(op: Op) -> None:
    arguments = on_device(op, torch.float32, 3, 10)
    spoilt = [*each_spoilt(arguments), *((each, LayoutError) for each in each_elsewhere(arguments))]
    for wrong, error in spoilt:
        with pytest.raises(error, match=op.name + ": .* expected"):
            _function(op.name)(*wrong)


def _function(name: str) -> Any:
    """The launcher itself: torch would send an operand on meta to the fake one."""
    file = name.removesuffix("_packed")
    file = file if name == "bias_dropout_residual" else file.removesuffix("_residual")
    module = __import__(f"zcore.kernels.triton.{file}", fromlist=[name])
    return getattr(module, name)


@pytest.mark.skipif(not is_interpreted(), reason="TRITON_INTERPRET is not set: test_triton.py looks at the registry")
@pytest.mark.parametrize("name", NAMES)
def test_the_registry_has_it_for_both_devices_and_takes_it_on_the_cpu_only_when_forced(name: str) -> None:
    (triton,) = (each for each in ops.implementations()[name] if each.source == "triton")
    assert triton.devices == {"cpu", "cuda"}
    assert ops.choose(name, device=CPU, dtype=torch.float32) is triton
    with ops.force("reference"):
        assert ops.choose(name, device=CPU, dtype=torch.float32) is not triton
    assert ops.implementations()[name][-1] is triton


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 10, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(torch.ops.zcore.rms_norm(x, None, EPS).sum(), x, create_graph=True)
    with pytest.raises(StateError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize(("name", "affine"), [("rms_norm", 1), ("layer_norm", 2)])
def test_a_row_too_long_for_a_program_is_refused(name: str, affine: int) -> None:
    with pytest.raises(ConfigError, match=f"rows have {LONGEST_ROW + 1} elements; .* ZCORE_OPS=reference"):
        getattr(torch.ops.zcore, name)(torch.ones(1, LONGEST_ROW + 1, device=DEVICE), *[None] * affine, EPS)


def test_layer_norm_keeps_its_digits_where_the_mean_is_large() -> None:
    x = (1e4 + torch.randn(4, 512, generator=torch.Generator().manual_seed(3))).to(DEVICE)
    found = torch.ops.zcore.layer_norm(x, None, None, 1e-5)
    torch.testing.assert_close(found.double(), torch.nn.functional.layer_norm(x.double(), (512,)), atol=2e-3, rtol=0.0)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 7, 2**40 + 3, -(2**63)])
@pytest.mark.parametrize("numel", [1, 64, 255, 1025])
def test_the_mask_is_that_of_the_reference_to_the_element(drop: float, seed: int, numel: int) -> None:
    zeros = torch.zeros(1, numel)
    arguments = torch.ones(1, numel), None, zeros, torch.tensor([seed]), drop
    found = bias_dropout_residual(*moved(arguments, DEVICE)).cpu()
    assert torch.equal(found != 0, _reference("bias_dropout_residual")(*arguments) != 0)


def test_a_position_beyond_the_tables_gives_nan_and_reads_nothing_else() -> None:
    q, tables = torch.randn(3, 2, 6, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    turned, _ = torch.ops.zcore.rotary(q, q, tables, tables, torch.tensor([0, 5, -1], device=DEVICE))
    assert turned[0].isfinite().all()
    assert turned[1:, :, :4].isnan().all()
    assert torch.equal(turned[..., 4:], q[..., 4:])


def test_an_unknown_form_of_gelu_and_a_probability_beyond_one_are_refused() -> None:
    x = torch.randn(3, 5, device=DEVICE)
    with pytest.raises(ConfigError, match="approximate is 'erf'; expected 'none'"):
        torch.ops.zcore.bias_gelu(x, None, "erf")
    with pytest.raises(ConfigError, match=r"drop is 1\.5; expected a probability"):
        torch.ops.zcore.bias_dropout_residual(x, None, x, torch.tensor([1]), 1.5)


def _reference(name: str) -> Any:
    return next(each.function for each in ops.implementations()[name] if each.source == "reference")
