"""The steps of optimizers over flat pieces, each against its reference in fp64, whatever shape, dtype and threads.

On the CPU, and on a GPU where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from devices import DEVICES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import STEPS, operands_of
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels import _cpu
from zcore.kernels.ops import adamw_step, lion_step, sgd_step, squared_norm
from zcore.kernels.ops.dynamic_code import bounds, decode, encode, num_blocks
from zcore.kernels.ops.registering import register

SIZES = (0, 1, 7, 255, 256, 257, 1023)
# Rounding where a value is written, once; in fp32 some roundings in between, which the compiler may fuse or not.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def cloned(operands: dict[str, Any], *, floats: torch.dtype | None = None) -> dict[str, Any]:
    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if floats is None or not tensor.is_floating_point() else tensor.to(floats, copy=True)

    return {
        name: copy(value) if isinstance(value, Tensor) else [copy(each) for each in value]
        for name, value in operands.items()
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    numels=st.lists(st.sampled_from(SIZES), max_size=4),
    kinds=st.fixed_dictionaries(
        {
            "param": st.sampled_from([torch.float32, torch.bfloat16]),
            "grad": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
            "state": st.sampled_from([torch.float32, torch.bfloat16]),
            "with_copies": st.booleans(),
            "shift": st.integers(0, 4),
        }
    ),
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_its_reference_in_fp64(name: str, device: str, numels: list[int], kinds: dict[str, Any]) -> None:
    step = STEPS[name]
    mine = operands_of(step, numels, device=device, **kinds)
    exact = cloned(mine, floats=torch.float64)
    returned = step.call(**mine, **step.settings)
    expected = step.module.reference(**exact, **step.settings)
    if expected is not None:
        torch.testing.assert_close(returned, expected, rtol=1e-5, atol=1e-9)
    for key, values in mine.items():
        for ours, theirs in zip(values, exact[key], strict=True):
            if key != "ratios":
                bound = TOLERANCE[ours.dtype]
                torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.states])
def test_a_step_on_codes_of_one_byte_is_its_reference(name: str, device: str) -> None:
    step = STEPS[name]
    kinds = {"param": torch.float32, "grad": torch.float32, "state": torch.uint8}
    mine = operands_of(step, list(SIZES), **kinds, with_copies=False, device=device)
    other = cloned(mine)
    step.call(**mine, **step.settings)
    step.module.reference(**other, **step.settings)
    for key, values in mine.items():
        for ours, theirs in zip(values, other[key], strict=True):
            if ours.dtype is torch.uint8:  # a fused multiply-add may tip what lies between two codes
                assert ((ours.int() - theirs.int()).abs() <= 1).all()
                assert (ours != theirs).float().mean().nan_to_num() <= 0.02
            else:
                torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("state", [torch.float32, torch.uint8])
@pytest.mark.parametrize("name", STEPS)
def test_the_number_of_threads_changes_no_bit(name: str, state: torch.dtype) -> None:
    step = STEPS[name]
    runs = []
    for count in (1, 2):
        mine = operands_of(
            step, [70_001, 3, 40_000], param=torch.float32, grad=torch.bfloat16, state=state, with_copies=True
        )
        with threads(count):
            returned = step.call(**mine, **step.settings)
        runs.append((mine, returned))
    (one, returned_one), (two, returned_two) = runs
    for key, values in one.items():
        for left, right in zip(values, two[key], strict=True):
            assert_same(left, right)
    if returned_one is not None:
        assert_same(returned_one, returned_two)


@needs_cuda
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_has_the_bits_of_a_cpu_with_fma_and_the_same_in_every_run(name: str, state: torch.dtype) -> None:
    step = STEPS[name]
    kinds = {"param": torch.float32, "grad": torch.bfloat16, "state": state, "with_copies": True}
    numels = [*SIZES, 70_001, *(each % 5 for each in range(150))]  # several launches
    runs = [operands_of(step, numels, **kinds, device=device) for device in ("cpu", "cuda", "cuda")]
    returned = [step.call(**run, **step.settings) for run in runs]
    for key, values in runs[0].items():
        for here, there, again in zip(values, runs[1][key], runs[2][key], strict=True):
            assert_same(there, again)
            if "avx" in _cpu.instruction_set():
                assert_same(there.cpu(), here)
    if returned[0] is not None:
        assert_same(returned[1], returned[2])
        torch.testing.assert_close(returned[1].cpu(), returned[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if name != "lamb_apply"])
def test_a_clip_factor_counts_as_the_factor_of_gradients_does(name: str, device: str) -> None:
    step = STEPS[name]
    kinds = {"param": torch.float32, "grad": torch.float32, "state": torch.float32, "with_copies": False}
    runs = [operands_of(step, [300, 5], **kinds, device=device) for _ in range(2)]
    factor = step.settings.get("grad_factor", 1.0)
    step.call(**runs[0], **{**step.settings, "grad_factor": factor * 0.375})
    step.call(**runs[1], **step.settings, clip_factor=torch.tensor(0.375, device=device))
    for key, values in runs[0].items():
        for left, right in zip(values, runs[1][key], strict=True):
            assert_same(left, right)
    exact = [cloned(operands_of(step, [300, 5], **kinds), floats=torch.float64) for _ in range(2)]
    step.module.reference(**exact[0], **{**step.settings, "grad_factor": factor * 0.375})
    step.module.reference(**exact[1], **step.settings, clip_factor=torch.tensor([0.375]))
    for key, values in exact[0].items():
        for left, right in zip(values, exact[1][key], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STEPS)
def test_nan_and_infinity_go_where_the_reference_has_them(name: str, device: str) -> None:
    step = STEPS[name]
    kinds = {"param": torch.float32, "grad": torch.float32, "state": torch.float32}
    mine = operands_of(step, [9], **kinds, with_copies=False, device=device)
    where = mine.get("grads", mine["params"])[0]
    where[2], where[5], where[7] = torch.nan, torch.inf, -torch.inf
    exact = cloned(mine, floats=torch.float64)
    step.call(**mine, **step.settings)
    step.module.reference(**exact, **step.settings)
    for key, values in mine.items():
        for ours, theirs in zip(values, exact[key], strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("state", [torch.float32, torch.uint8])
@pytest.mark.parametrize("name", STEPS)
def test_torch_finds_the_schema_true(name: str, state: torch.dtype) -> None:
    step = STEPS[name]
    mine = operands_of(step, [257, 3], param=torch.float32, grad=torch.float32, state=state, with_copies=True)
    schema = getattr(torch.ops.zcore, step.name).default._schema
    arguments = [mine.pop(each.name, []) for each in schema.arguments if not each.kwarg_only]
    torch.library.opcheck(getattr(torch.ops.zcore, step.name).default, arguments, {**mine, **step.settings})


def test_a_compiled_graph_holds_the_steps_unbroken() -> None:
    def loop(operands: dict[str, list[Tensor]], buffers: list[Tensor]) -> Tensor:
        adamw_step.adamw_step(**operands, **STEPS["adamw"].settings)
        sgd_step.sgd_step(operands["params"], operands["grads"], buffers, **STEPS["momentum"].settings)
        return squared_norm.squared_norm(operands["params"][0])

    mine = operands_of(
        STEPS["adamw"], [300, 5], param=torch.float32, grad=torch.float32, state=torch.float32, with_copies=False
    )
    other, buffers, other_buffers = cloned(mine), [torch.ones(300), torch.ones(5)], [torch.ones(300), torch.ones(5)]
    expected = loop(other, other_buffers)
    got = torch.compile(loop, fullgraph=True, backend="aot_eager")(mine, buffers)
    assert_same(got, expected)
    for left, right in zip(mine["params"] + buffers, other["params"] + other_buffers, strict=True):
        assert_same(left, right)


def refused(**changes: Any) -> str:
    mine = operands_of(
        STEPS["adamw"], [4, 4], param=torch.float32, grad=torch.float32, state=torch.float32, with_copies=False
    )
    with pytest.raises((ConfigError, LayoutError)) as caught:
        adamw_step.adamw_step(**{**mine, **changes}, **STEPS["adamw"].settings)
    return str(caught.value)


def test_what_a_step_does_not_serve_it_refuses_by_name() -> None:
    four = torch.ones(4)
    codes = [torch.zeros(4, dtype=torch.uint8)] * 2
    assert "adamw_step: params are torch.float64" in refused(params=[four.double()] * 2)
    assert "grads[1] is torch.bfloat16, the first torch.float32" in refused(grads=[four, four.bfloat16()])
    assert "grads[0], of shape (4,), has strides (2,)" in refused(grads=[torch.ones(8)[::2]] * 2)
    assert "exp_avgs[0] is on meta" in refused(exp_avgs=[four.to("meta")] * 2)
    assert "exp_avgs[1] has 5 elements; expected 4" in refused(exp_avgs=[four, torch.ones(5)])
    assert "2 params and 1 grads" in refused(grads=[four])
    assert "exp_avgs are codes, and there are no exp_avg_scales" in refused(exp_avgs=codes)
    assert "exp_avg_scales, but exp_avgs are no codes" in refused(exp_avg_scales=[torch.ones(1)] * 2)
    assert "exp_avg_scales[0] has 2 elements; expected 1" in refused(exp_avgs=codes, exp_avg_scales=[torch.ones(2)] * 2)


def test_a_backward_pass_through_a_parameter_stepped_since_is_refused() -> None:
    param = torch.ones(3, requires_grad=True)
    loss = param.square().sum()
    with torch.no_grad():
        sgd_step.sgd_step([param], [torch.ones(3)], **STEPS["sgd"].settings)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    numel=st.integers(0, 3000) | st.integers(16_000, 50_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shift=st.integers(0, 4),
)
def test_the_squared_norm_is_summed_in_fp64(device: str, numel: int, dtype: torch.dtype, shift: int) -> None:
    drawn = torch.randn(numel + shift, generator=torch.Generator().manual_seed(numel))
    tensor = drawn.to(device, dtype)[shift:]
    torch.testing.assert_close(
        squared_norm.squared_norm(tensor), tensor.double().square().sum().float(), rtol=2e-7, atol=0
    )


def test_the_squared_norm_is_the_same_on_any_number_of_threads_and_not_finite_where_an_element_is_not() -> None:
    tensor = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    with threads(1):
        one = squared_norm.squared_norm(tensor)
    with threads(2):
        assert_same(squared_norm.squared_norm(tensor), one)
    tensor[70_000] = torch.inf
    assert squared_norm.squared_norm(tensor).isinf()
    tensor[0] = torch.nan
    assert squared_norm.squared_norm(tensor).isnan()
    with pytest.raises(LayoutError, match="expected a flat one"):
        squared_norm.squared_norm(torch.ones(2, 2))
    torch.library.opcheck(torch.ops.zcore.squared_norm.default, (torch.ones(5),))


@needs_cuda
def test_the_squared_norm_on_a_gpu_is_the_same_in_every_run_and_not_finite_where_an_element_is_not() -> None:
    tensor = torch.randn(1_000_003, generator=torch.Generator().manual_seed(1)).cuda()
    one = squared_norm.squared_norm(tensor)
    assert one.device == tensor.device
    assert_same(squared_norm.squared_norm(tensor), one)
    tensor[70_000] = torch.inf
    assert squared_norm.squared_norm(tensor).isinf()
    tensor[0] = torch.nan
    assert squared_norm.squared_norm(tensor).isnan()
    torch.library.opcheck(torch.ops.zcore.squared_norm.default, (torch.ones(5, device="cuda"),))


@needs_cuda
def test_steps_on_a_gpu_run_on_the_current_stream_and_refuse_what_lies_elsewhere() -> None:
    param, grad = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the gradient comes late: only a step behind it on the stream sees it
        grad.fill_(1.0)
        sgd_step.sgd_step([param], [grad], lr=1.0, momentum=0.0, dampening=0.0, weight_decay=0.0)
    stream.synchronize()
    assert torch.equal(param, torch.zeros_like(param))
    kinds = {"param": torch.float32, "grad": torch.float32, "state": torch.float32, "with_copies": False}
    mine = operands_of(STEPS["adamw"], [4], **kinds, device="cuda")
    with pytest.raises(LayoutError, match=r"grads\[0\] is on cpu; expected all on cuda:0"):
        adamw_step.adamw_step(**{**mine, "grads": [torch.ones(4)]}, **STEPS["adamw"].settings)
    with pytest.raises(LayoutError, match="clip_factor is on cpu"):
        adamw_step.adamw_step(**mine, **STEPS["adamw"].settings, clip_factor=torch.tensor(1.0))
    clip_factor = torch.tensor(1.0, device="cuda", dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"clip_factor is torch\.float64"):
        adamw_step.adamw_step(**mine, **STEPS["adamw"].settings, clip_factor=clip_factor)


def test_the_reference_of_an_op_whose_user_has_one_stays() -> None:
    def of_user(tensor: Tensor) -> Tensor:
        return tensor + 1

    ops.reference("one_more")(of_user)
    try:
        register(
            "one_more",
            "(Tensor tensor) -> Tensor",
            reference=torch.neg,
            cpu=of_user,
            fake=torch.neg,
            dtypes=(torch.int64,),
        )
        with ops.force("reference"):
            assert ops.get("one_more", device=torch.device("cpu"), dtype=torch.int64) is of_user
    finally:
        ops._registry.pop("one_more")


def test_the_registry_finds_the_ops() -> None:
    cpu = torch.device("cpu")
    found = ops.get("squared_norm", device=cpu, dtype=torch.bfloat16)
    assert found(torch.tensor([3.0, 4.0], dtype=torch.bfloat16)) == 25.0
    assert ops.get("adamw_step", device=cpu, dtype=torch.float32) is adamw_step.adamw_step
    with ops.force("reference"):
        assert ops.get("adamw_step", device=cpu, dtype=torch.float32) is adamw_step.reference


def test_compiled_codes_are_the_references_to_the_bit_at_every_bound() -> None:
    at = bounds(is_signed=True)
    near = [
        at,
        torch.nextafter(at, torch.tensor(2.0)),
        torch.nextafter(at, torch.tensor(-2.0)),
        torch.logspace(-9, 0, 5),
    ]
    rows = torch.cat([each[:255] for each in [*near, *(-each for each in near)]])
    rows = torch.cat([rows[: rows.numel() // 255 * 255].view(-1, 255), torch.ones(rows.numel() // 255, 1)], dim=1)
    grads = rows.reshape(-1)  # each block has a 1, so that the scale is 1
    codes, scales = torch.zeros(grads.numel(), dtype=torch.uint8), torch.zeros(rows.shape[0])
    lion_step.lion_step(
        [torch.zeros_like(grads)],
        [grads],
        [codes],
        exp_avg_scales=[scales],
        lr=0.0,
        beta1=0.0,
        beta2=0.0,  # the state becomes the gradient
        weight_decay=0.0,
    )
    assert_same(scales, torch.ones_like(scales))
    assert_same(codes, encode(grads, is_signed=True)[0])


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_code_is_within_half_a_distance_and_spoiled_by_nan_in_its_block_alone(is_signed: bool) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    tensor = tensor if is_signed else tensor.square()
    codes, scales = encode(tensor, is_signed=is_signed)
    assert scales.numel() == num_blocks(1000)
    largest = scales.repeat_interleave(256)[:1000]
    error = (decode(codes, scales, is_signed=is_signed) - tensor).abs() / largest
    assert error.max() <= 0.9 / (64 if is_signed else 128) / 2 * 1.001  # in the top decade, where codes are furthest
    again = decode(codes, scales, is_signed=is_signed)
    assert_same(decode(*encode(again, is_signed=is_signed), is_signed=is_signed), again)
    assert (again[tensor > 0] > 0).all() or is_signed
    tensor[300] = torch.nan
    spoiled = decode(*encode(tensor, is_signed=is_signed), is_signed=is_signed).isnan()
    assert spoiled[256:512].all()
    assert spoiled.sum() == 256
