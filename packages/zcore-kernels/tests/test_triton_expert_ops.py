"""Triton's kernels of experts against the references in float64 and the CPU's ops; see triton_device.py."""

from collections.abc import Iterator
from itertools import pairwise

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
    each_elsewhere,
    each_spoilt,
    everything,
    gradients,
    moved,
    widened,
)
from torch import Tensor, nn
from triton_device import DEVICE, WHY_SKIPPED

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.nn import ExpertMLPs, TopKRouter

if WHY_SKIPPED:
    pytest.skip(WHY_SKIPPED, allow_module_level=True)

import zcore.kernels.triton.grouped_matmul
import zcore.kernels.triton.permute
import zcore.kernels.triton.topk_gate
import zcore.kernels.triton.unpermute
from zcore.kernels.triton.tiles import LONGEST_ROW

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")
FILES = zcore.kernels.triton
every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
grouped_ops = pytest.mark.parametrize("op", [op for op in OPS if op.name == "grouped_matmul"], ids=str)
# NumPy, which the interpreter computes with, warns of what is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def by_triton() -> Iterator[None]:
    """Unwritten memory is NaN, so that nothing left out passes for a zero."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is set by default
    with ops.force("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def check_parity(op: Op, arguments: Arguments) -> None:
    """Of arguments on the CPU."""
    given, wide = moved(arguments, DEVICE), widened(arguments)
    results, expected = op(*given), op.reference(*wide)
    assert results[0].dtype == (torch.float32 if op.name == "topk_gate" else arguments[0].dtype)
    of_rows, hidden = arguments[0].shape
    check_close(results, expected, 1.0 + hidden**0.5 * (op.name == "grouped_matmul"))
    # Sums over rows and over their elements: rounding grows as a random walk does.
    check_close(gradients(results, given), gradients(expected, wide), 1.0 + (of_rows + hidden) ** 0.5)


SIZES = st.builds(
    lambda tokens, hidden, num_experts, k: Sizes(tokens, hidden, num_experts, min(k, num_experts)),
    st.sampled_from([0, 1, 2, 7, 33]),
    st.sampled_from([0, 1, 5, 31, 32, 70]),
    st.sampled_from([1, 2, 3, 8, 17]),
    st.sampled_from([1, 2, 3, 17]),
).filter(lambda size: size.tokens * size.k < 150)


@every_op
@settings(max_examples=6, deadline=None, derandomize=True)
@given(size=SIZES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_op_and_its_gradients_are_those_of_the_reference_in_float64(
    op: Op, size: Sizes, dtype: torch.dtype, seed: int
) -> None:
    check_parity(op, op.make(Draw(dtype, seed), size))


@every_dtype
@pytest.mark.parametrize("op", [op for op in OPS if op.name in {"permute", "unpermute"}], ids=str)
def test_pieces_of_long_rows_are_put_together(op: Op, dtype: torch.dtype) -> None:
    check_parity(op, op.make(Draw(dtype), Sizes(tokens=2, hidden=1030, num_experts=2, k=2)))


@pytest.mark.parametrize("op", [op for op in OPS if op.name in {"permute", "topk_gate"}], ids=str)
def test_many_tokens_take_several_programs(op: Op) -> None:
    check_parity(op, op.make(Draw(torch.float32), Sizes(tokens=150, hidden=3, num_experts=5, k=2)))


# One token; all to one expert; several tiles of an expert, and experts without rows between.
@every_dtype
@pytest.mark.parametrize("counts", [[0, 1], [0, 0, 140], [130, 3, 0, 140, 8]], ids=str)
@grouped_ops
def test_groups_of_any_sizes_take_several_tiles(op: Op, counts: list[int], dtype: torch.dtype) -> None:
    into, out = 67, 133  # more than a tile, and odd
    draw, is_transposed = Draw(dtype), "transposed" in op.label
    sides = (out, into) if is_transposed else (into, out)
    weights = draw(len(counts), *sides)
    check_parity(op, (draw(sum(counts), into), weights, torch.tensor(counts), is_transposed))


@every_dtype
@every_op
def test_the_op_of_the_cpu_has_the_same_results(op: Op, dtype: torch.dtype) -> None:
    arguments = op.make(Draw(dtype), Sizes(tokens=70, hidden=20, num_experts=9, k=2))
    found = op(*moved(arguments, DEVICE))
    with ops.force("cpp"):
        expected = op(*arguments)
    check_close(found, expected, 0.5 + 10.0 * (op.name == "grouped_matmul"))
    if op.name == "permute" or (op.label == " no weights" and dtype == torch.float32):
        assert all(torch.equal(one.cpu(), two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@every_op
def test_what_is_not_finite_comes_out_as_in_torch(op: Op, special: float) -> None:
    arguments = op.make(Draw(torch.float32), SMALL)
    with torch.no_grad():
        arguments[0].view(-1)[arguments[0].shape[1] + 1] = special  # the second row
    check_close(op(*moved(arguments, DEVICE)), op.reference(*widened(arguments)))


@every_op
def test_results_are_equal_from_run_to_run(op: Op) -> None:
    arguments = moved(op.make(Draw(torch.float32), Sizes(tokens=70, hidden=20, num_experts=3, k=2)), DEVICE)
    assert all(map(torch.equal, everything(op, arguments), everything(op, arguments)))


@every_op
def test_torch_finds_the_registration_right(op: Op) -> None:
    arguments = moved(op.make(Draw(torch.float32), SMALL), DEVICE)
    torch.library.opcheck(getattr(torch.ops.zcore, op.name).default, arguments)


@every_op
def test_torch_compile_passes_without_a_graph_break(op: Op) -> None:
    check_graph(op, moved(op.make(Draw(torch.float32), SMALL), DEVICE))


@every_op
def test_operands_that_cannot_be_served_are_refused_by_name(op: Op) -> None:
    arguments = moved(op.make(Draw(torch.float32), SMALL), DEVICE)
    launch = getattr(getattr(FILES, op.name), op.name)  # torch would send an operand on meta to the fake one
    spoilt = [*each_spoilt(arguments), *((each, LayoutError) for each in each_elsewhere(arguments))]
    for wrong, error in spoilt:
        with pytest.raises(error, match=op.name + ": .* expected"):
            launch(*wrong)


@pytest.mark.parametrize("num_experts", [5, 16, 259])
def test_of_equals_the_lower_expert_comes_first_and_nan_before_all(num_experts: int) -> None:
    logits = torch.zeros(4, num_experts)
    logits[0, 2] = -0.0
    logits[1, 3], logits[1, 1] = NAN, INF
    logits[2, 4], logits[2, 2] = 1.0, 1.0
    logits[3, :], logits[3, 3], logits[3, 4] = -INF, -NAN, NAN
    weights, experts = torch.ops.zcore.topk_gate(logits.to(DEVICE), 4, "sigmoid", False)
    assert experts.tolist() == [[0, 1, 2, 3], [3, 1, 0, 2], [2, 4, 0, 1], [3, 4, 0, 1]]
    torch.testing.assert_close(weights, logits.to(DEVICE).sigmoid().gather(-1, experts), equal_nan=True)


@pytest.mark.parametrize("num_experts", [1, 8, 60])
def test_experts_without_a_bias_are_those_of_the_cpu_to_the_last(num_experts: int) -> None:
    logits = Draw(torch.bfloat16)(50, num_experts).detach()  # many of them equal
    arguments = logits, min(num_experts, 6), "softmax", True, None
    found = torch.ops.zcore.topk_gate(*moved(arguments, DEVICE))[1]
    with ops.force("cpp"):
        assert torch.equal(found.cpu(), torch.ops.zcore.topk_gate(*arguments)[1])


def test_weights_of_vanished_scores_are_zero_and_no_nan() -> None:
    weights, _ = torch.ops.zcore.topk_gate(torch.full((1, 4), -500.0, device=DEVICE), 2, "sigmoid")
    assert weights.tolist() == [[0.0, 0.0]]


def test_more_experts_than_a_program_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"rows have {LONGEST_ROW + 1} elements; .* ZCORE_OPS=reference"):
        torch.ops.zcore.topk_gate(torch.ones(1, LONGEST_ROW + 1, device=DEVICE), 1)


def test_no_choices_and_no_experts_give_nothing() -> None:
    x, none = torch.randn(3, 4, device=DEVICE), torch.empty(3, 0, dtype=torch.int64, device=DEVICE)
    rows, counts, places = torch.ops.zcore.permute(x, none, 0)
    assert (rows.shape, counts.shape, places.shape) == ((0, 4), (0,), (3, 0))
    assert torch.equal(torch.ops.zcore.unpermute(rows, places), torch.zeros(3, 4, device=DEVICE))
    assert grouped(is_transposed=False)(rows, x.new_empty(0, 4, 5), counts)[0].shape == (0, 5)


def test_an_expert_without_rows_has_no_gradient() -> None:
    rows, weights = torch.randn(3, 4), torch.randn(3, 4, 5, requires_grad=True)
    rows, weights, counts = moved((rows, weights, torch.tensor([2, 0, 1])), DEVICE)
    (found,) = torch.autograd.grad(torch.ops.zcore.grouped_matmul(rows, weights, counts).sum(), weights)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert bool(found[0].any())


# What the CPU's ops refuse, since they can look.


def test_experts_that_there_are_not_come_last_as_nan_and_are_not_counted() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=DEVICE)
    experts = torch.tensor([[1, 9], [0, 1], [-1, 0], [2, 2**40]], device=DEVICE)
    rows, counts, places = torch.ops.zcore.permute(x, experts, 3)
    assert rows.flatten()[:5].tolist() == [2, 3, 1, 2, 4]
    assert rows.flatten()[5:].isnan().all()
    assert counts.tolist() == [2, 2, 1]
    assert places.tolist() == [[2, 5], [0, 3], [6, 1], [4, 7]]


def test_places_beyond_the_rows_read_as_nan_and_take_no_gradient() -> None:
    rows, places = torch.randn(6, 3, device=DEVICE), torch.tensor([[1, 0], [6, 3], [-1, 2**40]], device=DEVICE)
    out = torch.ops.zcore.unpermute(rows, places)
    torch.testing.assert_close(out[0], rows[1] + rows[0])
    assert out[1:].isnan().all()
    dout, weights = torch.ones(3, 3, device=DEVICE), torch.full((3, 2), 2.0, device=DEVICE)
    drows, dweights = torch.ops.zcore.unpermute_backward(dout, rows, places, weights)
    assert torch.equal(drows[[0, 1, 3]], torch.full((3, 3), 2.0, device=DEVICE))
    assert dweights.isnan().tolist() == [[False, False], [True, False], [True, True]]


@pytest.mark.parametrize(
    ("counts", "begins"),
    [
        ([2, 1], (0, 2, 3)),  # fewer than there are rows
        ([-4, 2], (0, 0, 2)),
        ([3, 2**62], (0, 3, 5)),  # more
        ([2**63 - 1, 2**63 - 1], (0, 5, 5)),
        ([-(2**63), 9], (0, 0, 5)),
    ],
)
def test_counts_that_do_not_add_up_write_nothing_elsewhere(counts: list[int], begins: tuple[int, ...]) -> None:
    rows, weights, expected = torch.randn(5, 4), torch.randn(2, 4, 3), torch.full((5, 3), NAN)
    parts = [slice(begin, end) for begin, end in pairwise(begins)]
    for part, weight in zip(parts, weights, strict=True):
        expected[part] = rows[part] @ weight
    given = moved((rows, weights, torch.tensor(counts)), DEVICE)
    check_close((torch.ops.zcore.grouped_matmul(*given),), (expected,))
    dout = torch.randn(5, 3)
    found = torch.ops.zcore.grouped_matmul_backward(*moved((rows, dout, torch.tensor(counts)), DEVICE), False)
    check_close((found,), (torch.stack([rows[part].T @ dout[part] for part in parts]),))


def test_the_gradient_of_the_gate_passes_over_experts_that_there_are_not() -> None:
    logits, weights = torch.randn(2, 3, device=DEVICE), torch.rand(2, 2, device=DEVICE)
    known = torch.ops.zcore.topk_gate_backward(
        weights[:, :1].contiguous(),
        logits,
        weights[:, :1].contiguous(),
        torch.tensor([[1], [2]], device=DEVICE),
        "softmax",
        True,
    )
    beyond = torch.tensor([[1, 3], [2, -1]], device=DEVICE)
    found = torch.ops.zcore.topk_gate_backward(weights, logits, weights, beyond, "softmax", True)
    torch.testing.assert_close(found, known)


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router = TopKRouter(12, num_experts=5, k=2)
        self.experts = ExpertMLPs(12, 10, num_experts=5)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts, _ = self.router(x)
        found: Tensor = self.experts(x, experts, weights)
        return found


def test_layers_of_experts_go_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(), torch.randn(7, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with ops.force("reference"):
        expected = block(x)
    right = torch.autograd.grad(expected.square().sum(), [x, *block.parameters()])
    called = []
    for file, kernel in (
        (FILES.topk_gate, "forward_kernel"),
        (FILES.topk_gate, "backward_kernel"),
        (FILES.permute, "copy_kernel"),
        (FILES.unpermute, "forward_kernel"),
        (FILES.unpermute, "backward_kernel"),
        (FILES.grouped_matmul, "product_kernel"),
        (FILES.grouped_matmul, "gradient_kernel"),
    ):
        monkeypatch.setattr(file, kernel, Noticed(getattr(file, kernel), called))
    (given,) = moved((x,), DEVICE)
    block.to(DEVICE)
    found = block(given)
    grads = torch.autograd.grad(found.square().sum(), [given, *block.parameters()])
    check_close((found, *grads), (expected, *right), 4.0)
    assert len(set(called)) == 7


class Noticed:
    """A kernel, and a note of each launch."""

    def __init__(self, kernel: object, called: list[object]) -> None:
        self.kernel, self.called = kernel, called

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.called.append(self.kernel)
        return self.kernel[grid]
