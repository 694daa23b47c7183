"""The ops of experts against their references in float64: odd shapes, dtypes, ties, threads, refusals, compiling."""

from collections.abc import Iterator

import pytest
import torch
from expert_cases import OPS, SMALL, Draw, Sizes, grouped
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import (
    DTYPES,
    Arguments,
    Op,
    check_close,
    check_graph,
    each_spoilt,
    everything,
    gradients,
    is_float,
    threads,
    widened,
)

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError

NAN, INF = float("nan"), float("inf")

every_op = pytest.mark.parametrize("op", OPS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan() -> Iterator[None]:
    """So that nothing left out passes for a zero."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is set by default
    yield
    torch.use_deterministic_algorithms(False)


SIZES = st.builds(
    lambda tokens, hidden, num_experts, share: Sizes(tokens, hidden, num_experts, 1 + int(share * (num_experts - 1))),
    st.sampled_from([0, 1, 2, 7, 33]),
    st.sampled_from([0, 1, 5, 31, 32, 257, 300]),
    st.sampled_from([1, 2, 3, 8, 17, 64, 256, 259]),
    st.sampled_from([0.0, 0.01, 0.1, 1.0]),
).filter(lambda size: size.tokens * size.k * size.hidden <= 100_000 and size.num_experts * size.hidden <= 3000)


@every_op
@settings(max_examples=12, deadline=None, derandomize=True)
@given(size=SIZES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_op_and_its_gradients_are_those_of_the_reference_in_float64(
    op: Op, size: Sizes, dtype: torch.dtype, seed: int
) -> None:
    arguments = op.make(Draw(dtype, seed), size)
    wide = widened(arguments)
    results, expected = op(*arguments), op.reference(*wide)
    sums = 1.0 + size.hidden**0.5 * (op.name == "grouped_matmul")  # of so many products, which may cancel
    check_close(results, expected, sums)
    more = 1.0 + (size.tokens * size.k + size.hidden) ** 0.5
    check_close(gradients(results, arguments), gradients(expected, wide), more)


@pytest.mark.parametrize("dtype", DTYPES)
@every_op
def test_results_are_of_the_dtypes_that_are_promised(op: Op, dtype: torch.dtype) -> None:
    results = op(*op.make(Draw(dtype), SMALL))
    assert results[0].dtype == (torch.float32 if op.name == "topk_gate" else dtype)
    assert all(each.dtype == torch.int64 for each in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@every_op
def test_results_do_not_depend_on_threads_or_on_the_run(op: Op, dtype: torch.dtype) -> None:
    found = []
    for count in (1, 2, 2):
        arguments = op.make(Draw(dtype), Sizes(tokens=1500, hidden=66, num_experts=9, k=2))
        with threads(count):
            found.append(everything(op, arguments))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@every_op
def test_what_is_not_finite_comes_out_as_in_torch(op: Op, special: float) -> None:
    arguments = op.make(Draw(torch.float32), SMALL)
    with torch.no_grad():
        arguments[0].view(-1)[arguments[0].shape[1] + 1] = special  # the second row
    check_close(op(*arguments), op.reference(*widened(arguments)))


@every_op
def test_torch_finds_the_registration_right(op: Op) -> None:
    torch.library.opcheck(getattr(torch.ops.zcore, op.name).default, op.make(Draw(torch.float32), SMALL))


@every_op
def test_the_reference_has_the_gradients_that_differences_show(op: Op) -> None:
    wide = widened(op.make(Draw(torch.float32), SMALL))
    assert torch.autograd.gradcheck(lambda *given: tuple(filter(is_float, op.reference(*given))), wide)


@every_op
def test_torch_compile_passes_without_a_graph_break(op: Op) -> None:
    check_graph(op, op.make(Draw(torch.float32), SMALL))


@every_op
def test_operands_that_cannot_be_served_are_refused_by_name(op: Op) -> None:
    for arguments, error in each_spoilt(op.make(Draw(torch.float32), SMALL)):
        with pytest.raises(error, match=op.name + ": .* expected"):
            op(*arguments)


@pytest.mark.parametrize("name", sorted({op.name for op in OPS}))
def test_the_registry_serves_the_op_and_the_reference_elsewhere(name: str) -> None:
    assert ops.get(name, device=torch.device("cpu"), dtype=torch.bfloat16) is getattr(torch.ops.zcore, name)
    assert ops.get(name, device=torch.device("cpu"), dtype=torch.float64).__module__.startswith("zcore.kernels.ops.")


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 10, requires_grad=True)
    (dlogits,) = torch.autograd.grad(torch.ops.zcore.topk_gate(logits, 2)[0].sum(), logits, create_graph=True)
    with pytest.raises(StateError, match="first derivatives only"):
        dlogits.sum().backward()


@pytest.mark.parametrize("num_experts", [5, 16, 40, 600])
def test_of_equals_the_lower_expert_comes_first_and_nan_before_all(num_experts: int) -> None:
    logits = torch.zeros(3, num_experts)
    logits[1, 3], logits[1, 1] = NAN, INF
    logits[2, 4], logits[2, 2] = 1.0, 1.0
    weights, experts = torch.ops.zcore.topk_gate(logits, 4, "sigmoid", False)
    assert experts.tolist() == [[0, 1, 2, 3], [3, 1, 0, 2], [2, 4, 0, 1]]
    torch.testing.assert_close(weights, logits.sigmoid().gather(-1, experts), equal_nan=True)


@pytest.mark.parametrize("num_experts", [1, 8, 60, 700])
def test_distinct_logits_are_chosen_as_torch_topk_does(num_experts: int) -> None:
    logits = Draw(torch.float32)(50, num_experts).detach()
    logits[3, num_experts // 2] = NAN
    k = min(num_experts, 6)
    assert torch.equal(torch.ops.zcore.topk_gate(logits, k)[1], logits.topk(k).indices)


def test_logits_whose_scores_round_to_equals_are_told_apart() -> None:
    logits = torch.tensor([[200.0, 300.0, 250.0]])
    assert logits.sigmoid().unique().numel() == 1
    assert torch.ops.zcore.topk_gate(logits, 2, "sigmoid")[1].tolist() == [[1, 2]]


def test_weights_of_vanished_scores_are_zero_and_no_nan() -> None:
    weights, _ = torch.ops.zcore.topk_gate(torch.full((1, 4), -500.0), 2, "sigmoid")
    assert weights.tolist() == [[0.0, 0.0]]


def test_a_bias_moves_the_choice_and_no_weight() -> None:
    logits, bias = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 9.0])
    weights, experts = torch.ops.zcore.topk_gate(logits, 2, "sigmoid", False, bias)
    assert experts.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, torch.tensor([[-1.0, 1.0]]).sigmoid())


def test_rows_are_sorted_as_the_header_draws_them() -> None:
    rows, counts, places = torch.ops.zcore.permute(
        torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1, 0], [0, 2], [1, 0]]), 3
    )
    assert rows.flatten().tolist() == [1, 2, 3, 1, 3, 2]
    assert counts.tolist() == [3, 2, 1]
    assert places.tolist() == [[3, 0], [1, 5], [4, 2]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=SIZES, seed=st.integers(0, 99))
def test_unpermute_undoes_permute(size: Sizes, seed: int) -> None:
    draw = Draw(torch.float32, seed)
    x, experts = draw(size.tokens, size.hidden).detach(), draw.experts(size)
    rows, counts, places = torch.ops.zcore.permute(x, experts, size.num_experts)
    assert torch.equal(torch.repeat_interleave(torch.arange(size.num_experts), counts), experts.flatten().sort().values)
    assert torch.equal(rows[places], x.unsqueeze(1).expand(-1, size.k, -1))
    torch.testing.assert_close(torch.ops.zcore.unpermute(rows, places), x * size.k)


def test_no_choices_and_no_experts_give_nothing() -> None:
    x, none = torch.randn(3, 4), torch.empty(3, 0, dtype=torch.int64)
    rows, counts, places = torch.ops.zcore.permute(x, none, 0)
    assert (rows.shape, counts.shape, places.shape) == ((0, 4), (0,), (3, 0))
    assert torch.equal(torch.ops.zcore.unpermute(rows, places), torch.zeros(3, 4))
    op = grouped(is_transposed=False)
    arguments = rows, torch.empty(0, 4, 5), counts
    assert op(*arguments)[0].shape == op.reference(*arguments)[0].shape == (0, 5)


def test_an_expert_without_rows_has_no_gradient() -> None:
    rows, weights = torch.randn(3, 4), torch.randn(3, 4, 5, requires_grad=True)
    torch.ops.zcore.grouped_matmul(rows, weights, torch.tensor([2, 0, 1])).sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad[1], torch.zeros(4, 5))
    assert bool(weights.grad[0].any())


def test_a_frozen_operand_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weights, counts = torch.randn(3, 4), torch.randn(1, 4, 5), torch.tensor([3])
    for frozen, count in ((rows, 1), (weights, 1), (None, 2)):
        for each in (rows, weights):
            each.requires_grad_(each is not frozen)
        out = torch.ops.zcore.grouped_matmul(rows, weights, counts)
        with torch.profiler.profile() as profile:
            out.sum().backward()
        assert sum(each.name == "aten::mm" for each in profile.events()) == count


REFUSED = [
    ("topk_gate", (torch.randn(3), 1), LayoutError, r"expected \[tokens, num_experts\]"),
    ("topk_gate", (torch.randn(3, 4), 5), ConfigError, "k is 5; expected 1 to 4"),
    ("topk_gate", (torch.randn(3, 4), 0), ConfigError, "k is 0; expected 1 to 4"),
    ("topk_gate", (torch.randn(3, 4), 1, "tanh"), ConfigError, "scoring is 'tanh'; expected 'softmax' or 'sigmoid'"),
    ("topk_gate", (torch.randn(3, 4), 1, "softmax", True, torch.zeros(3)), LayoutError, r"bias has shape \(3,\)"),
    ("permute", (torch.randn(2, 4), torch.tensor([[0], [3]]), 3), LayoutError, "are from 0 to 3; expected 0 to 2"),
    ("permute", (torch.randn(2, 4), torch.tensor([[0], [-1]]), 3), LayoutError, "are from -1 to 0; expected 0 to 2"),
    ("permute", (torch.randn(2, 4), torch.tensor([0, 1]), 3), LayoutError, r"expected \[tokens, hidden\] and"),
    ("permute", (torch.randn(3, 4), torch.tensor([[0], [1]]), 3), LayoutError, r"experts has shape \(2, 1\)"),
    ("unpermute", (torch.randn(2, 4), torch.tensor([[1], [1]])), LayoutError, "do not name each of the 2 rows once"),
    ("unpermute", (torch.randn(2, 4), torch.tensor([[0], [2]])), LayoutError, "do not name each of the 2 rows once"),
    ("unpermute", (torch.randn(2, 4), torch.tensor([[0], [-1]])), LayoutError, "do not name each of the 2 rows once"),
    ("unpermute", (torch.randn(3, 4), torch.tensor([[0], [1]])), LayoutError, "a place for each of the 3 rows"),
    (
        "unpermute",
        (torch.randn(2, 4), torch.tensor([[0], [1]]), torch.ones(2)),
        LayoutError,
        r"weights has shape \(2,\); expected \(2, 1\)",
    ),
    (
        "grouped_matmul",
        (torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([1, 2])),
        LayoutError,
        r"expected \[total, in\] and \[num_experts, in, out\]",
    ),
    (
        "grouped_matmul",
        (torch.randn(3, 4), torch.randn(2, 4, 5), torch.tensor([1, 1])),
        LayoutError,
        r"counts are \[1, 1\], 2 together; expected none below 0, and 3 together",
    ),
    (
        "grouped_matmul",
        (torch.randn(3, 4), torch.randn(2, 4, 5), torch.tensor([4, -1])),
        LayoutError,
        "expected none below 0",
    ),
    (
        "grouped_matmul",
        (torch.randn(3, 4), torch.randn(2, 4, 5), torch.tensor([3])),
        LayoutError,
        r"counts has shape \(1,\); expected \(2,\)",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "error", "words"), REFUSED)
def test_what_makes_no_sense_is_refused(name: str, arguments: Arguments, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(torch.ops.zcore, name)(*arguments)
