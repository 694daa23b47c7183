"""AdamW and Adam over lists of flat tensors, in one pass; the formula stands in native/include/zcore/adamw_step.hpp.

Decoupled weight decay: arXiv 1711.05101, algorithm 2. Without: arXiv 1412.6980, algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zcore.kernels import _cpu
from zcore.kernels.ops.pieces import Column, tabulate
from zcore.kernels.ops.registering import register

__all__ = ["adamw_step", "reference"]


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float = 1.0,
    is_decoupled: bool = True,
) -> None:
    """Step `params` (fp32, or fp64) in place, with states and gradients of any floating-point dtype.

    bias_correction1, bias_correction2: 1 - beta^t. grad_factor: what gradients are multiplied by first. copies: written
    with the new parameters in their own dtype; may be empty.
    """
    for index, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        scaled = grad.to(param.dtype) * grad_factor
        if is_decoupled:
            param.mul_(1.0 - lr * weight_decay)
        elif weight_decay:
            scaled = scaled + weight_decay * param
        average = exp_avg.to(param.dtype).lerp(scaled, 1.0 - beta1)
        square = exp_avg_sq.to(param.dtype) * beta2 + scaled * scaled * (1.0 - beta2)
        param.sub_(lr / bias_correction1 * average / (square.sqrt() / bias_correction2**0.5 + eps))
        exp_avg.copy_(average)
        exp_avg_sq.copy_(square)
        if copies:
            copies[index].copy_(param)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_factor: float = 1.0,
    is_decoupled: bool = True,
) -> None:
    """See `reference`; on the CPU, for parameters in fp32. Raises LayoutError and ConfigError for other operands."""
    table = tabulate(
        "adamw_step",
        {
            "params": Column(params, (torch.float32,)),
            "grads": Column(grads),
            "exp_avgs": Column(exp_avgs),
            "exp_avg_sqs": Column(exp_avg_sqs),
            "copies": Column(copies, is_optional=True),
        },
    )
    _cpu.adamw_step(
        *table,
        torch.get_num_threads(),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction1=bias_correction1,
        bias_correction2=bias_correction2,
        grad_factor=grad_factor,
        is_decoupled=is_decoupled,
    )


register(
    "adamw_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, *,"
    " float lr, float beta1, float beta2, float eps, float weight_decay, float bias_correction1,"
    " float bias_correction2, float grad_factor=1.0, bool is_decoupled=True) -> ()",
    reference=reference,
    cpu=adamw_step,
    fake=lambda *args, **kwargs: None,
    dtypes=(torch.float32,),
)
