"""Triton's kernels without a GPU: the interpreter finds them right, the compiler makes code of them, none loads early.

The interpreter is for a whole process, chosen before triton is imported, so its tests are in files that run in one of
their own. Compiling shows what the interpreter lets pass; running compiled code takes a GPU.
"""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import without_waits
from expert_cases import OPS as EXPERT_OPS
from expert_cases import SMALL, Draw, Sizes
from layer_cases import OPS, drawing
from op_calls import Op, as_tuple, everything, is_float, moved
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_device import WHY_NOT_INTERPRETED, run_interpreted, why_not_interpreted

import zcore.kernels.ops.newton_schulz
from zcore.core import ops
from zcore.core.errors import NotInstalledError
from zcore.kernels.cuda.grouped_matmul import why_unavailable as why_no_cutlass
from zcore.kernels.nn import ExpertMLPs, RMSNorm, SwiGLU, TopKRouter
from zcore.kernels.triton import loading

FILES = (
    "test_triton_blocks.py",
    "test_triton_expert_ops.py",
    "test_triton_layer_ops.py",
    "test_triton_newton_schulz.py",
)
LETTERS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = sorted({op.name for op in (*OPS, *EXPERT_OPS)})

needs_triton = pytest.mark.skipif(loading.why_unavailable() is not None, reason="triton is not installed")
not_interpreted = pytest.mark.skipif(loading.is_interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")


@pytest.mark.skipif(WHY_NOT_INTERPRETED is not None, reason=str(WHY_NOT_INTERPRETED))
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_are_right_in_the_interpreter(file: str) -> None:
    said = run_interpreted(file)
    assert " passed" in said and "skipped" not in said


@pytest.mark.parametrize(
    ("triton", "numpy", "words"),
    [
        ("3.7.1", "2.4.6", None),
        ("3.10.0", "2.10.0", None),
        ("3.6.0", "2.3.5", None),
        ("3.6.0+git1", "2.4.0", "fails over NumPy 2.4.0"),
        ("3.5.1", "2.10.1", "the interpreter of triton 3.5.1 fails"),
        ("3.7.1", None, "needs NumPy"),
        (None, "2.4.0", "triton is not installed"),
    ],
)
def test_versions_that_cannot_interpret_are_told(triton: str | None, numpy: str | None, words: str | None) -> None:
    found = why_not_interpreted(triton, numpy)
    assert found is None if words is None else found is not None and words in found


@pytest.fixture
def compile_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[Any]]:
    """Makes launches compile their kernel for a device of some compute capability, and returns what is compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled: list[Any] = []

    def run(capability: int, kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        constants = {
            name: value
            for name, value in given.items()
            if name.isupper() or value is None or (isinstance(value, int) and value == 1)  # as triton specialises
        }
        signature = {name: "constexpr" if name in constants else _type_of(value) for name, value in given.items()}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
        assert made.asm["cubin"]
        compiled.append(made)

    def choose(capability: int) -> list[Any]:
        monkeypatch.setattr(
            triton.runtime.JITFunction, "run", lambda kernel, *args, **kwargs: run(capability, kernel, *args, **kwargs)
        )
        return compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default, of which triton 3.9 warns that 3.10 has another
    return choose


def _type_of(value: object) -> Any:
    if isinstance(value, Tensor):
        return "*" + LETTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(map(_type_of, value))
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return "fp32"


every_capability = pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.thorough), 90])


@needs_triton
@not_interpreted
@every_capability
@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_layer_op_compiles_for_a_gpu(op: Op, capability: int, compile_only: Callable[[int], list[Any]]) -> None:
    compiled = compile_only(capability)
    arguments = op.make(drawing(torch.bfloat16), 3, 66)
    results = loading.deferred(_file_of(op.name), op.name)(*arguments)
    backward = loading.deferred(_file_of(op.name), _backward_of(op.name))
    backward(*_backward_arguments(op, arguments, as_tuple(results)))
    assert len(compiled) in {2, 4}  # rotary turns queries and keys, each by itself


def _file_of(name: str) -> str:
    return name if name == "bias_dropout_residual" else name.removesuffix("_packed").removesuffix("_residual")


def _backward_of(name: str) -> str:
    kept = name.removesuffix("_residual") if name.endswith("norm_residual") else name
    return kept + "_backward"


def _backward_arguments(op: Op, arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What the formula of the gradient hands on; the outputs stand for their gradients."""
    if "norm" in op.name:
        has_residual = op.name.endswith("_residual")
        affine = [each for each in arguments[1 + has_residual :] if each is None or isinstance(each, Tensor)]
        rest = [each for each in arguments if isinstance(each, float)]
        if op.name.startswith("rms_norm"):
            rest = [*rest, 0.0][:2]
        return outputs[0], arguments[0], *affine, outputs[1] if has_residual else None, *rest
    if op.name == "rotary":
        return *outputs, *arguments[2:5], len(arguments) == 6
    if op.name == "bias_dropout_residual":
        return outputs[0], arguments[1], *arguments[3:]
    return outputs[0], *arguments


@needs_triton
@not_interpreted
@every_capability
def test_the_symmetric_product_compiles_for_a_gpu(capability: int, compile_only: Callable[[int], list[Any]]) -> None:
    compiled = compile_only(capability)
    zcore.kernels.ops.newton_schulz.newton_schulz(torch.randn(5, 9), steps=1)
    assert [each.name for each in compiled] == ["symmetric_kernel"] * 2


def _launch(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    return as_tuple(loading.deferred(name.removesuffix("_backward"), name)(*arguments))


LARGE = Sizes(tokens=300, hidden=130, num_experts=2, k=2)
ONES = Sizes(tokens=1, hidden=1, num_experts=1, k=1)  # which Triton makes constants of


@needs_triton
@not_interpreted
@pytest.mark.parametrize(
    ("capability", "size"),
    [
        pytest.param(80, LARGE, marks=pytest.mark.thorough),
        (90, LARGE),
        pytest.param(90, ONES, marks=pytest.mark.thorough),
    ],
    ids=["80", "90", "ones"],
)
@pytest.mark.parametrize("op", EXPERT_OPS, ids=str)
def test_every_op_of_experts_compiles_for_a_gpu_and_is_launched_without_a_look_at_values(
    op: Op, capability: int, size: Sizes, compile_only: Callable[[int], list[Any]]
) -> None:
    compiled = compile_only(capability)
    mode = FakeTensorMode()  # whoever asks its tensors for values gets an error
    drawn = op.make(Draw(torch.bfloat16), size)
    arguments = tuple(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in drawn)
    results = _launch(op.name, *arguments)
    if op.name == "permute":
        _launch("unpermute", results[0], results[2])
    elif op.name == "unpermute":
        _launch("unpermute_backward", results[0], *(*arguments, None)[:3])
    elif op.name == "topk_gate":
        _launch("topk_gate_backward", results[0], arguments[0], *results, *arguments[2:4])
    else:
        _launch("grouped_matmul_backward", arguments[0], results[0], *arguments[2:])
    assert len(compiled) == (3 if op.name == "permute" else 2)


@needs_triton
@not_interpreted
@pytest.mark.parametrize(("precision", "instruction"), [("none", "fma.rn.f32"), ("tf32", "tf32.f32")])
def test_products_of_fp32_are_exact_unless_torch_allows_tf32(
    precision: str, instruction: str, compile_only: Callable[[int], list[Any]]
) -> None:
    compiled, matmul = compile_only(80), torch.backends.cuda.matmul
    rows, weights, counts = torch.randn(300, 40), torch.randn(1, 40, 130), torch.tensor([300])
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        (out,) = _launch("grouped_matmul", rows, weights, counts)
        _launch("grouped_matmul_backward", rows, out, counts, False)
    finally:
        matmul.fp32_precision = before
    assert len(compiled) == 2
    assert all(instruction in each.asm["ptx"] for each in compiled)
    assert any("tf32" in each.asm["ptx"] for each in compiled) == (precision == "tf32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@needs_triton
@not_interpreted
@pytest.mark.parametrize("op", EXPERT_OPS, ids=str)
def test_ops_of_experts_never_wait_for_the_device(op: Op) -> None:
    arguments = moved(op.make(Draw(torch.float32), SMALL), CUDA)
    everything(op, arguments)  # compiles
    with without_waits():
        sums = [each.sum() for each in op(*arguments) if is_float(each)]
        torch.autograd.grad(sums, arguments[0])


@needs_triton
@not_interpreted
@every_capability
@pytest.mark.parametrize(
    ("name", "is_symmetric", "seed"),
    [("int8", False, None), ("int4", True, 2**40), ("float8_e4m3fn", True, None), ("float8_e5m2", True, 3)],
)
def test_quantisers_compile_for_a_gpu(
    name: str, is_symmetric: bool, seed: int | None, capability: int, compile_only: Callable[[int], list[Any]]
) -> None:
    compiled = compile_only(capability)
    values = torch.ones(70, dtype=torch.bfloat16)
    made = _by_triton("quantize_blockwise")(
        values, format=name, block_size=32, is_symmetric=is_symmetric, seed=seed, offset=2**33
    )
    sizes = {"format": name, "block_size": 32, "numel": 70}
    _by_triton("dequantize_blockwise")(*made, **sizes, dtype=torch.bfloat16)
    _by_triton("dequantize_reduce_requantize")(*([each] * 2 for each in made), **sizes, seed=seed)
    assert [each.name for each in compiled] == ["quantize_kernel", "dequantize_kernel", "reduce_kernel"]


@needs_triton
@not_interpreted
@every_capability
def test_packing_of_signs_compiles_for_a_gpu(capability: int, compile_only: Callable[[int], list[Any]]) -> None:
    compiled = compile_only(capability)
    made = _by_triton("pack_signs")(torch.ones(70, dtype=torch.float16), torch.zeros(70), block_size=32)
    _by_triton("unpack_signs")(*made, block_size=32, numel=70)
    assert [each.name for each in compiled] == ["pack_kernel", "unpack_kernel"]


def _by_triton(op: str) -> Callable[..., Any]:
    return loading.deferred(op, op)


@not_interpreted
@pytest.mark.parametrize("name", [*NAMES, "newton_schulz"])
def test_the_registry_offers_it_on_cuda_before_the_reference_and_never_on_the_cpu(name: str) -> None:
    (triton,) = (each for each in ops.implementations()[name] if each.source == "triton")
    assert triton.devices == {"cuda"}
    assert ops.choose(name, device=CPU, dtype=torch.bfloat16).source != "triton"
    expected = "reference" if loading.why_unavailable() else "triton"
    by_cutlass = name == "grouped_matmul" and why_no_cutlass() is None
    assert ops.choose(name, device=CUDA, dtype=torch.bfloat16).source == ("cuda" if by_cutlass else expected)
    assert ops.choose(name, device=CUDA, dtype=torch.float32).source == expected
    assert ops.choose(name, device=CUDA, dtype=torch.float64).source == "reference"
    with ops.force("triton"), pytest.raises(NotInstalledError, match="serves cuda only"):
        ops.get(name, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("op", NAMES)
def test_torch_has_a_kernel_for_cuda(op: str) -> None:
    backward = "unpermute" if op == "permute" else _backward_of(op)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zcore::{op}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zcore::{backward}", "CUDA")


def test_ops_are_registered_without_triton_and_say_what_is_missing() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"  # so that importing it fails
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch; from zcore.core import ops; import zcore.kernels.ops.rms_norm\n"
        "from zcore.kernels.triton.loading import deferred\n"
        "print(ops.choose('rms_norm', device=torch.device('cuda'), dtype=torch.half).source)\n"
        "try: deferred('rms_norm', 'rms_norm')(torch.ones(1, 2), None, 1e-6)\n"
        "except ImportError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[0] == "reference"
    assert "rms_norm on a GPU needs triton: pip install 'zcore-kernels[triton]'" in found


def test_choosing_ops_does_not_import_a_kernel() -> None:
    program = (
        "import sys, torch; from zcore.core import ops\n"
        "ops.get('swiglu', device=torch.device('cpu'), dtype=torch.float32)(*torch.ones(2, 1, 8))\n"
        "print([name for name in sys.modules if name.startswith('zcore.kernels.triton.')], 'triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "['zcore.kernels.triton.loading'] False"


@needs_triton
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA, and aborts over such tensors")
def test_graphs_for_cuda_hold_the_ops() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():  # of tensors without data there are such on a GPU without one
        block, x = nn.Sequential(RMSNorm(8, device="cuda"), SwiGLU()), torch.empty(3, 8, device="cuda")
        assert torch.compile(block, backend=keep, fullgraph=True)(x).shape == (3, 4)
        assert torch.compile(Experts(), backend=keep, fullgraph=True)(x).shape == (3, 8)
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    for name in ("rms_norm", "swiglu_packed", "topk_gate", "permute", "grouped_matmul", "unpermute"):
        assert getattr(torch.ops.zcore, name) in called


class Experts(nn.Module):
    """Two of four for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = TopKRouter(8, num_experts=4, k=2, device="cuda")
        self.experts = ExpertMLPs(8, 6, num_experts=4, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        weights, experts, _ = self.router(x)
        found: Tensor = self.experts(x, experts, weights)
        return found
