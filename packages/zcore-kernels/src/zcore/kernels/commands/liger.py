"""Liger-Kernel's functions for ops that both have, as `zcore kernels bench --against liger` calls them.

Its kernels run on GPUs only. GeGLU is left out: Liger's is the form by tanh, and the case here that by erf.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from zcore.core.errors import ConfigError, NotInstalledError
from zcore.kernels.commands.cases import Call

__all__ = ["LIGER", "check_liger", "run_of_liger"]


def check_liger(device: torch.device) -> None:
    """Raise ConfigError unless `device` is a GPU, NotInstalledError where Liger-Kernel is missing."""
    if device.type != "cuda":
        raise ConfigError(
            f"--against liger on {device.type}: Liger-Kernel runs on GPUs only; expected --device cuda. Without one, "
            "leave it out."
        )
    if find_spec("liger_kernel") is None:
        raise NotInstalledError("--against liger needs it: pip install 'zcore-kernels[peers]'")


def run_of_liger(op: str, call: Call) -> Callable[[], object] | None:
    """What calls Liger's function for `op` on these operands, or None where there is none."""
    if op not in LIGER:
        return None
    functions = import_module("liger_kernel.ops")  # it has no types
    return LIGER[op](functions, *call.args, **call.kwargs)


def _rms_norm(functions: Any, x: Tensor, weight: Tensor, eps: float) -> Callable[[], object]:
    return lambda: functions.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)  # all of it in fp32


def _rms_norm_residual(functions: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Callable[[], object]:
    return lambda: functions.LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "gemma", False)


def _layer_norm(functions: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Callable[[], object]:
    return lambda: functions.LigerLayerNormFunction.apply(x, weight, bias, eps)


def _swiglu(functions: Any, gate: Tensor, up: Tensor) -> Callable[[], object]:
    return lambda: functions.LigerSiLUMulFunction.apply(gate, up)


def _rotary(functions: Any, q: Tensor, k: Tensor, *tables: Tensor) -> Callable[[], object]:
    """Liger takes heads before tokens, and rows of the tables in the order of tokens; it turns q and k in place."""
    cos, sin, positions = tables
    q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos[positions], sin[positions]
    return lambda: functions.LigerRopeFunction.apply(q, k, cos, sin)


def _linear_cross_entropy(
    functions: Any, hidden: Tensor, weight: Tensor, targets: Tensor, *, label_smoothing: float, z_loss: float
) -> Callable[[], object]:
    settings = None, None, -100, z_loss, label_smoothing, "mean"  # the first two: a bias, and weights of classes
    return lambda: functions.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *settings)


LIGER: dict[str, Callable[..., Callable[[], object]]] = {
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "rms_norm": _rms_norm,
    "rms_norm_residual": _rms_norm_residual,
    "rotary": _rotary,
    "swiglu": _swiglu,
}
