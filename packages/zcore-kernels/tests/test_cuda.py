"""What of the CUDA extension needs no GPU: it imports, says why it cannot serve, and what a launch met.

`test_steps` and others try its kernels where there is a GPU.
"""

import re
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from step_cases import STEPS, operands_of

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError, NotInstalledError
from zcore.kernels import _cpu
from zcore.kernels.cuda import loading
from zcore.kernels.ops import compiled, registering, squared_norm
from zcore.kernels.ops.operands import first_tensor
from zcore.kernels.triton import loading as triton_loading

built = pytest.mark.skipif(loading.architectures() is None, reason="the wheel was built without CUDA kernels")
CUDA = torch.device("cuda")


def test_the_registry_puts_cuda_before_triton_and_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(each for each in ops.registered()["adamw_step"] if each.source == "cuda")
    assert (row.devices, row.why_unavailable) == ({"cuda"}, loading.why_unavailable)
    for known in ops.registered().values():
        priorities = {each.source: each.priority for each in known}
        assert priorities.get("cuda", 100) > priorities.get("triton", 0)
    for reason in ("this wheel was built without", "needs a CUDA device"):
        monkeypatch.setattr(loading, "find_spec", lambda name, reason=reason: None if "built" in reason else "found")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert (loading.why_unavailable.__wrapped__() or "").startswith(reason)


def test_without_kernels_the_reference_serves_a_gpu_and_asking_for_them_says_how_to_build() -> None:
    if loading.why_unavailable() is None:
        pytest.skip("they serve here")
    assert ops.choose("adamw_step", device=CUDA, dtype=torch.float32).source == "reference"
    with ops.force("cuda"), pytest.raises(NotInstalledError, match=re.escape(loading.why_unavailable() or "")):
        ops.get("adamw_step", device=CUDA, dtype=torch.float32)


def test_an_extension_that_was_not_built_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match=r"built without CUDA kernels; .*ZCORE_CUDA=ON.*ZCORE_OPS=reference"):
        loading.extension.__wrapped__()
    assert loading.architectures() is None


def test_the_first_tensor_is_found_wherever_it_stands() -> None:
    one, other = torch.ones(1), torch.ones(2)
    for operands in ((one, other), ("int8", one), ([], [None, one], other), ([[], (one, other)],), {"x": one}.values()):
        assert first_tensor(operands) is one
    assert first_tensor(("int8", [], 3, None)) is None


def test_operands_may_be_given_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    values, noise = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    serve = ops.get("round_with_noise", device=values.device, dtype=values.dtype)
    assert torch.equal(serve(noise=noise, values=values), serve(values, noise))
    file = ModuleType("zcore.kernels.triton.doubled")
    file.doubled = lambda *, scale, values: values * scale  # type: ignore[attr-defined] - a file made here
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setattr(triton_loading, "why_unavailable", lambda: None)
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: asked.append(tensor) or nullcontext())
    found = triton_loading.deferred("doubled", "doubled")(scale=2, values=values)
    assert torch.equal(found, values * 2)
    assert len(asked) == 1 and asked[0] is values


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run")
def test_a_driver_that_cannot_run_the_kernels_is_no_device_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # torch may be content with an older one
    assert re.fullmatch(r"cannot run on this device: .+\. Built for sm_80 .+", loading.why_unavailable.__wrapped__())


@built
def test_it_was_built_for_every_generation_and_as_ptx_for_later_ones() -> None:
    names = (loading.architectures() or "").split()
    assert {"sm_80", "sm_90"} <= set(names)
    assert names[-1].startswith("compute_")


@built
def test_it_counts_a_sum_for_each_chunk_of_a_table_that_the_cpu_module_read() -> None:
    layout = _cpu.Layout([([(torch.float32, 0)], False, -1)])
    table = layout.read([[torch.empty(numel) for numel in (0, 1, 16_384, 16_385)]])
    assert loading.extension().num_partial_sums(table) == 0 + 1 + 1 + 2


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps over tensors on the CPU go the way to the GPU, where CUDA refuses them for want of one."""
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(registering, "cuda_index", lambda tensors: 0)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch would be made")
@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("name", STEPS)
def test_a_launch_that_is_refused_names_the_op_and_what_cuda_says(name: str) -> None:
    step = STEPS[name]
    kinds = {"param": torch.float32, "grad": torch.bfloat16, "state": torch.uint8, "with_copies": True}
    operands = operands_of(step, [5, 0, 300], **kinds)
    said = rf"{step.name}: its CUDA kernel could not be launched: .+\. An error of an earlier"
    factor = {} if name == "lamb_apply" else {"clip_factor": torch.tensor(0.5)}
    for settings in (step.settings, {**step.settings, **factor}):
        with pytest.raises(RuntimeError, match=said):
            step.call(**operands, **settings)
    if factor:
        with pytest.raises(ConfigError, match=f"{step.name}: clip_factor is torch.int64; expected torch.float32"):
            step.call(**operands, **step.settings, clip_factor=torch.tensor(1))
    else:
        with pytest.raises(LayoutError, match="lamb_apply: ratios has 2 elements; expected 3"):
            step.call(**{**operands, "ratios": torch.ones(2, dtype=torch.float64)}, **step.settings)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch would be made")
def test_a_norm_that_is_refused_names_the_op_and_what_cuda_says() -> None:
    table = squared_norm.COLUMNS.table(([torch.ones(5)],))
    with pytest.raises(RuntimeError, match=r"squared_norm: its CUDA kernel could not be launched: .+\. An error"):
        loading.extension().squared_norm(table, 0, scratch=0, result=0)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="launches would be made")
@pytest.mark.parametrize("op", ["quantize_blockwise", "dequantize_blockwise", "dequantize_reduce_requantize"])
def test_a_launch_of_a_quantiser_that_is_refused_names_the_op(op: str) -> None:
    settings = {"numel": 1, "block_size": 2, "format": 0}
    rounding = {"is_stochastic": False, "seed": 0, "offset": 0}
    operands: dict[str, tuple[Any, ...]] = {
        "quantize_blockwise": (0, 0, [0, 0, 0]),
        "dequantize_blockwise": ([0, 0, 0], 0, 0),
        "dequantize_reduce_requantize": ([0, 0, 0], [0, 0, 0]),
    }
    settings |= {} if op == "dequantize_blockwise" else rounding
    settings |= {"factor": 1.0} if op == "dequantize_reduce_requantize" else {}
    with pytest.raises(RuntimeError, match=rf"^{op}: its CUDA kernel could not be launched"):
        getattr(loading.extension(), op)(*operands[op], 0, **settings)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="launches would be made")
@pytest.mark.parametrize(
    ("op", "operands", "settings"),
    [
        ("pack_signs", (0, 0, 0, 0, 0), {"block_size": 8}),
        ("pack_signs", (0, 0, 0, 0, 0), {"block_size": 16384}),  # asks for more shared memory than is usual
        ("unpack_signs", (0, 0, 0, 0), {"block_size": 8}),
        ("round_stochastic", (0, 0), {"seed": 0, "offset": 0}),
        ("round_with_noise", (0, 0, 0), {}),
    ],
)
def test_a_launch_of_signs_or_roundings_that_is_refused_names_the_op(
    op: str, operands: tuple[int, ...], settings: dict[str, int]
) -> None:
    with pytest.raises(RuntimeError, match=rf"^{op}: its CUDA kernel could not be launched"):
        getattr(loading.extension(), op)(*operands, 0, numel=1, **settings)
    getattr(loading.extension(), op)(*operands, 0, numel=0, **settings)  # nothing to launch


@built
def test_too_many_shards_are_refused_before_a_launch() -> None:
    most = loading.extension().LARGEST_NUM_SHARDS
    settings = {"numel": 1, "block_size": 2, "format": 0, "is_stochastic": False, "seed": 0, "offset": 0, "factor": 1.0}
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f"got {count} shards; expected 1 to {most}"):
            loading.extension().dequantize_reduce_requantize([0, 0, 0] * count, [0, 0, 0], 0, **settings)


@built
@pytest.mark.parametrize(
    "function",
    [
        "quantize_blockwise",
        "dequantize_blockwise",
        "dequantize_reduce_requantize",
        "pack_signs",
        "unpack_signs",
        "round_stochastic",
        "round_with_noise",
    ],
)
def test_an_op_of_blocks_is_called_alike_on_both_devices(function: str) -> None:
    on_cpu, on_cuda = (getattr(module, function).__doc__ for module in (_cpu, loading.extension()))
    assert on_cuda == on_cpu.replace("threads: int", "stream: int")


def test_an_op_of_blocks_runs_on_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    recording = SimpleNamespace(pack_signs=lambda *operands, **settings: calls.append((operands, settings)))
    monkeypatch.setattr(compiled, "extension", lambda: recording)
    monkeypatch.setattr(compiled, "launching", lambda device: nullcontext(77 + device.index))
    compiled.run("pack_signs", torch.device("cuda", 1), 5, 6, numel=3)
    assert calls == [((5, 6, 78), {"numel": 3})]
