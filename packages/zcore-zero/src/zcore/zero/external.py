"""Parameters that a module uses and another one owns, where it is not enough that zcore finds such uses by itself.

A weight of another module is gathered for each operation that reads it. A module that gives one to an
`autograd.Function`, or reads it in many places, says so beforehand: it then finds it whole, as its own.
"""

from collections.abc import Mapping

from torch import nn

from zcore.core.errors import StateError
from zcore.zero.bucket import Bucket
from zcore.zero.guards import fqn_of_retired
from zcore.zero.hooks import Conductor, Site
from zcore.zero.sharded_parameter import ShardedParameter

__all__ = ["external_fragments", "register_external_parameter"]

EXTERNAL = "_zcore_external"  # attribute of a module: the parameters


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Have `parameter`, which another module owns, gathered and whole while the forward of `module` runs.

    Called before or after sharding, on every rank. Raises StateError for what is no parameter, or one that was replaced
    when the model was sharded.
    """
    if not isinstance(parameter, nn.Parameter):
        raise StateError(
            f"register_external_parameter got a {type(parameter).__name__}; expected a parameter of another module."
        )
    if (fqn := fqn_of_retired(parameter)) is not None:
        raise StateError(
            f"{fqn} is given as it was before sharding, and the model no longer uses it. Pass the attribute of the "
            "module that owns it, read after sharding."
        )
    module.__dict__.setdefault(EXTERNAL, []).append(parameter)
    if isinstance(parameter, ShardedParameter) and isinstance(parameter.owner, Bucket):
        host = parameter.owner.host() if parameter.owner.host is not None else None
        if isinstance(host, Conductor):
            host.add(module, Site(type(module).__name__, ((parameter.owner, (parameter.position,)),)))


def external_fragments(module: nn.Module, by_name: Mapping[str, ShardedParameter]) -> list[ShardedParameter]:
    """The fragments of what was registered for `module`; parameters of before sharding are let go of."""
    given = module.__dict__.get(EXTERNAL)
    if not given:
        return []
    given[:] = [by_name.get(fqn_of_retired(param) or "", param) for param in given]
    return [param for param in given if isinstance(param, ShardedParameter) and by_name.get(param.fqn) is param]
