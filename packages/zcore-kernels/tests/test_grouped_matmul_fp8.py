"""grouped_matmul of fp8 against its formula in float64: odd shapes, scales, what is not finite, refusals, compiling."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.kernels.ops import grouped_matmul_fp8

FP8 = torch.float8_e4m3fn
OP = torch.ops.zcore.grouped_matmul_fp8
CPU = torch.device("cpu")

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def drawn(total: int, num_in: int, num_out: int, num_experts: int, seed: int = 7) -> Operands:
    """The last expert gets no rows where there is more than one."""
    random = torch.Generator().manual_seed(seed)
    rows, weights = (
        torch.randn(*shape, generator=random).to(FP8) for shape in ((total, num_in), (num_experts, num_out, num_in))
    )
    row_scales, weight_scales = (0.5 + torch.rand(*each.shape[:-1], generator=random) for each in (rows, weights))
    experts = torch.randint(max(num_experts - 1, 1), (total,), generator=random)
    return rows, row_scales, weights, weight_scales, torch.bincount(experts, minlength=num_experts)


def formula(rows: Tensor, row_scales: Tensor, weights: Tensor, weight_scales: Tensor, counts: Tensor) -> Tensor:
    """In float64, the scales folded into the operands first."""
    wide = weights.double() * weight_scales.double()[..., None]
    of_rows = wide[torch.repeat_interleave(torch.arange(len(counts)), counts)]
    return torch.einsum("ti,toi->to", rows.double() * row_scales.double()[:, None], of_rows)


def close(found: Tensor, expected: Tensor, num_in: int) -> None:
    assert found.dtype is torch.bfloat16
    tolerance = 2.0**-8
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance * num_in**0.5 / 16, equal_nan=True
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    total=st.sampled_from([0, 1, 7, 40]),
    num_in=st.sampled_from([0, 1, 16, 123]),
    num_out=st.sampled_from([0, 1, 8, 37]),
    num_experts=st.sampled_from([1, 2, 9]),
    seed=st.integers(0, 99),
)
def test_it_is_the_scaled_product(total: int, num_in: int, num_out: int, num_experts: int, seed: int) -> None:
    operands = drawn(total, num_in, num_out, num_experts, seed)
    close(OP(*operands), formula(*operands), num_in)


def test_no_experts_and_no_rows_give_nothing() -> None:
    found = OP(*drawn(0, 16, 8, 0))
    assert (found.shape, found.dtype) == ((0, 8), torch.bfloat16)


def test_one_scale_of_a_whole_tensor_is_expanded() -> None:
    rows, _, weights, _, counts = drawn(5, 16, 8, 2)
    scale = torch.tensor(0.25)
    found = OP(rows, scale.expand(5).contiguous(), weights, scale.expand(2, 8).contiguous(), counts)
    ones = torch.ones(5), torch.ones(2, 8)
    assert torch.equal(found * 16, OP(rows, ones[0], weights, ones[1], counts))  # powers of two: exact


def test_nan_stays_in_its_row() -> None:
    operands = drawn(6, 16, 8, 2)
    operands[0].view(torch.uint8)[2, 3] = 0x7F
    close(OP(*operands), formula(*operands), 16)
    assert OP(*operands).isnan().any(1).tolist() == [row == 2 for row in range(6)]


def test_what_is_too_large_for_bf16_becomes_infinite() -> None:
    rows, row_scales, weights, weight_scales, counts = drawn(3, 16, 8, 1)
    found = OP(rows, row_scales * 3e38, weights, weight_scales * 3e38, counts)
    assert found.isinf().all()


def test_torch_finds_the_registration_right() -> None:
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operands = drawn(5, 16, 8, 3)
    before = [each.clone() for each in operands]
    # test_schema, which looks whether operands change, multiplies them, and torch multiplies no fp8.
    torch.library.opcheck(OP.default, operands, test_utils=utilities)
    assert all(
        torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(before, operands, strict=True)
    )


def test_torch_compile_passes_without_a_graph_break() -> None:
    torch.compiler.reset()
    operands = drawn(5, 16, 8, 3)
    compiled = torch.compile(lambda *given: OP(*given) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*operands), OP(*operands) + 1)


def test_a_fake_result_is_of_bf16_for_every_device() -> None:
    meta = OP(*(each.to("meta") for each in drawn(5, 16, 8, 3)))
    assert (meta.shape, meta.dtype, meta.device.type) == ((5, 8), torch.bfloat16, "meta")


def test_there_is_no_gradient() -> None:
    rows, row_scales, weights, weight_scales, counts = drawn(5, 16, 8, 3)
    out = OP(rows, row_scales.requires_grad_(), weights, weight_scales, counts)
    with pytest.raises(StateError, match="has no gradient: its weights are not trained"):
        out.sum().backward()


def test_the_registry_serves_the_op_and_says_why_cuda_cannot_be_forced_here() -> None:
    assert ops.get("grouped_matmul_fp8", device=CPU, dtype=FP8) is OP
    with ops.force("reference"):
        assert ops.get("grouped_matmul_fp8", device=CPU, dtype=FP8) is grouped_matmul_fp8.reference


def replaced(index: int, other: Any) -> tuple[Any, ...]:
    operands = drawn(5, 16, 8, 3)
    return (*operands[:index], other(operands[index]), *operands[index + 1 :])


REFUSED = [
    (0, lambda rows: rows.float(), ConfigError, "rows is torch.float32; expected torch.float8_e4m3fn"),
    (0, lambda rows: rows.to(torch.float8_e5m2), ConfigError, "rows is torch.float8_e5m2; expected"),
    (0, lambda rows: rows[0], LayoutError, r"rows has shape \(16,\), weights \(3, 8, 16\); expected \[total, in\]"),
    (0, lambda rows: rows.repeat_interleave(2, 1)[:, ::2], LayoutError, "rows, of shape .* expected contiguous"),
    (1, lambda scales: scales.double(), ConfigError, "row_scales is torch.float64; expected torch.float32"),
    (1, lambda scales: scales[0], LayoutError, r"row_scales has shape \(\); expected \(5,\)"),
    (2, lambda weights: weights.mT.contiguous(), LayoutError, r"weights \(3, 16, 8\); expected \[total, in\] and"),
    (2, lambda weights: weights.bfloat16(), ConfigError, "weights is torch.bfloat16; expected"),
    (3, lambda scales: scales[:, 0], LayoutError, r"weight_scales has shape \(3,\); expected \(3, 8\)"),
    (4, lambda counts: counts.int(), ConfigError, "counts is torch.int32; expected torch.int64"),
    (4, lambda counts: counts[:2], LayoutError, r"counts has shape \(2,\); expected \(3,\)"),
    (4, lambda counts: counts + 1, LayoutError, "expected none below 0, and 5 together, one for each row"),
    (4, lambda counts: counts * 0 + torch.tensor([-1, 3, 3]), LayoutError, "expected none below 0"),
]


@pytest.mark.parametrize(("index", "other", "error", "words"), REFUSED)
def test_operands_that_make_no_sense_are_refused_by_name(
    index: int, other: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"grouped_matmul_fp8: .*{words}"):
        OP(*replaced(index, other))
