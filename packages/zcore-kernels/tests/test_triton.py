"""Triton's kernels without a GPU: the interpreter finds them right, the compiler makes code of them, none loads early.

The interpreter is for a whole process, chosen before triton is imported, so its tests are in files that run in one of
their own. Compiling shows what the interpreter lets pass; running compiled code takes a GPU.
"""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import OPS, Op, drawing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import zcore.kernels.ops.newton_schulz
from zcore.core import ops
from zcore.core.errors import NotInstalledError
from zcore.kernels.nn import RMSNorm, SwiGLU
from zcore.kernels.triton import loading

FILES = ("test_triton_blocks.py", "test_triton_layer_ops.py", "test_triton_newton_schulz.py")
LETTERS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_triton = pytest.mark.skipif(loading.why_unavailable() is not None, reason="triton is not installed")
not_interpreted = pytest.mark.skipif(loading.is_interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")


@needs_triton
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_are_right_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / file)]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout and "skipped" not in ran.stdout


@pytest.fixture
def compile_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[str]]:
    """Makes launches compile their kernel for a device of some compute capability, and returns the names of those."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = []

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
        names.append(kernel.fn.__name__)

    def choose(capability: int) -> list[str]:
        monkeypatch.setattr(
            triton.runtime.JITFunction, "run", lambda kernel, *args, **kwargs: run(capability, kernel, *args, **kwargs)
        )
        return names

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
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
def test_every_layer_op_compiles_for_a_gpu(op: Op, capability: int, compile_only: Callable[[int], list[str]]) -> None:
    names = compile_only(capability)
    arguments = op.make(drawing(torch.bfloat16), 3, 66)
    results = loading.deferred(_file_of(op.name), op.name)(*arguments)
    outputs = (results,) if isinstance(results, Tensor) else results
    backward = loading.deferred(_file_of(op.name), _backward_of(op.name))
    backward(*_backward_arguments(op, arguments, tuple(outputs)))
    assert len(names) in {2, 4}  # rotary turns queries and keys, each by itself


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
def test_the_symmetric_product_compiles_for_a_gpu(capability: int, compile_only: Callable[[int], list[str]]) -> None:
    names = compile_only(capability)
    zcore.kernels.ops.newton_schulz.newton_schulz(torch.randn(5, 9), steps=1)
    assert names == ["symmetric_kernel"] * 2


@needs_triton
@not_interpreted
@every_capability
@pytest.mark.parametrize(
    ("name", "is_symmetric", "seed"),
    [("int8", False, None), ("int4", True, 2**40), ("float8_e4m3fn", True, None), ("float8_e5m2", True, 3)],
)
def test_quantisers_compile_for_a_gpu(
    name: str, is_symmetric: bool, seed: int | None, capability: int, compile_only: Callable[[int], list[str]]
) -> None:
    names = compile_only(capability)
    values = torch.ones(70, dtype=torch.bfloat16)
    made = _by_triton("quantize_blockwise")(
        values, format=name, block_size=32, is_symmetric=is_symmetric, seed=seed, offset=2**33
    )
    sizes = {"format": name, "block_size": 32, "numel": 70}
    _by_triton("dequantize_blockwise")(*made, **sizes, dtype=torch.bfloat16)
    _by_triton("dequantize_reduce_requantize")(*([each] * 2 for each in made), **sizes, seed=seed)
    assert names == ["quantize_kernel", "dequantize_kernel", "reduce_kernel"]


@needs_triton
@not_interpreted
@every_capability
def test_packing_of_signs_compiles_for_a_gpu(capability: int, compile_only: Callable[[int], list[str]]) -> None:
    names = compile_only(capability)
    made = _by_triton("pack_signs")(torch.ones(70, dtype=torch.float16), torch.zeros(70), block_size=32)
    _by_triton("unpack_signs")(*made, block_size=32, numel=70)
    assert names == ["pack_kernel", "unpack_kernel"]


def _by_triton(op: str) -> Callable[..., Any]:
    return loading.deferred(op, op)


@not_interpreted
@pytest.mark.parametrize("name", [*sorted({op.name for op in OPS}), "newton_schulz"])
def test_the_registry_offers_it_on_cuda_before_the_reference_and_never_on_the_cpu(name: str) -> None:
    (triton,) = (each for each in ops.implementations()[name] if each.source == "triton")
    assert triton.devices == {"cuda"}
    assert ops.choose(name, device=CPU, dtype=torch.bfloat16).source != "triton"
    expected = "reference" if loading.why_unavailable() else "triton"
    assert ops.choose(name, device=CUDA, dtype=torch.bfloat16).source == expected
    assert ops.choose(name, device=CUDA, dtype=torch.float64).source == "reference"
    with ops.force("triton"), pytest.raises(NotInstalledError, match="serves cuda only"):
        ops.get(name, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("op", sorted({op.name for op in OPS}))
def test_torch_has_a_kernel_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zcore::{op}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zcore::{_backward_of(op)}", "CUDA")


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
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.zcore.rms_norm in called
    assert torch.ops.zcore.swiglu_packed in called
