"""SiLU and the two forms of GELU, each with its slope, for kernels; forms are counted as ops/gated.py counts them.

tanh is taken from a sigmoid, since (1 + tanh z) / 2 = sigmoid(2 z).
"""

import triton
import triton.language as tl

from zcore.kernels.ops import gated
from zcore.kernels.ops.gelu import form_of

__all__ = ["activation", "activation_and_slope"]

SILU = tl.constexpr(gated.SILU)
TANH = tl.constexpr(form_of("gelu", "tanh"))
TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
INVERSE_ROOT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def share(x: tl.tensor, FORM: tl.constexpr) -> tl.tensor:
    """What of x the activation lets pass, from 0 to 1."""
    if FORM == SILU:
        passed = tl.sigmoid(x)
    elif FORM == TANH:
        passed = tl.sigmoid((x + x * x * x * CUBIC) * TWICE_ROOT)
    else:
        passed = 0.5 * (1.0 + tl.erf(x * INVERSE_ROOT_2))
    return passed


@triton.jit
def activation(x: tl.tensor, FORM: tl.constexpr) -> tl.tensor:
    """Of x in fp32."""
    return x * share(x, FORM)


@triton.jit
def activation_and_slope(x: tl.tensor, FORM: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Both of x in fp32."""
    passed = share(x, FORM)
    if FORM == SILU:
        slope = passed * (1.0 + x * (1.0 - passed))
    elif FORM == TANH:
        slope = passed * (1.0 + x * (1.0 - passed) * TWICE_ROOT * (1.0 + x * x * CUBIC * 3.0))
    else:
        slope = passed + x * INVERSE_ROOT_2_PI * tl.exp(-0.5 * x * x)
    return x * passed, slope
