"""The steps of optimizers with hyper-parameters, and operands to try them with."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zcore.kernels.ops import adagrad_step, adamw_step, lamb_apply, lamb_average, lion_step, sgd_step
from zcore.kernels.ops.dynamic_code import encode

__all__ = ["STEPS", "Step", "operands_of"]

ADAM = {"eps": 1e-8, "weight_decay": 0.1, "bias_correction1": 0.271, "bias_correction2": 0.0297}
BETAS = {"beta1": 0.9, "beta2": 0.99}


@dataclass(frozen=True)
class Step:
    """An op, the states it has with whether they are signed, and hyper-parameters."""

    module: Any
    states: dict[str, bool]
    settings: dict[str, float | bool]

    @property
    def name(self) -> str:
        return str(self.module.__name__.rsplit(".", 1)[1])

    @property
    def call(self) -> Any:
        return getattr(self.module, self.name)


MOMENTS = {"exp_avgs": True, "exp_avg_sqs": False}
STEPS = {
    "adamw": Step(adamw_step, MOMENTS, {"lr": 1e-2, "grad_factor": 0.5, **BETAS, **ADAM}),
    "adam": Step(adamw_step, MOMENTS, {"lr": 1e-2, "is_decoupled": False, **BETAS, **ADAM}),
    "lion": Step(lion_step, {"exp_avgs": True}, {"lr": 1e-2, "weight_decay": 0.1, "grad_factor": 0.5, **BETAS}),
    "adagrad": Step(adagrad_step, {"sums": False}, {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.1, "grad_factor": 2.0}),
    "sgd": Step(sgd_step, {}, {"lr": 1e-2, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1}),
    "momentum": Step(
        sgd_step, {"momentum_buffers": True}, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    ),
    "nesterov": Step(
        sgd_step,
        {"momentum_buffers": True},
        {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "is_nesterov": True},
    ),
    "first": Step(
        sgd_step,
        {"momentum_buffers": True},
        {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "is_first": True},
    ),
    "lamb_average": Step(lamb_average, MOMENTS, {"grad_factor": 0.5, **BETAS, **ADAM}),
    "lamb_apply": Step(lamb_apply, MOMENTS, {"lr": 1e-2, **ADAM}),
}


def operands_of(
    step: Step,
    numels: list[int],
    *,
    param: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    with_copies: bool,
    device: str = "cpu",
    shift: int = 1,
) -> dict[str, Any]:
    """Operands by name, near 1, floats beginning `shift` elements into their storage; the same on every device."""
    random = torch.Generator().manual_seed(7)

    def normal(numel: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(numel + shift, generator=random).to(device, dtype)[shift:]

    made: dict[str, Any] = {"params": [normal(numel, param) for numel in numels]}
    taken = inspect.signature(step.module.reference).parameters
    if "grads" in taken:
        made["grads"] = [normal(numel, grad) for numel in numels]
    for name, is_signed in step.states.items():
        wide = [normal(numel, torch.float32) for numel in numels]
        wide = wide if is_signed else [each.abs() for each in wide]
        if state is torch.uint8:
            pairs = [encode(each, is_signed=is_signed) for each in wide]
            made[name] = [codes for codes, _ in pairs]
            made[name.removesuffix("s") + "_scales"] = [scales for _, scales in pairs]
        else:
            made[name] = [each.to(state) for each in wide]
    if "copies" in taken and with_copies:
        made["copies"] = [torch.empty(numel, dtype=torch.bfloat16, device=device) for numel in numels]
    if "ratios" in taken:
        made["ratios"] = (torch.rand(len(numels), generator=random, dtype=torch.float64) + 0.5).to(device)
    return made
