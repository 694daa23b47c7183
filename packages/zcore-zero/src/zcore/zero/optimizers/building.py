"""Any element-wise `torch.optim` class on fragments: built by name, class or factory, or taken over as an instance.

The parameter groups of the user name whole parameters; before sharding they become names, after it fragments.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from zcore.core import extensions
from zcore.core.errors import ConfigError, StateError, nearest
from zcore.zero.config import Choice
from zcore.zero.optimizers.lamb import Lamb
from zcore.zero.optimizers.lion import Lion
from zcore.zero.optimizers.muon import Muon
from zcore.zero.sharded_parameter import ShardedParameter

__all__ = [
    "GroupsByName",
    "OptimizerSource",
    "ParamGroups",
    "StatesByName",
    "build_optimizer",
    "cut_states",
    "name_groups",
    "refuse_matrix_wise",
    "release_params",
]

logger = logging.getLogger(__name__)

ParamGroups = Iterable[Tensor] | Iterable[Mapping[str, Any]]
OptimizerSource = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]
StatesByName = dict[str, dict[str, Any]]  # torch's states of whole parameters
GroupsByName = list[dict[str, Any]]  # torch's groups with "params" a list of fully qualified names

OWN: dict[str, type[torch.optim.Optimizer]] = {"Lamb": Lamb, "Lion": Lion, "Muon": Muon}  # beside torch's, or in place
OF_DEEPSPEED = {  # that stand for what has another name here, or for nothing
    "fusedadam": 'Write "AdamW": it is fused where the device has that.',
    "deepspeedcpuadam": 'Write "AdamW": it is fused where the device has that.',
    "cpuadam": 'Write "AdamW": it is fused where the device has that.',
    "fusedlamb": 'Write "Lamb".',
    "fusedlion": 'Write "Lion".',
    "deepspeedcpulion": 'Write "Lion".',
    "deepspeedcpuadagrad": 'Write "Adagrad".',
    "onebitadam": 'Gradients of one bit are not served; write "AdamW".',
    "zerooneadam": 'Gradients of one bit are not served; write "AdamW".',
    "onebitlamb": 'Gradients of one bit are not served; write "Lamb".',
    "muadam": 'Scaling by width is not served; write "AdamW", with a learning rate for each group.',
    "muadamw": 'Scaling by width is not served; write "AdamW", with a learning rate for each group.',
    "musgd": 'Scaling by width is not served; write "SGD", with a learning rate for each group.',
}
MATRIX_WISE = frozenset({"Muon", "Adafactor", "LBFGS", "SparseAdam"})  # of torch.optim: they need whole parameters


def name_groups(groups: ParamGroups | None, model: nn.Module) -> GroupsByName:
    """The user's groups with names in place of parameters; one group of all that is trainable where there are none.

    Raises ConfigError for a parameter that is not of `model`, or stands in two groups.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    if groups is None:
        return [{"params": [name for name, param in model.named_parameters() if param.requires_grad]}]
    listed = [each[1] if isinstance(each, tuple) else each for each in groups]  # named_parameters() is taken as well
    as_groups: list[Mapping[str, Any]] = [
        group if isinstance(group, Mapping) else {"params": [group]} for group in listed
    ]
    if listed and not any(isinstance(group, Mapping) for group in listed):
        as_groups = [{"params": listed}]
    if not any(isinstance(group["params"], Tensor) or group["params"] for group in as_groups):
        raise ConfigError(
            "The optimizer's groups hold no parameters, so nothing would be trained. An optimizer that was passed to "
            "an earlier `zero.initialize` has given its parameters away: make a new one."
        )
    seen: set[str] = set()
    named: GroupsByName = []
    for group in as_groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if strangers := [tuple(param.shape) for param in params if id(param) not in names]:
            raise ConfigError(
                f"{len(strangers)} parameters in the optimizer's groups are not parameters of the model, the "
                f"first of shape {strangers[0]}. Build the groups from the very model that is passed, after its "
                "last change of parameters."
            )
        fqns = [names[id(param)] for param in params]
        if twice := sorted(seen & set(fqns)):
            raise ConfigError(f"{twice[0]} stands in two parameter groups; each parameter belongs in one.")
        seen |= set(fqns)
        named.append({**group, "params": fqns})
    return named


def release_params(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[GroupsByName, StatesByName]:
    """Take the whole parameters out of a client's optimizer, so that sharding can free them.

    Returns its groups and its states, if it has stepped or made some when it was built, by name of parameter. Raises
    StateError for states without values, of parameters that are still on meta.
    """
    refuse_matrix_wise(optimizer)
    groups = name_groups(optimizer.param_groups, model)
    names = {id(param): name for name, param in model.named_parameters()}
    states = {names[id(param)]: state for param, state in optimizer.state.items()}
    for name, state in states.items():
        if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            raise StateError(
                f"The {type(optimizer).__name__} that was passed has made states for {name}, which has no values "
                "before it is sharded. Pass the class, or a function from groups to it, in place of the instance."
            )
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = []
    return groups, states


def cut_states(
    optimizer: torch.optim.Optimizer, states: StatesByName, fragments: Mapping[str, ShardedParameter]
) -> None:
    """Give `optimizer` each fragment's part of the states that belonged to whole parameters."""
    for name, state in states.items():
        fragment = fragments[name]
        held = slice(fragment.full_start, fragment.full_stop)
        optimizer.state[fragment] = {
            key: value.reshape(-1)[held].clone() if _is_of_each_element(key, value, fragment) else value
            for key, value in state.items()
        }


def _is_of_each_element(key: str, value: object, fragment: ShardedParameter) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and tuple(value.shape) == fragment.full_shape and key != "step"


def build_optimizer(
    source: OptimizerSource | Choice,
    groups: GroupsByName,
    fragments: Mapping[str, nn.Parameter],
    *,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer over fragments.

    A name takes the class that an installed wheel offers for it, else torch's with its fused step where it has one.
    Names are DeepSpeed's, whose "Adam" decouples weight decay unless `adam_w_mode` is false. Frozen parameters are left
    out.
    """
    with_fragments = [
        {**group, "params": [fragments[name] for name in group["params"] if fragments[name].requires_grad]}
        for group in groups
    ]
    if isinstance(source, torch.optim.Optimizer):
        for kept, group in zip(source.param_groups, with_fragments, strict=True):
            kept["params"] = group["params"]
        return source
    if isinstance(source, Choice):
        return _build_by_name(source, with_fragments, device)
    if isinstance(source, type):
        _refuse_matrix_wise_class(source)
    try:
        optimizer = source(with_fragments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "The optimizer that was passed cannot be built over sharded parameters. It is given torch's parameter "
            "groups with flat fragments in them: pass an element-wise class, or a function from groups to an "
            "optimizer. Its own words are in the error above."
        ) from error
    refuse_matrix_wise(optimizer)
    return optimizer


def _build_by_name(choice: Choice, groups: Sequence[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    params = dict(choice.params)
    known = {key: value for key, value in vars(torch.optim).items() if _is_optimizer(value)} | OWN
    name = {each.lower(): each for each in known}.get(choice.type.lower(), choice.type)  # as DeepSpeed reads names
    params.pop("torch_adam", None)  # which implementation: there is one here
    decoupled = params.pop("adam_w_mode", True)
    if name == "Adam" and decoupled:
        name = "AdamW"
        if params.get("weight_decay"):
            logger.info("optimizer Adam: weight decay is decoupled, as in DeepSpeed; adam_w_mode: false makes it L2.")
    if name not in known:
        if choice.type.lower() in OF_DEEPSPEED:
            raise ConfigError(f"optimizer.type is {choice.type!r}, of DeepSpeed. {OF_DEEPSPEED[choice.type.lower()]}")
        near = nearest(name, known)
        usable = sorted(each for each, kind in known.items() if not _is_matrix_wise(kind))
        advice = f"Did you mean {near}?" if near else f"Known are {', '.join(usable)}."
        raise ConfigError(f"optimizer.type is {choice.type!r}, which neither zcore.zero nor torch.optim has. {advice}")
    _refuse_matrix_wise_class(known[name])
    accepted = inspect.signature(known[name]).parameters
    where = "zcore.zero" if name in OWN else "torch.optim"
    if unknown := sorted(set(params) - set(accepted)):
        near = nearest(unknown[0], accepted)
        advice = f"Did you mean {near}?" if near else f"It takes {', '.join(list(accepted)[1:])}."
        raise ConfigError(f"optimizer.params.{unknown[0]} is not an argument of {where}.{name}. {advice}")
    kind = _offered(name, params, groups, device)
    if kind is not None:
        try:
            return kind(groups, **params)
        except ConfigError as error:
            raise ConfigError(f"optimizer.params: {error}") from error
    # torch's fused SGD cannot begin a parameter's momentum later than another's.
    has_fused = "fused" in accepted and not (name == "SGD" and params.get("momentum"))
    if has_fused and "foreach" not in params and device.type in ("cpu", "cuda"):
        params.setdefault("fused", True)
    try:
        built: torch.optim.Optimizer = known[name](groups, **params)
        return built
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer.params: {where}.{name} refuses {params}: {error}. Change that value in the config."
        ) from error


def _offered(
    name: str, params: Mapping[str, Any], groups: Sequence[dict[str, Any]], device: torch.device
) -> Callable[..., torch.optim.Optimizer] | None:
    """What an installed wheel steps these parameters with, sooner than torch does, or None.

    It offers a function `(name, settings, *, device, dtypes) -> class | None` in `zcore.optimizers`.
    """
    dtypes = {param.dtype for group in groups for param in group["params"]}
    for offer in extensions.offered("zcore.optimizers"):
        find = cast("Callable[..., Callable[..., torch.optim.Optimizer] | None]", offer.load())
        kind = find(name, params, device=device, dtypes=dtypes)
        if kind is not None:
            logger.info("optimizer %s: %s steps it; ZCORE_OPS=reference takes torch's.", name, offer.wheel)
            return kind
    return None


def refuse_matrix_wise(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError if `optimizer` looks at whole matrices: torch's own, subclasses, and others of these names.

    It does not look at what is stepped: call it for an optimizer that holds, or is to hold, fragments.
    """
    _refuse_matrix_wise_class(type(optimizer))


def _is_optimizer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def _is_matrix_wise(kind: type) -> bool:
    return not issubclass(kind, Muon) and not MATRIX_WISE.isdisjoint(base.__name__ for base in kind.__mro__)


def _refuse_matrix_wise_class(kind: type) -> None:
    if _is_matrix_wise(kind):
        other = "zcore.zero.Muon" if kind.__name__ == "Muon" else "zcore.zero.Muon for matrices"
        raise ConfigError(
            f"{kind.__module__}.{kind.__name__} looks at whole matrices, but sharded parameters are stepped in flat "
            f"pieces. Take {other}, or an element-wise optimizer such as AdamW, Adagrad or SGD."
        )
