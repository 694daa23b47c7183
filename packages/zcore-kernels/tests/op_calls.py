"""How tests call an op with a gradient and judge what comes out; the same for layers and experts, C++ and Triton."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A result may differ from the reference in float64, of the same rounded operands, by this much of 1 + its magnitude.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """How to call one op: `make` draws its arguments."""

    name: str
    make: Callable[..., Arguments]
    label: str = ""

    def __str__(self) -> str:
        return self.name + self.label

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        return as_tuple(getattr(torch.ops.zcore, self.name)(*arguments))

    def reference(self, *arguments: Any) -> tuple[Tensor, ...]:
        found = next(each for each in ops.implementations()[self.name] if each.source == "reference")
        return as_tuple(found.function(*arguments))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def gradients(results: tuple[Tensor, ...], arguments: Arguments) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(11)
    outputs = [each for each in results if is_float(each)]
    seeds = [torch.randn(each.shape, generator=random).bfloat16().to(each.device, each.dtype) for each in outputs]
    return torch.autograd.grad(outputs, [each for each in arguments if is_float(each) and each.requires_grad], seeds)


def everything(op: Op, arguments: Arguments) -> list[Tensor]:
    """Results and gradients."""
    results = op(*arguments)
    return [*results, *gradients(results, arguments)]


def widened(arguments: Arguments) -> Arguments:
    return tuple(
        each.detach().double().requires_grad_(each.requires_grad) if is_float(each) else each for each in arguments
    )


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    return tuple(
        each.detach().to(device).requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each
        for each in arguments
    )


def check_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], factor: float = 1.0) -> None:
    assert len(found) == len(expected)
    for each, right in zip(found, expected, strict=True):
        assert each.shape == right.shape
        if not is_float(each):
            assert torch.equal(each.cpu(), right)
            continue
        tolerance = TOLERANCE[each.dtype]
        torch.testing.assert_close(
            each.cpu().double(), right.double(), atol=tolerance * factor, rtol=tolerance, equal_nan=True
        )


def check_graph(op: Op, arguments: Arguments) -> None:
    """That torch.compile makes one graph of the op, with the same bits."""
    torch.compiler.reset()  # else all ops count as recompilations of one function
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results = compiled(*arguments)
    found = [*results, *gradients(results, arguments)]
    assert all(torch.equal(one, two) for one, two in zip(found, everything(op, arguments), strict=True))


def each_spoilt(arguments: Arguments) -> Iterator[tuple[Arguments, type[Exception]]]:
    """The arguments with one tensor of another dtype, or strided, and the error that is due."""
    for index, each in enumerate(arguments):
        if not isinstance(each, Tensor):
            continue
        other = each.detach().double() if is_float(each) else each.int()
        yield (*arguments[:index], other, *arguments[index + 1 :]), ConfigError
        strided = torch.stack([each.detach()] * 2, -1)[..., 0]
        if not strided.is_contiguous():  # as one of a single element is
            yield (*arguments[:index], strided, *arguments[index + 1 :]), LayoutError


def each_elsewhere(arguments: Arguments) -> Iterator[Arguments]:
    """The arguments with one tensor on another device; not the first, nor a single number, which may be anywhere."""
    for index, each in enumerate(arguments):
        if isinstance(each, Tensor) and index and each.numel() > 1:
            yield (*arguments[:index], each.detach().to("meta"), *arguments[index + 1 :])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
