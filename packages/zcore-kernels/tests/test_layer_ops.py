"""Every op of layers against its reference in float64, over odd shapes, dtypes, threads, refusals and torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import EPS, OPS, drawing
from op_calls import DTYPES, Op, check_close, check_graph, each_spoilt, everything, gradients, threads, widened
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual

import zcore.kernels.ops.bias_dropout_residual
from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError

every_op = pytest.mark.parametrize("op", OPS, ids=str)


@every_op
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 33]),
    hidden=st.sampled_from([0, 2, 6, 14, 32, 66, 258]) | st.integers(1, 150).map(lambda half: 2 * half),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_op_and_its_gradients_are_those_of_the_reference_in_float64(
    op: Op, rows: int, hidden: int, dtype: torch.dtype, seed: int
) -> None:
    arguments = op.make(drawing(dtype, seed), rows, hidden)
    wide = widened(arguments)
    results, expected = op(*arguments), op.reference(*wide)
    check_close(results, expected)
    # A weight's gradient sums over rows, and rounding grows as a random walk does.
    check_close(gradients(results, arguments), gradients(expected, wide), 1.0 + rows**0.5)
    assert all(each.dtype == dtype for each in results)


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads_or_on_the_run(op: Op, dtype: torch.dtype) -> None:
    found = []
    for count in (1, 2, 2):
        arguments = op.make(drawing(dtype), 700, 98)
        with threads(count):
            found.append(everything(op, arguments))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@every_op
def test_memory_at_any_alignment_is_served(op: Op) -> None:
    def shifted(*shape: int) -> Tensor:
        numel = torch.Size(shape).numel()
        return torch.randn(numel + 1, generator=torch.Generator().manual_seed(numel))[1:].view(shape)

    arguments = op.make(shifted, 3, 70)
    aligned = tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)
    assert all(torch.equal(one, two) for one, two in zip(op(*arguments), op(*aligned), strict=True))


@every_op
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_in_torch(op: Op, special: float) -> None:
    arguments = op.make(drawing(torch.float32), 3, 70)
    with torch.no_grad():
        arguments[0].view(-1)[70 + 5] = special  # the second row
    check_close(op(*arguments), op.reference(*widened(arguments)))


@every_op
def test_torch_finds_the_registration_right(op: Op) -> None:
    function = getattr(torch.ops.zcore, op.name).default
    torch.library.opcheck(function, op.make(drawing(torch.float32), 3, 10))


@every_op
def test_the_reference_has_the_gradients_that_differences_show(op: Op) -> None:
    wide = widened(op.make(drawing(torch.float32), 2, 6))
    assert torch.autograd.gradcheck(op.reference, wide)


@every_op
def test_torch_compile_passes_without_a_graph_break(op: Op) -> None:
    check_graph(op, op.make(drawing(torch.float32), 3, 10))


@every_op
def test_operands_that_cannot_be_served_are_refused_by_name(op: Op) -> None:
    for arguments, error in each_spoilt(op.make(drawing(torch.float32), 3, 10)):
        with pytest.raises(error, match=op.name + ": .* expected"):
            op(*arguments)


@pytest.mark.parametrize("name", sorted({op.name for op in OPS}))
def test_the_registry_serves_the_compiled_op_and_the_reference_elsewhere(name: str) -> None:
    assert ops.get(name, device=torch.device("cpu"), dtype=torch.bfloat16) is getattr(torch.ops.zcore, name)
    assert ops.get(name, device=torch.device("cpu"), dtype=torch.float64).__module__.startswith("zcore.kernels.ops.")


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 10, requires_grad=True)
    (dx,) = torch.autograd.grad(torch.ops.zcore.rms_norm(x, None, EPS).sum(), x, create_graph=True)
    with pytest.raises(StateError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
@every_op
def test_derivatives_in_forward_mode_and_of_torch_func_are_refused_and_never_zero(op: Op) -> None:
    tensor, *others = op.make(drawing(torch.float32), 3, 8)
    x = tensor.detach()

    def first(x: Tensor) -> Tensor:
        results = op(x, *others)
        return results[0].sum()

    with pytest.raises(StateError, match=f"zcore::{op.name} has no forward-mode derivatives"):
        torch.func.jvp(first, (x,), (x,))
    with pytest.raises(StateError, match=f"zcore::{op.name} has no derivatives by torch.func"):
        torch.func.grad(first)(x)
    with dual_level(), pytest.raises(StateError, match="has no forward-mode derivatives"):
        first(make_dual(x, x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
def test_derivatives_in_forward_mode_are_those_of_the_reference_where_it_is_asked_for() -> None:
    x, tangent = torch.randn(3, 8), torch.randn(3, 8)
    with ops.force("reference"):
        norm = ops.get("rms_norm", device=x.device, dtype=x.dtype)
        _, found = torch.func.jvp(lambda x: norm(x, None, EPS), (x,), (tangent,))
    _, expected = torch.func.jvp(lambda x: torch.rms_norm(x, (8,), None, EPS), (x,), (tangent,))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.vmap(lambda x: torch.ops.zcore.rms_norm(x, None, EPS))(x), norm(x, None, EPS))


def test_a_weight_of_another_shape_or_dtype_than_rows() -> None:
    x = torch.randn(3, 10)
    with pytest.raises(LayoutError, match=r"weight has shape \(9,\); expected \(10,\)"):
        torch.ops.zcore.rms_norm(x, torch.ones(9), EPS)
    halves = torch.ops.zcore.rms_norm(x.bfloat16(), torch.ones(10), EPS)
    assert halves.dtype == torch.bfloat16


def test_the_random_words_are_those_of_the_paper() -> None:
    first = zcore.kernels.ops.bias_dropout_residual.words(256, 0)[::64]
    assert [f"{word:08x}" for word in first.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_all_and_nothing_can_be_dropped() -> None:
    x, bias, residual, seed = torch.randn(3, 10), torch.randn(10), torch.randn(3, 10), torch.tensor([1])
    assert torch.equal(torch.ops.zcore.bias_dropout_residual(x, bias, residual, seed, 1.0), residual)
    torch.testing.assert_close(torch.ops.zcore.bias_dropout_residual(x, bias, residual, seed, 0.0), x + bias + residual)


def test_a_position_beyond_the_tables_is_refused() -> None:
    q, tables = torch.randn(2, 1, 4), torch.randn(5, 4)
    with pytest.raises(LayoutError, match="positions are from 0 to 5; expected 0 to 4"):
        torch.ops.zcore.rotary(q, q, tables, tables, torch.tensor([0, 5]))


def test_an_odd_last_dimension_has_no_halves() -> None:
    with pytest.raises(LayoutError, match=r"expected \[\.\.\., 2 \* hidden\]"):
        torch.ops.zcore.swiglu_packed(torch.randn(3, 5))


def test_an_unknown_form_of_gelu_is_refused() -> None:
    with pytest.raises(ConfigError, match="approximate is 'erf'; expected 'none'"):
        torch.ops.zcore.bias_gelu(torch.randn(3, 5), None, "erf")
