"""Which dtype parameters are computed in and which they are stepped in. Buffers are never cast.

fp32         compute = master = the dtype the model was built in
bf16, fp16   compute in it; trainable parameters have an fp32 master, gradients accumulate and are reduced in fp32
without masters, bf16 only: parameters are stepped in fp32 a bucket at a time, and rounded back (optimizers/rounding.py)

Gradients may accumulate, and travel, in fewer bits than the master has; they reach the optimizer in its dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zcore.core.errors import ConfigError
from zcore.zero.buffer import BucketDtypes

__all__ = ["Precision"]


@dataclass(frozen=True, slots=True)
class Precision:
    """A precision policy; `compute` None leaves every parameter as it was built."""

    compute: torch.dtype | None = None
    accumulate: torch.dtype | None = None  # of gradients on their rank; None: as the master
    reduce: torch.dtype | None = None  # of gradients on their way; None: as they accumulate
    predivide: float = 1.0  # what gradients are divided by before they travel, so that sums stay in range
    masters: bool = True  # False: bf16 parameters have no fp32 copy; each step is rounded to them stochastically
    states: torch.dtype | None = None  # of the optimizer, without masters: None for fp32, or bf16, rounded alike

    def __post_init__(self) -> None:
        if not self.masters and self.compute is not torch.bfloat16:
            raise ConfigError(
                f"Without masters parameters are bf16, and not {self.compute}. Compute in torch.bfloat16."
            )
        if self.states not in (None, torch.bfloat16) or (self.states is not None and self.masters):
            raise ConfigError(
                f"Optimizer states are kept in fp32, or without masters in bf16; asked for are {self.states} "
                f"{'with' if self.masters else 'without'} masters. Pass masters=False, states=torch.bfloat16; or none."
            )

    def dtypes_of(self, dtype: torch.dtype, *, trainable: bool) -> BucketDtypes:
        """For a parameter built in `dtype`. Frozen and integer parameters have no master apart.

        Of one byte, or packed into one, numbers have a scale beside them and are never cast.
        """
        if not dtype.is_floating_point or dtype.itemsize == 1:
            return BucketDtypes(compute=dtype, master=dtype)
        has_master = trainable and self.masters
        master = dtype if self.compute is None else torch.float32 if has_master else self.compute
        return BucketDtypes(
            self.compute or dtype,
            master,
            accumulate=self.accumulate,
            reduce=self.reduce,
            predivide=self.predivide,
            rounds=trainable and not self.masters,
            states=self.states,
        )

    def cast_inputs(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Floating-point inputs of the root module in the compute dtype; None where nothing changes."""
        compute = self.compute
        if compute is None:
            return None

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(compute) if tensor.is_floating_point() else tensor

        cast_args, cast_kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return cast_args, cast_kwargs
