"""Grouped products by CUTLASS: who serves which operands, what is refused; and where a GPU is, parity with float64."""

import sys
from types import ModuleType

import pytest
import torch
from devices import without_waits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.cuda import grouped_matmul as cutlass
from zcore.kernels.cuda import grouped_matmul_fp8 as cutlass_fp8
from zcore.kernels.cuda.choosing import choosing

HALVES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CUDA = torch.device("cuda")


def operands(
    counts: list[int], num_in: int, num_out: int, dtype: torch.dtype, *, is_transposed: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    sides = (num_out, num_in) if is_transposed else (num_in, num_out)
    rows, weights = (
        torch.randn(*shape, generator=random).to(device, dtype)
        for shape in ((sum(counts), num_in), (len(counts), *sides))
    )
    return rows, weights, torch.tensor(counts, device=device)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of kernels that takes tensors of 2 elements alone."""
    file = ModuleType("zcore.kernels.cuda.doubled")
    file.doubled = lambda values: values * 2  # type: ignore[attr-defined] - a file made here
    file.why_not_doubled = lambda values: None if values.numel() == 2 else "values has no 2 elements."  # type: ignore[attr-defined] - as above
    monkeypatch.setitem(sys.modules, file.__name__, file)


@pytest.mark.usefixtures("doubled")
def test_the_kernel_serves_what_it_takes_and_another_the_rest() -> None:
    call = choosing("doubled", "doubled", otherwise=lambda values: values - 1)
    taken, other = torch.ones(2), torch.ones(3)
    assert call(taken).tolist() == [2, 2]
    assert call(other).tolist() == [0, 0, 0]
    with ops.force("triton"):
        assert call(taken).tolist() == [0, 0]
    with ops.force("cuda"):
        assert call(taken).tolist() == [2, 2]
        with pytest.raises(ConfigError, match=r"doubled: values has no 2 elements\. `cuda` is asked for, by ZCORE_OPS"):
            call(other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_registry_says_why_and_the_kernel_is_not_asked() -> None:
    (cuda,) = (each for each in ops.registered()["grouped_matmul"] if each.source == "cuda")
    (fp8,) = (each for each in ops.registered()["grouped_matmul_fp8"] if each.source == "cuda")
    reason = cutlass.why_unavailable()
    assert reason is not None
    assert cuda.refusal("cuda", torch.bfloat16) == fp8.refusal("cuda", torch.float8_e4m3fn) == reason
    assert cuda.refusal("cuda", torch.float32) == "serves torch.bfloat16, torch.float16 only"
    assert cuda.refusal("cpu", torch.bfloat16) == "serves cuda only"
    given = operands([2, 3], 16, 8, torch.bfloat16, is_transposed=False)
    assert cutlass.why_not_grouped_matmul(*given) == f"no kernel of CUTLASS can run: {reason}."
    assert cutlass_fp8.why_not(*given[:2]) == f"no kernel of CUTLASS can run: {reason}."


@pytest.mark.parametrize("is_transposed", [False, True])
def test_graphs_know_the_results_on_cuda_without_a_gpu(is_transposed: bool) -> None:
    sides = (8, 16) if is_transposed else (16, 8)
    with FakeTensorMode():
        rows, dout, weights = (
            torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((5, 16), (5, 8), (3, *sides))
        )
        counts = torch.empty(3, device="cuda", dtype=torch.int64)
        out = torch.ops.zcore.grouped_matmul(rows, weights, counts, is_transposed)
        dweights = torch.ops.zcore.grouped_matmul_backward(rows, dout, counts, is_transposed)
        fp8 = torch.ops.zcore.grouped_matmul_fp8(rows, counts, torch.empty(3, 8, 16, device="cuda"), counts, counts)
    assert [(each.shape, each.device.type) for each in (out, dweights, fp8)] == [
        ((5, 8), "cuda"),
        ((3, *sides), "cuda"),
        ((5, 8), "cuda"),
    ]


@pytest.fixture
def as_if_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a kernel is here does not count: what it would say of operands does."""
    monkeypatch.setattr(cutlass, "why_unavailable", lambda: None)
    monkeypatch.setattr(cutlass_fp8, "why_unavailable", lambda device: None)


@pytest.mark.usefixtures("as_if_built")
@pytest.mark.parametrize("is_transposed", [False, True])
def test_sides_that_are_no_multiples_are_named(is_transposed: bool) -> None:
    for num_in, num_out, words in (
        (16, 24, None),
        (12, 24, "in is 12; expected a multiple of 8"),
        (16, 20, "out is 20; expected a multiple of 8"),
        (0, 8, None),
    ):
        rows, weights, counts = operands([2, 3], num_in, num_out, torch.bfloat16, is_transposed=is_transposed)
        dout = torch.empty(5, num_out, dtype=rows.dtype)
        for found in (
            cutlass.why_not_grouped_matmul(rows, weights, counts, is_transposed),
            cutlass.why_not_grouped_matmul_backward(rows, dout, counts, is_transposed),
        ):
            assert found == words if words is None else found is not None and found.startswith(words)


def test_fp8_is_asked_of_the_device_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device | None] = []

    def capability(device: torch.device | None) -> tuple[int, int]:
        asked.append(device)
        return (9, 0) if device is None else (8, 0)

    monkeypatch.setattr(cutlass_fp8, "why_no_products", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    rows = torch.empty(5, 16)
    assert cutlass_fp8.why_unavailable() is None
    assert "this device is sm_80" in str(cutlass_fp8.why_not(rows, torch.empty(3, 8, 16)))
    assert asked == [None, rows.device]


@pytest.mark.usefixtures("as_if_built")
def test_fp8_wants_more_elements_at_a_time() -> None:
    fp8 = torch.float8_e4m3fn
    for num_in, num_out, words in ((16, 8, None), (24, 8, "in is 24; expected a multiple of 16"), (16, 4, "out is 4")):
        found = cutlass_fp8.why_not(torch.empty(5, num_in, dtype=fp8), torch.empty(3, num_out, num_in, dtype=fp8))
        assert found == words if words is None else found is not None and found.startswith(words)


@pytest.mark.usefixtures("as_if_built")
def test_dtypes_and_addresses_that_do_not_fit_are_named() -> None:
    rows, weights, counts = operands([2, 3], 16, 8, torch.float32, is_transposed=False)
    reason = "rows is torch.float32; expected torch.bfloat16 or torch.float16."
    assert cutlass.why_not_grouped_matmul(rows, weights, counts) == reason
    odd = torch.empty(5 * 16 + 1, dtype=torch.bfloat16)[1:].view(5, 16)
    found = cutlass.why_not_grouped_matmul(odd, weights.bfloat16(), counts)
    assert found is not None
    assert found.startswith("an operand, of shape (5, 16), begins at an address that is no multiple of 16.")
    assert cutlass.why_not_grouped_matmul(odd.clone(), weights.bfloat16(), counts) is None


@pytest.mark.usefixtures("as_if_built")
def test_operands_that_make_no_sense_are_refused_and_not_handed_on() -> None:
    rows, weights, counts = operands([2, 3], 16, 8, torch.bfloat16, is_transposed=False)
    with pytest.raises(LayoutError, match=r"grouped_matmul: .* expected \[total, in\] and \[num_experts, out, in\]"):
        cutlass.why_not_grouped_matmul(rows, weights, counts, is_transposed=True)
    with pytest.raises(ConfigError, match=r"grouped_matmul: counts is torch.int32"):
        cutlass.why_not_grouped_matmul(rows, weights, counts.int())
    with pytest.raises(LayoutError, match=r"grouped_matmul_backward: dout has shape \(4, 8\); expected \(5, 8\)"):
        cutlass.why_not_grouped_matmul_backward(rows, rows[:4, :8].contiguous(), counts, is_transposed=False)


on_gpu = pytest.mark.skipif(cutlass.why_unavailable() is not None, reason=cutlass.why_unavailable() or "")
on_hopper = pytest.mark.skipif(cutlass_fp8.why_unavailable() is not None, reason=cutlass_fp8.why_unavailable() or "")
# Rows of each expert, in, out: none, one, a tile less and more one; sides below, at and beyond a tile.
SHAPES = [
    ([0], 8, 8),
    ([1], 8, 8),
    ([0, 0, 5], 64, 72),
    ([127, 0, 128, 129], 72, 136),
    ([3, 300, 0, 1], 264, 520),
    ([7] * 40, 128, 256),
    ([1000, 1], 0, 16),
]
shapes = pytest.mark.parametrize(("counts", "num_in", "num_out"), SHAPES)


def product(rows: Tensor, weights: Tensor, counts: Tensor, is_transposed: bool) -> Tensor:
    """In float64, on the CPU."""
    wide = (weights.mT if is_transposed else weights).cpu().double()
    groups = rows.cpu().double().split(counts.tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, wide, strict=True)])


def check_close(found: Tensor, expected: Tensor, num_terms: int, *, size: float = 1.0) -> None:
    """Of sums of `num_terms` products that are of about `size`."""
    tolerance = TOLERANCE[found.dtype]
    atol = tolerance * size * max(num_terms, 1) ** 0.5 / 4  # such sums may cancel
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=atol)


@on_gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@shapes
def test_products_and_gradients_are_those_of_float64(
    counts: list[int], num_in: int, num_out: int, is_transposed: bool, dtype: torch.dtype
) -> None:
    given = operands(counts, num_in, num_out, dtype, is_transposed=is_transposed, device="cuda")
    wide = [each.detach().cpu().double().requires_grad_() for each in given[:2]]
    expected = product(*wide, given[2], is_transposed)
    rows, weights = (each.requires_grad_() for each in given[:2])
    with ops.force("cuda"):
        out = torch.ops.zcore.grouped_matmul(rows, weights, given[2], is_transposed)
        check_close(out.detach(), expected.detach(), num_in)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(CUDA, dtype)
        found = torch.autograd.grad(out, (rows, weights), dout)
    right = torch.autograd.grad(expected, wide, dout.cpu().double())
    check_close(found[0], right[0], num_out)
    check_close(found[1], right[1], max(counts))
    for expert, count in enumerate(counts):
        assert count or not found[1][expert].any()  # exact zeros


@on_gpu
@pytest.mark.parametrize("is_transposed", [False, True])
def test_nothing_waits_for_the_device_and_runs_are_equal(is_transposed: bool) -> None:
    rows, weights, counts = operands([100, 0, 57], 64, 128, torch.bfloat16, is_transposed=is_transposed, device="cuda")
    dout = torch.randn(157, 128, device=CUDA, dtype=torch.bfloat16)

    def both() -> list[Tensor]:
        return [
            torch.ops.zcore.grouped_matmul(rows, weights, counts, is_transposed),
            torch.ops.zcore.grouped_matmul_backward(rows, dout, counts, is_transposed),
        ]

    with ops.force("cuda"):
        first = both()
        with without_waits():
            second = both()
    assert all(map(torch.equal, first, second))


@on_gpu
def test_counts_that_do_not_add_up_touch_no_other_memory() -> None:
    rows, weights, counts = operands([6, 4], 16, 8, torch.bfloat16, is_transposed=False, device="cuda")
    expected = product(rows, weights, counts, False)
    with ops.force("cuda"):
        few = torch.ops.zcore.grouped_matmul(rows, weights, counts - torch.tensor([0, 3], device=CUDA))
        many = torch.ops.zcore.grouped_matmul(rows, weights, counts + torch.tensor([0, 1 << 40], device=CUDA))
        dout = torch.ones(10, 8, device=CUDA, dtype=torch.bfloat16)
        unclean = torch.full_like(weights, torch.nan)
        del unclean  # and what is not written shows
        dweights = torch.ops.zcore.grouped_matmul_backward(rows, dout, torch.tensor([10, 3], device=CUDA), False)
    check_close(dweights[0], rows.cpu().double().T @ dout.cpu().double(), 10)
    assert torch.equal(dweights[1], torch.zeros_like(dweights[1]))  # no row is left for it
    check_close(few[:7], expected[:7], 16)
    assert few[7:].isnan().all()
    check_close(many, expected, 16)


@on_gpu
def test_sides_that_do_not_fit_go_to_triton_and_are_refused_where_cuda_is_forced() -> None:
    rows, weights, counts = operands([6, 4], 12, 8, torch.bfloat16, is_transposed=False, device="cuda")
    with ops.force("cuda"), pytest.raises(ConfigError, match="grouped_matmul: in is 12; expected a multiple of 8"):
        torch.ops.zcore.grouped_matmul(rows, weights, counts)
    pytest.importorskip("triton")
    check_close(torch.ops.zcore.grouped_matmul(rows, weights, counts), product(rows, weights, counts, False), 12)


def fp8_operands(counts: list[int], num_in: int, num_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, weights, on_device = operands(counts, num_in, num_out, torch.float32, is_transposed=True, device="cuda")
    random = torch.Generator().manual_seed(8)
    row_scales, weight_scales = (
        (0.5 + torch.rand(each.shape[:-1], generator=random)).to(CUDA) for each in (rows, weights)
    )
    return rows.to(torch.float8_e4m3fn), row_scales, weights.to(torch.float8_e4m3fn), weight_scales, on_device


@on_hopper
@pytest.mark.parametrize(
    ("counts", "num_in", "num_out"), [(counts, -(-num_in // 16) * 16, num_out) for counts, num_in, num_out in SHAPES]
)
def test_fp8_is_scaled_and_right(counts: list[int], num_in: int, num_out: int) -> None:
    given = fp8_operands(counts, num_in, num_out)
    rows, row_scales, weights, weight_scales, on_device = given
    wide = rows.double() * row_scales[:, None], weights.double() * weight_scales[..., None]
    # Two scales of up to 1.5 make products of up to 2.25; and sm_90 adds fp8 with fewer bits than fp32 has.
    check_close(torch.ops.zcore.grouped_matmul_fp8(*given), product(*wide, on_device, True), num_in, size=2.0)


@pytest.mark.skipif(
    cutlass.why_unavailable() is not None or cutlass_fp8.why_unavailable() is None,
    reason=cutlass.why_unavailable() or "this device serves fp8",
)
def test_fp8_is_refused_in_words_where_the_device_has_none() -> None:
    with pytest.raises(ConfigError, match=r"grouped_matmul_fp8: .* it is written for sm_90, and this device is sm_"):
        torch.ops.zcore.grouped_matmul_fp8(*fp8_operands([3], 16, 8))


@on_hopper
@pytest.mark.parametrize(("num_in", "num_out"), [(24, 8), (16, 4)])
def test_fp8_that_does_not_fit_is_refused_by_name(num_in: int, num_out: int) -> None:
    with pytest.raises(ConfigError, match=r"expected a multiple of .*ZCORE_OPS=reference computes in plain torch"):
        torch.ops.zcore.grouped_matmul_fp8(*fp8_operands([3], num_in, num_out))
