"""Layers like those of torch.nn over the ops of zcore.kernels.ops; where nothing compiled serves, torch does."""

from zcore.kernels.nn.bias_dropout_residual import BiasDropoutResidual
from zcore.kernels.nn.bias_gelu import BiasGELU
from zcore.kernels.nn.expert_mlps import ExpertMLPs
from zcore.kernels.nn.geglu import GeGLU
from zcore.kernels.nn.layer_norm import LayerNorm
from zcore.kernels.nn.linear_cross_entropy import LinearCrossEntropy
from zcore.kernels.nn.rms_norm import RMSNorm
from zcore.kernels.nn.rotary import Rotary
from zcore.kernels.nn.router_losses import load_balancing_loss, router_z_loss
from zcore.kernels.nn.swiglu import SwiGLU
from zcore.kernels.nn.topk_router import TopKRouter

__all__ = [
    "BiasDropoutResidual",
    "BiasGELU",
    "ExpertMLPs",
    "GeGLU",
    "LayerNorm",
    "LinearCrossEntropy",
    "RMSNorm",
    "Rotary",
    "SwiGLU",
    "TopKRouter",
    "load_balancing_loss",
    "router_z_loss",
]
