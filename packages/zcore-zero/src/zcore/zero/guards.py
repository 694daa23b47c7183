"""What is refused around a sharded model, where plain torch would go on with a fragment, or past it.

optimizers    step reduced gradients of fragments, and nothing that sharding has replaced
parameters    that were replaced, and are used all the same; that were added, and nobody shards
state dicts   which hold whole weights
"""

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zcore.core.errors import StateError
from zcore.zero.bucket import Bucket
from zcore.zero.bucket_param import FRAGMENT, as_plain_tensors
from zcore.zero.optimizers.building import refuse_matrix_wise
from zcore.zero.sharded_parameter import GRAD, ShardedParameter, UnreducedGradient

__all__ = ["Newcomers", "fqn_of_retired", "note_step", "refuse_load", "refuse_state_dict", "refuse_step", "retire"]

RETIRED = "_zcore_retired"  # attribute of a parameter that was replaced: its fully qualified name


def refuse_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Before any optimizer's step: it needs reduced gradients, and fragments, and not more of a parameter than that."""
    name = type(optimizer).__name__
    seen: set[Bucket] = set()
    with as_plain_tensors():
        for group in optimizer.param_groups:
            for param in group["params"]:
                if not isinstance(param, ShardedParameter) or not isinstance(bucket := param.owner, Bucket):
                    continue
                if isinstance(GRAD.__get__(param), UnreducedGradient):
                    raise StateError(
                        f"{name} steps {param.fqn}, whose gradient is not reduced yet: the last backward ran inside "
                        "no_sync(), or is not the last one of its step. Step after a backward outside no_sync()."
                    )
                if bucket not in seen:
                    seen.add(bucket)
                    _refuse_step_of(bucket, param, name)
    if seen:
        refuse_matrix_wise(optimizer)


def _refuse_step_of(bucket: Bucket, param: ShardedParameter, name: str) -> None:
    if bucket.needs_rounding:
        raise StateError(
            f"{name} steps {param.fqn}, which is bf16 without a master: in its 8 bits small steps would be lost. Call "
            "`zero.rounded_step(model, optimizer, step=...)` in place of `optimizer.step()`."
        )
    if bucket.stands_for_whole():
        raise StateError(
            f"{name} steps {param.fqn} inside GatheredParameters, where it is whole, and the optimizer's states are of "
            "this rank's part. Step outside the block."
        )


def note_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """After any optimizer's step: what it stepped is out of date where it is gathered. The same on every rank."""
    stepped: set[Bucket] = set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, ShardedParameter) and isinstance(bucket := param.owner, Bucket):
                stepped.add(bucket)
            elif fqn := getattr(param, RETIRED, None):
                raise StateError(
                    f"This {type(optimizer).__name__} holds {fqn} as it was before it was sharded, which the model no "
                    "longer uses, and trains nothing: it was built before, or of parameters that were taken before. "
                    "Build it after `zero.shard`, of `model.parameters()` then, or pass it to `zero.initialize`; to "
                    "one that there is add what `zero.shard_added` returns."
                )
    for bucket in stepped:
        bucket.mark_stale()


def retire(param: nn.Parameter, fqn: str) -> None:
    """Mark a parameter that fragments have replaced, so that whoever goes on using it is told."""
    param.__dict__[RETIRED] = fqn
    if param.requires_grad:
        param.register_post_accumulate_grad_hook(_refuse_gradient_of_retired)


def fqn_of_retired(param: Tensor) -> str | None:
    """The fully qualified name of a parameter that was replaced; None of others."""
    return param.__dict__.get(RETIRED)


def _refuse_gradient_of_retired(param: Tensor) -> None:
    fqn = getattr(param, RETIRED)
    raise StateError(
        f"{fqn} is used in the forward by another reference than its module's attribute, such as a list or a closure, "
        "which holds it as it was before sharding; it would never be trained. Use the module's attribute, or an "
        "nn.ParameterList."
    )


def refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before `module.state_dict()`."""
    raise StateError(
        "state_dict() of a sharded model would hold this rank's fragments. Call `engine.consolidated_state_dict()` on "
        "every rank for the whole weights, or `zero.consolidated_state_dict(model)` without an engine."
    )


def refuse_load(module: nn.Module, state_dict: object, prefix: str, *rest: object) -> None:
    """Before `module.load_state_dict(...)`."""
    raise StateError(
        "load_state_dict() cannot put whole weights into fragments. Load them before `zero.initialize` or "
        "`zero.shard`; to continue a run of the engine use `engine.load_checkpoint`."
    )


class Newcomers:
    """Notices parameters that a model has got since it was sharded; as a hook before its forward it refuses them.

    The model is looked through only if anything was registered anywhere since the last time.
    """

    def __init__(self) -> None:
        self.sharded: set[str] = set()  # names of parameters that are; one in their place is refused where it is used
        _registrations.watch()
        self._seen = _registrations.count

    def __call__(self, model: nn.Module, args: object) -> None:
        """Raise StateError for parameters that are not sharded."""
        if self._seen == _registrations.count:
            return
        if names := [name for name in self.names(model) if name not in self.sharded]:
            raise StateError(
                f"{len(names)} parameters were added after the model was sharded, the first is {names[0]}: ranks would "
                "not train them together. Call `zero.shard_added(model)` on every rank, or `engine.shard_added()`, "
                "which has the optimizer step them, too."
            )
        self._seen = _registrations.count

    @staticmethod
    def names(model: nn.Module) -> list[str]:
        """Of parameters that no bucket holds."""
        return [
            f"{name}.{key}".removeprefix(".")
            for name, module in model.named_modules()
            for key, param in module._parameters.items()
            if param is not None and not isinstance(param, ShardedParameter) and FRAGMENT not in param.__dict__
        ]


class _Registrations:
    """Counts modules and parameters that are registered, while anybody watches."""

    def __init__(self) -> None:
        self.count = 0
        self._handles: tuple[RemovableHandle, ...] = ()

    def watch(self) -> None:
        """Count from now on; the hooks stay."""
        if not self._handles:
            self._handles = (
                register_module_module_registration_hook(self._note),
                register_module_parameter_registration_hook(self._note),
            )

    def _note(self, module: nn.Module, name: str, value: object) -> None:
        self.count += 1


_registrations = _Registrations()
