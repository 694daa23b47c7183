"""How an op becomes known: to torch by a schema, for compiled graphs and FakeTensors, and to the core's registry.

An op over flat pieces is declared by its columns, the lists of tensors it takes, and by its reference, whose
other arguments are the hyper-parameters:

    (params, grads, copies=(), *, lr: float, is_first: bool = False) -> None         the reference's signature
    (Tensor(a!)[] params, Tensor[] grads, Tensor(c!)[] copies, *, float lr, bool is_first=False) -> ()       the schema

In a graph that torch.compile makes, under a mode of torch's dispatch, and with tensors that say themselves how they are
computed with, as FakeTensors, an op is called through torch. Else it is called as it is, since torch's way takes some
microseconds more (docs/decisions).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, nearest
from zcore.kernels.cuda import loading as cuda_loading
from zcore.kernels.cuda.stepping import Result, step, sum_squares
from zcore.kernels.ops.library import LIBRARY
from zcore.kernels.ops.memory import any_needs_torch, lists_need_torch
from zcore.kernels.ops.operands import first_tensor
from zcore.kernels.ops.pieces import FLOATS, Column, Columns, cuda_index
from zcore.kernels.triton import loading as triton_loading

__all__ = ["flat_op", "register"]

PRIORITY = 10  # of compiled code for the CPU, over references
WORDS = {float: "float", bool: "bool", Tensor: "Tensor", Tensor | None: "Tensor?"}

P = ParamSpec("P")
R = TypeVar("R")


def flat_op(
    op: str,
    reference: Callable[P, R],
    *,
    columns: Sequence[Column],
    compiled: Callable[..., Any],
    result: Result | None = None,
) -> Callable[P, R]:
    """Register what serves `op`: `compiled` on the CPU, its namesake of the CUDA extension there; returns a function.

    It takes what the reference takes, and raises LayoutError or ConfigError for operands it does not serve.
    """
    names, taken = tuple(column.name for column in columns), Columns(op, columns)
    written = tuple(index for index, column in enumerate(columns) if column.is_written)
    hyper = [each for each in inspect.signature(reference).parameters.values() if each.name not in names]
    defaults = {each.name: each.default for each in hyper if each.default is not each.empty}

    def run(*operands: Sequence[Tensor], **given: Any) -> Tensor | None:
        settings = defaults | given
        table = taken.table(operands)
        made = None
        try:
            if cuda_index(operands[0]) is None:
                on_host = compiled(table, torch.get_num_threads(), **_known_to_host(settings))
                if result is not None:
                    made = torch.tensor(on_host, dtype=result.dtype).view(-1, result.width)
            elif result is None:
                step(op, table, settings, device=operands[0][0].device)
            else:
                made = sum_squares(op, table, settings, result=result, device=operands[0][0].device)
        except (KeyError, TypeError):  # nothing has run: compiled functions take their settings first
            _check_settings(op, hyper, given)
            raise
        # Autograd refuses a backward pass through what has changed since.
        changed = [each for index in written for each in operands[index] if not each.is_inference()]
        torch.autograd.graph.increment_version(changed)
        return made

    def fake(*operands: Sequence[Tensor], **_given: Any) -> Tensor | None:
        if result is None:
            return None
        device = operands[0][0].device if operands[0] else None
        return torch.empty(len(operands[0]), result.width, dtype=result.dtype, device=device)

    register(
        op,
        _schema(columns, hyper, result),
        reference=reference,
        cpu=run,
        fake=fake,
        dtypes=FLOATS,
        cuda=run,
    )

    in_graph = getattr(torch.ops.zcore, op)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:  # once for each step: kept short
        operands = cast(Sequence[Sequence[Tensor]], (*args, *(kwargs.pop(name, ()) for name in names[len(args) :])))
        if torch.compiler.is_compiling() or lists_need_torch(op, operands):
            return cast(R, in_graph(*map(list, operands), **kwargs))
        return cast(R, run(*operands, **kwargs))

    ops.implementation(op, source="cpp", priority=PRIORITY, devices=("cpu",), dtypes=FLOATS)(call)
    cuda_loading.offer(op, call)
    return call


def _known_to_host(settings: dict[str, Any]) -> dict[str, Any]:
    """Numbers in place of tensors; the clip factor is folded into the factor of gradients."""
    clip_factor = settings.pop("clip_factor", None)
    if clip_factor is not None:
        settings["grad_factor"] *= float(clip_factor)
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in settings.items()}


def _check_settings(op: str, hyper: Sequence[inspect.Parameter], given: dict[str, Any]) -> None:
    """Raise ConfigError for the first of `given` that the op has not, or of another type, and for what is missing."""
    known = {each.name: each for each in hyper}
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            advice = f"Did you mean {near}?" if near else "Leave it out."
            raise ConfigError(f"{op} got the setting {name}; expected {', '.join(known)}. {advice}")
        expected = known[name].annotation
        # A number may stand in a tensor of one element.
        fits = (int, float, Tensor) if expected is float else expected
        if not isinstance(value, fits):
            raise ConfigError(f"{op}: {name} is {value!r}, a {type(value).__name__}; expected {WORDS[expected]}.")
    missing = [name for name, each in known.items() if each.default is each.empty and name not in given]
    if missing:
        raise ConfigError(
            f"{op} got no {', '.join(missing)}; expected all settings without a default. Pass them by name."
        )


def _schema(columns: Sequence[Column], hyper: Sequence[inspect.Parameter], result: Result | None) -> str:
    """In torch's words.

    >>> _schema([Column("params", is_written=True)], [], None)
    '(Tensor(a!)[] params) -> ()'
    """
    letters = "abcdefghijkl"
    lists = [
        f"Tensor({letter}!)[] {column.name}" if column.is_written else f"Tensor[] {column.name}"
        for letter, column in zip(letters, columns, strict=False)
    ]
    settings = [
        f"{WORDS[each.annotation]} {each.name}" + ("" if each.default is each.empty else f"={each.default}")
        for each in hyper
    ]
    taken = ", ".join([*lists, "*", *settings] if settings else lists)
    return f"({taken}) -> {'()' if result is None else 'Tensor'}"


def register(
    op: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...],
    cuda: Callable[..., Any] | None = None,
    triton: str | None = None,
) -> Callable[..., Any]:
    """Make `op` known, and return what calls it, in a graph or outside.

    fake: what it returns of tensors without data. dtypes: of the first operand, that `cpu` and `cuda` serve; the
    latter where the wheel has CUDA kernels. triton: the file of zcore.kernels.triton with a function of the op's name,
    which serves them on CUDA where it has not. `reference` is the op's where its user has not registered one; a user
    imported later replaces it.
    """
    kernel = None if triton is None else triton_loading.deferred(triton, op)
    LIBRARY.define(op + schema)
    LIBRARY.impl(op, cpu if kernel is None else triton_loading.interpretable(cpu, kernel), "CPU")
    LIBRARY.impl(op, fake, "Meta")
    if all(known.source != "reference" for known in ops.implementations().get(op, ())):
        ops.reference(op)(reference)
    in_graph = getattr(torch.ops.zcore, op)

    def serve(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or any_needs_torch(op, (*args, *kwargs.values())):
            return in_graph(*args, **kwargs)
        return (cpu if cuda is None or not _is_on_cuda((*args, *kwargs.values())) else cuda)(*args, **kwargs)

    ops.implementation(op, source="cpp", priority=PRIORITY, devices=("cpu",), dtypes=dtypes)(serve)
    if cuda is not None:
        cuda_loading.offer(op, serve, dtypes=dtypes)
    if kernel is not None:

        def serve_by_triton(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or any_needs_torch(op, (*args, *kwargs.values())):
                return in_graph(*args, **kwargs)
            return kernel(*args, **kwargs)

        triton_loading.offer(op, serve_by_triton, dtypes=dtypes)
    if cuda is not None or kernel is not None:
        LIBRARY.impl(op, _on_cuda(cuda, kernel), "CUDA")
    return serve


def _on_cuda(cuda: Callable[..., Any] | None, kernel: Callable[..., Any] | None) -> Callable[..., Any]:
    """What torch calls on CUDA: compiled code, but Triton's kernel where there is none, or where "triton" is forced."""
    if cuda is None or kernel is None:
        only = cuda or kernel
        assert only is not None
        return only

    def call(*args: Any, **kwargs: Any) -> Any:
        is_triton = ops.forced() == "triton" or cuda_loading.why_unavailable() is not None
        return (kernel if is_triton else cuda)(*args, **kwargs)

    return call


def _is_on_cuda(operands: tuple[Any, ...]) -> bool:
    first = first_tensor(operands)
    return first is not None and first.is_cuda
