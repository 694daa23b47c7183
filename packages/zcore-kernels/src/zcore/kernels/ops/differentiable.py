"""How an op with a gradient becomes known: to torch by schema, fake and formula of the gradient, and to the registry.

It is always called through torch, so that autograd, torch.compile and FakeTensors see it. Its backward is an op of its
own, which can be compiled and faked but not differentiated once more: that is refused, never silently zero, as
derivatives in forward mode are (library.py).
"""

from collections.abc import Callable
from typing import Any

import torch

from zcore.core import ops
from zcore.core.errors import StateError
from zcore.kernels.cuda import choosing
from zcore.kernels.ops.library import LIBRARY
from zcore.kernels.ops.pieces import FLOATS
from zcore.kernels.ops.registering import PRIORITY
from zcore.kernels.triton.loading import deferred, interpretable, offer

__all__ = ["register_backward", "register_differentiable"]


def register_differentiable(
    op: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    source: str = "cpp",
    triton: str | None = None,
    cuda: str | None = None,
) -> None:
    """Make `op` known. fake: what it returns of tensors without data; source: of `cpu`, as the registry names it.

    setup_context, backward: as torch.library has them. triton: the file of zcore.kernels.triton with a function of the
    op's name, which serves CUDA. cuda: beside that, the file of zcore.kernels.cuda with one that serves before it the
    operands that it takes, bf16 and fp16; see choosing.py.
    """
    _define(op, schema, cpu=cpu, fake=fake, triton=triton, cuda=cuda)
    torch.library.register_autograd(f"zcore::{op}", backward, setup_context=setup_context, lib=LIBRARY)
    ops.reference(op)(reference)
    function = getattr(torch.ops.zcore, op)
    ops.implementation(op, source=source, priority=PRIORITY, devices=("cpu",), dtypes=FLOATS)(function)
    if triton is not None:
        offer(op, function)
    if cuda is not None:
        choosing.offer(op, cuda, function)


def register_backward(
    op: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    cuda: str | None = None,
) -> None:
    """Make known what the `backward` of another op calls; arguments as of `register_differentiable`."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise StateError(
            f"zcore::{op} cannot be differentiated again; compiled ops have first derivatives only. "
            "For higher ones set ZCORE_OPS=reference, which computes in plain torch."
        )

    _define(op, schema, cpu=cpu, fake=fake, triton=triton, cuda=cuda)
    torch.library.register_autograd(f"zcore::{op}", refuse, lib=LIBRARY)


def _define(
    op: str,
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None,
    cuda: str | None,
) -> None:
    LIBRARY.define(op + schema)
    if triton is not None:
        kernel = deferred(triton, op)
        LIBRARY.impl(op, kernel if cuda is None else choosing.choosing(op, cuda, otherwise=kernel), "CUDA")
        cpu = interpretable(cpu, kernel)
    LIBRARY.impl(op, cpu, "CPU")
    torch.library.register_fake(f"zcore::{op}", fake, lib=LIBRARY)
