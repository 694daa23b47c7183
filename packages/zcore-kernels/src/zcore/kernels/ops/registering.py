"""How an op becomes known: to torch by a schema, so that compiled graphs and FakeTensors pass, and to the core's registry.

In a graph that torch.compile makes an op is called through torch. Outside it is called as it is, since torch's way takes
some microseconds more (docs/decisions).
"""

from collections.abc import Callable
from typing import Any

import torch

from zcore.core import ops

__all__ = ["register"]

LIBRARY = torch.library.Library("zcore", "DEF")
PRIORITY = 10  # of compiled code for the CPU, over references


def register(
    op: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Make `op` known. fake: what it returns of tensors without data. dtypes: of the first operand, that `cpu` serves."""
    LIBRARY.define(op + schema)
    LIBRARY.impl(op, cpu, "CPU")
    LIBRARY.impl(op, fake, "Meta")
    ops.reference(op)(reference)
    in_graph = getattr(torch.ops.zcore, op)

    def serve(*args: Any, **kwargs: Any) -> Any:
        return (in_graph if torch.compiler.is_compiling() else cpu)(*args, **kwargs)

    ops.implementation(op, source="cpp", priority=PRIORITY, devices=("cpu",), dtypes=dtypes)(serve)
