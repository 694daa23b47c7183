"""One parameter of a bucket: the whole that modules compute with, the fragment that is stepped, and their places."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zcore.core.errors import StateError
from zcore.zero.layout import Fragment
from zcore.zero.sharded_parameter import GRAD, ParameterOwner, ShardedParameter, UnreducedGradient
from zcore.zero.units import ParamSites

__all__ = ["FRAGMENT", "BucketParam", "as_plain_tensors"]

FRAGMENT = "_zcore_fragment"  # attribute of a whole parameter


as_plain_tensors = torch._C.DisableTorchFunctionSubclass  # what is done to fragments inside is done to tensors


@dataclass(frozen=True, slots=True)
class BucketParam:
    """One parameter of a bucket: the whole that the modules compute with, and the fragment that the optimizer sees."""

    full: nn.Parameter
    shard: ShardedParameter
    fragment: Fragment
    sites: tuple[tuple[weakref.ref[nn.Module], str], ...]

    @classmethod
    def of(
        cls, member: ParamSites, *, owner: ParameterOwner, index: int, full: Tensor, held: Tensor, place: Fragment
    ) -> "BucketParam":
        """Parameter `index` of the bucket `owner`: whole in `full`, of which this rank steps `held`, both views."""
        spec = member.spec
        whole = nn.Parameter(full, requires_grad=spec.trainable)
        whole.__dict__.update(member.param.__dict__)  # tags that users and optimizers put on a parameter
        _move_hooks(member.param, whole, spec.fqn)
        shard = ShardedParameter.of(
            held,
            owner=owner,
            index=index,
            fqn=spec.fqn,
            full_shape=spec.shape,
            start=place.start,
            is_trained=spec.trainable,
        )
        shard.use_muon = bool(getattr(member.param, "use_muon", member.is_hidden_matrix))
        whole.__dict__[FRAGMENT] = shard
        return cls(whole, shard, place, tuple((weakref.ref(module), name) for module, name in member.sites))

    def announce_gradient(self) -> None:
        """Make it seen that there is a gradient, which is not reduced yet: dropping it drops that.

        Inside of `as_plain_tensors`.
        """
        stand_in = self.shard.detach().new_zeros(1).expand(self.fragment.numel)
        GRAD.__set__(self.shard, stand_in.as_subclass(UnreducedGradient))

    @property
    def gradient(self) -> Tensor | None:
        """The fragment's `.grad`, inside of `as_plain_tensors`."""
        found: Tensor | None = GRAD.__get__(self.shard)
        return found

    @property
    def has_gradient(self) -> bool:
        """Whether the fragment has a `.grad`, and not one that was zeroed unreduced; inside of `as_plain_tensors`."""
        grad = self.gradient
        return grad is not None and not (isinstance(grad, UnreducedGradient) and grad.was_zeroed)

    @property
    def is_trainable(self) -> bool:
        """Whether the fragment requires a gradient now; users may freeze it between steps."""
        return self.shard.requires_grad

    def check_registered(self) -> None:
        """Raise StateError where the model has something else in this parameter's place."""
        for module_ref, name in self.sites:
            module = module_ref()
            found = module._parameters.get(name) if module is not None else self.full
            if found is not self.shard and found is not self.full:
                raise StateError(
                    f"{self.shard.fqn} is no longer the parameter that was sharded: {type(module).__name__}.{name} was "
                    "tied to another, replaced (as torch.func.functional_call does) or removed. Change the model "
                    "before it is sharded; to edit values use `zero.GatheredParameters`."
                )

    def register(self, param: nn.Parameter) -> None:
        """Put `param` at every place of the model where this parameter belongs."""
        for module_ref, name in self.sites:
            module = module_ref()
            if module is not None:
                module._parameters[name] = param


def _move_hooks(original: nn.Parameter, full: nn.Parameter, fqn: str) -> None:
    """Hooks on the gradient act on the whole gradient of this rank, before it is reduced."""
    if getattr(original, "_post_accumulate_grad_hooks", None):
        raise StateError(
            f"{fqn} has a hook that waits for its .grad, as an optimizer step inside the backward does. A sharded "
            "gradient is there after the backward: remove the hook, and step the optimizer as usual."
        )
    for hook in (original._backward_hooks or {}).values():
        full.register_hook(hook)
