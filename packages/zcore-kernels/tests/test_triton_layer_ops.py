"""Triton's kernels of layers, run by its interpreter on CPU tensors, against the references in float64.

They are called through torch's ops, as on a GPU. The interpreter has to be chosen before triton is imported, so
test_triton.py runs this file in a process of its own; `TRITON_INTERPRET=1 pytest` with this file's name does, too.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import DTYPES, EPS, OPS, Op, check_close, drawing, gradients, widened
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.kernels.triton.loading import is_interpreted, why_unavailable

if why_unavailable() or not is_interpreted():
    pytest.skip(why_unavailable() or "runs with TRITON_INTERPRET=1, by test_triton.py", allow_module_level=True)

from zcore.kernels.triton.bias_dropout_residual import bias_dropout_residual
from zcore.kernels.triton.tiles import LONGEST_ROW

every_op = pytest.mark.parametrize("op", OPS, ids=str)
# Of a matrix with many rows; rotary has a program for each token, and nothing to put together.
every_tiled_op = pytest.mark.parametrize("op", [op for op in OPS if op.name != "rotary"], ids=str)
NAMES = sorted({op.name for op in OPS})
# NumPy, which the interpreter computes with, warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def by_triton() -> Iterator[None]:
    with ops.force("triton"):
        yield


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
    arguments = op.make(drawing(dtype, seed), rows, hidden)
    wide = widened(arguments)
    results, expected = op(*arguments), op.reference(*wide)
    check_close(results, expected, dtype, 1.0)
    # A weight's gradient sums over rows, and rounding grows as a random walk does.
    check_close(gradients(results, arguments), gradients(expected, wide), dtype, 1.0 + rows**0.5)


@every_tiled_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 2050), (70, 40)])  # two pieces of a row; more tiles than programs
def test_several_tiles_are_put_together(op: Op, dtype: torch.dtype, rows: int, hidden: int) -> None:
    arguments = op.make(drawing(dtype), rows, hidden)
    wide = widened(arguments)
    results, expected = op(*arguments), op.reference(*wide)
    check_close(results, expected, dtype, 1.0)
    check_close(gradients(results, arguments), gradients(expected, wide), dtype, 1.0 + rows**0.5)


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_code_for_the_cpu_has_the_same_results(op: Op, dtype: torch.dtype) -> None:
    arguments = op.make(drawing(dtype), 5, 70)
    found = op(*arguments)
    with ops.force("cpp"):
        expected = op(*arguments)
    check_close(found, tuple(each.double() for each in expected), dtype, 0.5)


@every_op
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_in_torch(op: Op, special: float) -> None:
    arguments = op.make(drawing(torch.float32), 3, 70)
    with torch.no_grad():
        arguments[0].view(-1)[70 + 5] = special  # the second row
    check_close(op(*arguments), op.reference(*widened(arguments)), torch.float32, 1.0)


@every_tiled_op
def test_results_are_equal_from_run_to_run(op: Op) -> None:
    arguments = op.make(drawing(torch.float32), 70, 40)
    once, twice = ([*results, *gradients(results, arguments)] for results in (op(*arguments), op(*arguments)))
    assert all(map(torch.equal, once, twice))


@every_op
def test_torch_finds_the_registration_right(op: Op) -> None:
    function = getattr(torch.ops.zcore, op.name).default
    torch.library.opcheck(function, op.make(drawing(torch.float32), 3, 10))


@every_op
def test_torch_compile_passes_without_a_graph_break(op: Op) -> None:
    torch.compiler.reset()  # else all ops count as recompilations of one function
    arguments = op.make(drawing(torch.float32), 3, 10)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results, expected = compiled(*arguments), op(*arguments)
    for one, two in zip(
        (*results, *gradients(results, arguments)), (*expected, *gradients(expected, arguments)), strict=True
    ):
        assert torch.equal(one, two)


@every_op
def test_operands_that_cannot_be_served_are_refused_by_name(op: Op) -> None:
    arguments = op.make(drawing(torch.float32), 3, 10)
    for index, each in enumerate(arguments):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            continue
        for wrong, error in (
            (each.detach().double(), ConfigError),
            (torch.stack([each.detach()] * 2, -1)[..., 0], LayoutError),
            (each.detach().to("meta"), LayoutError),
        ):
            if wrong.is_meta and index == 0:
                continue  # the first says where all have to be
            with pytest.raises(error, match=op.name + ": .* expected"):
                _function(op.name)(*arguments[:index], wrong, *arguments[index + 1 :])


def _function(name: str) -> Any:
    """The launcher itself: torch would send an operand on meta to the fake one."""
    file = name.removesuffix("_packed")
    file = file if name == "bias_dropout_residual" else file.removesuffix("_residual")
    module = __import__(f"zcore.kernels.triton.{file}", fromlist=[name])
    return getattr(module, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_has_it_for_both_devices_and_takes_it_on_the_cpu_only_when_forced(name: str) -> None:
    (triton,) = (each for each in ops.implementations()[name] if each.source == "triton")
    assert triton.devices == {"cpu", "cuda"}
    assert ops.choose(name, device=torch.device("cpu"), dtype=torch.float32) is triton
    with ops.force("reference"):
        assert ops.choose(name, device=torch.device("cpu"), dtype=torch.float32) is not triton
    assert ops.implementations()[name][-1] is triton


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 10, requires_grad=True)
    (dx,) = torch.autograd.grad(torch.ops.zcore.rms_norm(x, None, EPS).sum(), x, create_graph=True)
    with pytest.raises(StateError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.parametrize(("name", "affine"), [("rms_norm", 1), ("layer_norm", 2)])
def test_a_row_too_long_for_a_program_is_refused(name: str, affine: int) -> None:
    with pytest.raises(ConfigError, match=f"rows have {LONGEST_ROW + 1} elements; .* ZCORE_OPS=reference"):
        getattr(torch.ops.zcore, name)(torch.ones(1, LONGEST_ROW + 1), *[None] * affine, EPS)


def test_layer_norm_keeps_its_digits_where_the_mean_is_large() -> None:
    x = 1e4 + torch.randn(4, 512, generator=torch.Generator().manual_seed(3))
    found = torch.ops.zcore.layer_norm(x, None, None, 1e-5)
    torch.testing.assert_close(found.double(), torch.nn.functional.layer_norm(x.double(), (512,)), atol=2e-3, rtol=0.0)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 7, 2**40 + 3, -(2**63)])
@pytest.mark.parametrize("numel", [1, 64, 255, 1025])
def test_the_mask_is_that_of_the_reference_to_the_element(drop: float, seed: int, numel: int) -> None:
    zeros = torch.zeros(1, numel)
    arguments = torch.ones(1, numel), None, zeros, torch.tensor([seed]), drop
    assert torch.equal(bias_dropout_residual(*arguments) != 0, _reference("bias_dropout_residual")(*arguments) != 0)


def test_a_position_beyond_the_tables_gives_nan_and_reads_nothing_else() -> None:
    q, tables = torch.randn(3, 2, 6), torch.randn(5, 4)
    turned, _ = torch.ops.zcore.rotary(q, q, tables, tables, torch.tensor([0, 5, -1]))
    assert turned[0].isfinite().all()
    assert turned[1:, :, :4].isnan().all()
    assert torch.equal(turned[..., 4:], q[..., 4:])


def test_an_unknown_form_of_gelu_and_a_probability_beyond_one_are_refused() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(ConfigError, match="approximate is 'erf'; expected 'none'"):
        torch.ops.zcore.bias_gelu(x, None, "erf")
    with pytest.raises(ConfigError, match=r"drop is 1\.5; expected a probability"):
        torch.ops.zcore.bias_dropout_residual(x, None, x, torch.tensor([1]), 1.5)


def _reference(name: str) -> Any:
    return next(each.function for each in ops.implementations()[name] if each.source == "reference")
