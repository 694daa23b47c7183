"""Which of these optimizers serves where another wheel asks for one by its name in torch.optim.

A wheel that steps flat parameters finds `offer` under the entry point group `zcore.optimizers`, and asks before it
takes torch's class. None is the answer where that does something else, or does it sooner: for a device or dtype that
the registry has references for only, with `ZCORE_OPS=reference`, and for settings that are not served here.
"""

from collections.abc import Collection, Mapping

import torch

from zcore.core import ops
from zcore.core.errors import NotInstalledError
from zcore.kernels.optim.adagrad import Adagrad
from zcore.kernels.optim.adam import Adam
from zcore.kernels.optim.adamw import AdamW
from zcore.kernels.optim.flat_optimizer import FlatOptimizer
from zcore.kernels.optim.lion import Lion
from zcore.kernels.optim.sgd import SGD

__all__ = ["offer"]

OPS: dict[str, tuple[type[FlatOptimizer], str]] = {
    "Adam": (Adam, "adamw_step"),
    "AdamW": (AdamW, "adamw_step"),
    "Adagrad": (Adagrad, "adagrad_step"),
    "Lion": (Lion, "lion_step"),
    "SGD": (SGD, "sgd_step"),
}  # not LAMB, which needs norms of whole parameters
TORCHS = frozenset({"amsgrad", "foreach", "capturable", "differentiable", "fused"})  # who names one means torch's


def offer(
    name: str, settings: Mapping[str, object], *, device: torch.device, dtypes: Collection[torch.dtype]
) -> type[torch.optim.Optimizer] | None:
    """The class that serves `name` with `settings`, torch's keyword arguments, for parameters of `dtypes` on `device`.

    >>> offer("AdamW", {"lr": 1e-3}, device=torch.device("cpu"), dtypes={torch.float32}).__name__
    'AdamW'
    >>> offer("AdamW", {"amsgrad": True}, device=torch.device("cpu"), dtypes={torch.float32}) is None
    True
    """
    if name not in OPS or not TORCHS.isdisjoint(settings):
        return None
    kind, op = OPS[name]
    try:
        served = [ops.choose(op, device=device, dtype=dtype) for dtype in dtypes]
    except NotInstalledError:
        return None
    return None if any(each.source == "reference" for each in served) else kind
