"""Linear cross-entropy in chunks beside that of whole logits: values, gradients, dtypes, memory, refusals, a model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.kernels.nn import LinearCrossEntropy
from zcore.kernels.ops.linear_cross_entropy import linear_cross_entropy, reference

# Of 1 + the magnitude. 16-bit logits are rounded before the loss, in both alike.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
REDUCTIONS = ["mean", "sum", "none"]
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.05, "logit_softcap": 3.0}
SETTINGS = [{}, {"label_smoothing": 0.3}, {"z_loss": 0.1}, {"logit_softcap": 2.0}, {"ignore_index": 1}, EVERYTHING]
every_setting = pytest.mark.parametrize("given_settings", SETTINGS, ids=str)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@dataclass
class Operands:
    """hidden, weight and bias with gradients, and targets of which every fourth is ignored."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    ignore_index: int = -100
    seed: int = 7
    targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (self.tokens, self.hidden), (self.vocabulary, self.hidden), (self.vocabulary,)
        self.floats = [torch.randn(shape, generator=generator).to(self.dtype).requires_grad_() for shape in shapes]
        self.targets = torch.randint(self.vocabulary, (self.tokens,), generator=generator)
        self.targets[1::4] = self.ignore_index

    def run(self, function: Callable[..., Tensor], **given_settings: Any) -> list[Tensor]:
        """The loss, and of a weighted sum of losses the gradients of those that need one."""
        return run(function, self.floats, self.targets, **given_settings)

    def expected(self, **given_settings: Any) -> list[Tensor]:
        """The same of the reference in float64."""
        wide = [each.detach().double().requires_grad_() for each in self.floats]
        return run(reference, wide, self.targets, **given_settings)


def run(function: Callable[..., Tensor], floats: list[Tensor], targets: Tensor, **given_settings: Any) -> list[Tensor]:
    hidden, weight, bias = floats
    loss = function(hidden, weight, targets, bias, **given_settings)
    factors = torch.linspace(0.5, 2.0, max(1, loss.numel())).to(loss.dtype)[: loss.numel()].view(loss.shape)
    return [loss, *torch.autograd.grad((loss * factors).sum(), [each for each in floats if each.requires_grad])]


def check_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    for index, (each, right) in enumerate(zip(found, expected, strict=True)):
        assert each.dtype == (torch.promote_types(dtype, torch.float32) if index == 0 else dtype)
        assert each.shape == right.shape
        torch.testing.assert_close(
            each.double(), right, atol=TOLERANCE[dtype] * factor, rtol=TOLERANCE[dtype] * factor, equal_nan=True
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 33]),
    hidden=st.sampled_from([0, 1, 5, 16]),
    vocabulary=st.sampled_from([2, 3, 31, 130]),
    chunk_rows=st.sampled_from([1, 3, 8, 100, None]),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    given_settings=st.sampled_from(SETTINGS),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_whole_logits_in_float64(  # noqa: PLR0917 - drawn by name
    tokens: int,
    hidden: int,
    vocabulary: int,
    chunk_rows: int | None,
    dtype: torch.dtype,
    reduction: str,
    given_settings: dict[str, Any],
    seed: int,
) -> None:
    ignore_index = given_settings.get("ignore_index", -100)
    operands = Operands(tokens, hidden, vocabulary, dtype, ignore_index, seed)
    found = operands.run(linear_cross_entropy, chunk_rows=chunk_rows, reduction=reduction, **given_settings)
    expected = operands.expected(reduction=reduction, **given_settings)
    # Sums over tokens and over 16 products: rounding grows as a random walk does.
    check_close(found, expected, dtype, 1.0 + 4.0 * max(1, tokens) ** 0.5)


@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_is_torchs_cross_entropy(reduction: str, smoothing: float) -> None:
    operands = Operands(9, 5, 11)
    hidden, weight, bias = operands.floats
    logits = functional.linear(hidden, weight, bias)
    expected = functional.cross_entropy(logits, operands.targets, label_smoothing=smoothing, reduction=reduction)
    found = reference(hidden, weight, operands.targets, bias, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_as_torch_does_in_whole_logits(dtype: torch.dtype) -> None:
    operands = Operands(40, 64, 300, dtype)
    found, plain = operands.run(linear_cross_entropy, chunk_rows=40), operands.run(reference)
    torch.testing.assert_close(found[0], plain[0], atol=1e-4, rtol=1e-4)
    for each, right in zip(found[1:], plain[1:], strict=True):
        torch.testing.assert_close(each, right, atol=4e-3 * float(right.abs().max()), rtol=2e-2)


def test_gradients_of_a_mean_in_fp16_are_scaled_before_they_are_rounded() -> None:
    tokens = 4000
    hidden, weight = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(50, 8)
    weight[0] = 2e-3  # a mean's gradients of hidden are below the least fp16 number
    targets = torch.zeros(tokens, dtype=torch.int64)
    halves = [each.half().requires_grad_() for each in (hidden, weight)]
    wide = [each.detach().double().requires_grad_() for each in halves]
    scale = 2.0**16
    found = torch.autograd.grad(linear_cross_entropy(*halves, targets) * scale, halves)
    expected = torch.autograd.grad(reference(*wide, targets) * scale, wide)
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), right, atol=1e-3 * float(right.abs().max()), rtol=5e-3)


@every_setting
@every_reduction
def test_gradients_are_those_that_differences_show(reduction: str, given_settings: dict[str, Any]) -> None:
    operands = Operands(5, 3, 6, torch.float64, given_settings.get("ignore_index", -100))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.zcore.linear_cross_entropy(
            hidden, weight, operands.targets, bias, chunk_rows=2, reduction=reduction, **given_settings
        )

    assert torch.autograd.gradcheck(loss, operands.floats)


@every_reduction
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_what_needs_a_gradient_has_one(needed: tuple[int, ...], reduction: str) -> None:
    operands = Operands(7, 4, 9)
    expected = operands.run(reference, reduction=reduction)[1:]
    for index, each in enumerate(operands.floats):
        each.requires_grad_(index in needed)
    found = operands.run(linear_cross_entropy, chunk_rows=2, reduction=reduction)[1:]
    for each, index in zip(found, needed, strict=True):
        torch.testing.assert_close(each, expected[index])


@every_reduction
def test_a_retained_graph_gives_the_same_gradients_again_and_adds_them_up(reduction: str) -> None:
    operands = Operands(7, 4, 9)
    hidden, weight, bias = operands.floats
    loss = linear_cross_entropy(hidden, weight, operands.targets, bias, chunk_rows=3, reduction=reduction).sum()
    (loss * 4.0).backward(retain_graph=True)
    first = [each.grad.clone() for each in operands.floats]
    loss.backward()
    for each, once in zip(operands.floats, first, strict=True):
        torch.testing.assert_close(each.grad, once * 1.25)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    operands = Operands(7, 4, 9)
    hidden, weight, bias = operands.floats
    with torch.no_grad(), torch.profiler.profile() as profile:
        loss = linear_cross_entropy(hidden, weight, operands.targets, bias, chunk_rows=7)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert not loss.requires_grad
    assert calls["aten::addmm"] == 1  # the logits
    assert "aten::mm" not in calls
    assert "aten::scatter_add_" not in calls


@every_reduction
def test_a_second_derivative_is_refused(reduction: str) -> None:
    operands = Operands(4, 3, 6)
    hidden, weight, bias = operands.floats
    loss = linear_cross_entropy(hidden, weight, operands.targets, bias, reduction=reduction).sum()
    (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(StateError, match="first derivatives only"):
        dhidden.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
@every_reduction
def test_derivatives_in_forward_mode_and_of_torch_func_are_refused_and_never_zero(reduction: str) -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(6, 4, requires_grad=True)

    def loss(hidden: Tensor) -> Tensor:
        return LinearCrossEntropy(reduction=reduction)(hidden, weight, torch.tensor([0, 5, -100])).sum()

    with pytest.raises(StateError, match="no forward-mode derivatives"):
        torch.func.jvp(loss, (hidden,), (hidden,))
    with pytest.raises(StateError, match=r"no derivatives by torch\.func"):
        torch.func.grad(loss)(hidden)


@pytest.mark.parametrize("targets", [[-100, -100, -100], []], ids=["all ignored", "no token"])
def test_the_mean_of_nothing_is_nan_and_its_gradients_are_zero_as_in_torch(targets: list[int]) -> None:
    hidden, weight = torch.randn(len(targets), 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    wanted = torch.tensor(targets, dtype=torch.int64)
    for function in (
        linear_cross_entropy,
        lambda hidden, weight, wanted: functional.cross_entropy(functional.linear(hidden, weight), wanted),
    ):
        loss = function(hidden, weight, wanted)
        assert loss.isnan()
        for each in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(each, torch.zeros_like(each))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("given_settings", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_what_is_not_finite_comes_out_as_in_torch(special: float, given_settings: dict[str, Any]) -> None:
    operands = Operands(3, 4, 9)
    operands.targets = torch.tensor([2, 3, -100])
    with torch.no_grad():
        operands.floats[2][5] = special
    found = operands.run(linear_cross_entropy, reduction="none", **given_settings)
    check_close(found, operands.expected(reduction="none", **given_settings), torch.float32)


def test_any_shape_before_hidden_and_any_strides_are_served() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 3, 5, generator=generator).transpose(0, 2).requires_grad_()  # [5, 3, 4]
    weight = torch.randn(4, 18, generator=generator).T[::2].requires_grad_()
    targets = torch.arange(30).view(3, 10).T[::2] % 9  # [5, 3]
    bias = torch.randn(27, generator=generator)[::3].requires_grad_()
    found = run(linear_cross_entropy, [hidden, weight, bias], targets, reduction="none", chunk_rows=4)
    expected = run(reference, [hidden, weight, bias], targets, reduction="none")
    assert found[0].shape == (5, 3)
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each, right)
    one = linear_cross_entropy(hidden[0, 0], weight, targets[0, 0], bias)
    torch.testing.assert_close(one, found[0][0, 0])


def test_autocast_casts_operands_as_it_does_those_of_linear() -> None:
    operands = Operands(9, 8, 30)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = operands.run(linear_cross_entropy), operands.run(reference)
        torch.compiler.reset()
        compiled = operands.run(torch.compile(LinearCrossEntropy(), fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, compiled, found))
    narrow = [each.detach().bfloat16().requires_grad_() for each in operands.floats]
    assert torch.equal(found[0], run(linear_cross_entropy, narrow, operands.targets)[0])
    for each, right in zip(found, expected, strict=True):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each, right, atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at that of operands that were reshaped
@every_reduction
@pytest.mark.parametrize("given_settings", [{}, EVERYTHING], ids=["plain", "everything"])
def test_torch_finds_the_registration_right(reduction: str, given_settings: dict[str, Any]) -> None:
    operands = Operands(5, 3, 6)
    hidden, weight, bias = operands.floats
    torch.library.opcheck(
        torch.ops.zcore.linear_cross_entropy.default,
        (hidden, weight, operands.targets, bias),
        {"reduction": reduction, "chunk_rows": 2, **given_settings},
    )


@every_reduction
def test_torch_compile_passes_without_a_graph_break(reduction: str) -> None:
    torch.compiler.reset()
    layer, operands = LinearCrossEntropy(reduction=reduction, chunk_rows=2, **EVERYTHING), Operands(5, 3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(operands.run(compiled), operands.run(layer), strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        hidden, weight, bias = operands.floats
        assert torch.equal(
            compiled(hidden, weight, operands.targets, bias), layer(hidden, weight, operands.targets, bias)
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_equal_from_run_to_run(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        one, other = (Operands(70, 24, 500, torch.bfloat16).run(linear_cross_entropy) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, other))


def test_the_registry_serves_chunks_and_the_reference_where_it_is_asked_for() -> None:
    operands, cpu = Operands(5, 3, 6), torch.device("cpu")
    chosen = ops.choose("linear_cross_entropy", device=cpu, dtype=torch.bfloat16)
    assert chosen.source == "torch"
    with ops.force("reference"):
        assert ops.get("linear_cross_entropy", device=cpu, dtype=torch.bfloat16) is reference
        hidden, weight, bias = operands.floats
        loss = LinearCrossEntropy()(hidden, weight, operands.targets, bias)
        (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
        dhidden.sum().backward()  # plain torch has higher derivatives


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"hidden": torch.zeros(5, 4)}, LayoutError, r"hidden has shape \(5, 4\) and weight \(6, 3\); expected"),
        ({"weight": torch.zeros(6, 3, 1)}, LayoutError, r"expected \[\.\.\., hidden\] and \[vocabulary, hidden\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, LayoutError, r"targets have shape \(4,\); expected \(5,\)"),
        ({"bias": torch.zeros(5)}, LayoutError, r"bias has shape \(5,\); expected \(6,\)"),
        ({"targets": torch.zeros(5)}, ConfigError, r"targets are torch.float32; expected torch.int64"),
        (
            {"hidden": torch.zeros(5, 3, dtype=torch.int32)},
            ConfigError,
            "hidden is torch.int32; expected torch.float32",
        ),
        (
            {"weight": torch.zeros(6, 3).half()},
            ConfigError,
            "weight is torch.float16; expected torch.float32, as hidden",
        ),
        ({"bias": torch.zeros(6).double()}, ConfigError, "bias is torch.float64; expected torch.float32, as hidden"),
        ({"weight": torch.zeros(6, 3, device="meta")}, LayoutError, "weight is on meta; expected cpu"),
        ({"targets": torch.tensor([0, 1, 6, 2, 3])}, LayoutError, "targets are from 0 to 6; expected 0 to 5"),
        ({"targets": torch.tensor([0, 1, -1, 2, 3])}, LayoutError, "targets are from -1 to 3; expected 0 to 5"),
        ({"reduction": "max"}, ConfigError, "reduction is 'max'; expected one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ConfigError, "label_smoothing is 1.5; expected 0 to 1"),
        ({"logit_softcap": 0.0}, ConfigError, "logit_softcap is 0.0; expected more than 0"),
        ({"chunk_rows": 0}, ConfigError, "chunk_rows is 0; expected 1 or more"),
        ({"source": "cuda"}, ConfigError, "source is 'cuda'; expected torch or triton"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    operands = Operands(5, 3, 6)
    hidden, weight, bias = operands.floats
    taken = {"hidden": hidden, "weight": weight, "targets": operands.targets, "bias": bias} | changed
    with pytest.raises(error, match="linear_cross_entropy: .*" + words):
        linear_cross_entropy(**taken)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that tensors made inside took at once, by what torch's CPU allocator reports to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(taken))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_more_than_a_chunk_of_logits_is_in_memory(dtype: torch.dtype, reduction: str) -> None:
    tokens, hidden, vocabulary, chunk_rows = 512, 16, 4096, 32
    operands = Operands(tokens, hidden, vocabulary, dtype)

    def train(function: Callable[..., Tensor], **given_settings: Any) -> Callable[[], object]:
        return lambda: operands.run(function, reduction=reduction, **given_settings)

    plain, ours = peak_bytes(train(reference)), peak_bytes(train(linear_cross_entropy, chunk_rows=chunk_rows))
    logits = tokens * vocabulary * dtype.itemsize
    assert plain > 2 * logits  # what is measured is there: logits and their gradient
    chunk = chunk_rows * vocabulary * dtype.itemsize
    block = 4 * (1 << 18)  # fp32 rows on which the loss is computed, of which there are a few copies
    kept = (tokens * hidden * 2 + vocabulary * (hidden + 1)) * (4 + dtype.itemsize)
    assert ours < chunk + 4 * block + kept
    assert ours < plain / 3


def test_a_hugging_face_model_trains_as_with_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    input_ids = torch.randint(97, (2, 11))
    labels = input_ids.clone()
    labels[0, :4] = -100  # a prompt
    expected = model(input_ids=input_ids, labels=labels).loss
    expected.backward()
    gradients = [each.grad for each in model.parameters()]
    model.zero_grad()

    hidden = model.model(input_ids).last_hidden_state
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)  # each token is to tell the next one
    loss = LinearCrossEntropy(chunk_rows=5)(hidden, model.lm_head.weight, targets)
    loss.backward()

    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_print_shows_the_settings() -> None:
    assert repr(LinearCrossEntropy(z_loss=1e-4)) == (
        "LinearCrossEntropy(ignore_index=-100, label_smoothing=0.0, z_loss=0.0001, logit_softcap=None, "
        "reduction='mean', chunk_rows=None)"
    )
