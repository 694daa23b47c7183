"""Which parameters of a model are used together: its transformer blocks, and the runs of modules between them.

Blocks are recognised, never listed by name: the classes that a Hugging Face model says must not be split, else repeated
children of one ModuleList or Sequential that are made of several modules themselves. Leaf modules, which a user has
named, are blocks, too: all that is in them is gathered together, whichever part of it a rank uses.

    GPT: wte, wpe | h.0 | h.1 | ... | ln_f, lm_head      runs at both ends, a unit per block
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from zcore.core.errors import ConfigError, LayoutError
from zcore.zero.layout import ParamSpec, Unit

__all__ = ["ParamSites", "find_blocks", "find_parameters", "find_units", "set_leaf_modules"]

LEAF = "_zcore_leaf"  # attribute of a module


@dataclass(frozen=True, slots=True)
class ParamSites:
    """A parameter and every place where it is registered; more than one if it is tied."""

    spec: ParamSpec
    param: nn.Parameter
    sites: tuple[tuple[nn.Module, str], ...]
    owner: str  # fully qualified name of the module at the first site
    is_hidden_matrix: bool = False  # two dimensions and more, and no embedding nor the output head of one


def find_parameters(model: nn.Module) -> tuple[ParamSites, ...]:
    """Every distinct parameter in registration order, with all its sites.

    Raises LayoutError for one that is complex, or lazy and without a shape.
    """
    first: dict[int, tuple[str, str, nn.Parameter]] = {}
    sites: dict[int, list[tuple[nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            fqn = f"{module_name}.{name}" if module_name else name
            _refuse_kind(param, fqn)
            first.setdefault(id(param), (fqn, module_name, param))
            sites.setdefault(id(param), []).append((module, name))
    embeddings = [each.weight for each in model.modules() if isinstance(each, nn.Embedding)]
    same, shapes = {id(weight) for weight in embeddings}, {tuple(weight.shape) for weight in embeddings}
    in_blocks = {id(param) for block in find_blocks(model).values() for param in block.parameters()}
    return tuple(
        ParamSites(
            ParamSpec(fqn, tuple(param.shape), param.dtype, param.requires_grad),
            param,
            tuple(sites[key]),
            owner,
            is_hidden_matrix=param.dim() > 1
            and key not in same
            and (key in in_blocks or tuple(param.shape) not in shapes),
        )
        for key, (fqn, owner, param) in first.items()
    )


def _refuse_kind(param: nn.Parameter, fqn: str) -> None:
    if is_lazy(param):
        raise LayoutError(f"{fqn} has no shape yet. Run one batch through the model before it is sharded.")
    if param.is_complex():
        raise LayoutError(f"{fqn} is {param.dtype}; buckets hold real numbers. Keep it as two real parameters.")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost blocks by fully qualified name, in registration order; empty where none is recognisable."""
    declared = {
        name
        for module in model.modules()
        for name in (getattr(module, "_no_split_modules", None) or ())
        if isinstance(name, str)
    }
    found = {name: module for name, module in model.named_modules() if type(module).__name__ in declared and name}
    if not found:
        found = {name: module for name, module in _repeated(model) if name}
    found |= {name: module for name, module in model.named_modules() if getattr(module, LEAF, False) and name}
    return {name: module for name, module in found.items() if not any(outer in found for outer in _ancestors(name))}


def set_leaf_modules(
    model: nn.Module, classes: Iterable[type | str] = (), *, names: Iterable[str] = (), suffixes: Iterable[str] = ()
) -> list[nn.Module]:
    """Have modules of `model` gathered as one, whichever of their parts a rank uses; call it before sharding.

    For what data decide, such as experts that tokens are routed to: ranks then use different parts without waiting for
    each other. classes: types, or their names, with or without the module they are defined in. names: fully qualified.
    suffixes: endings of such names. Returns the modules. Raises ConfigError for one of these that fits no module.
    """
    chosen: dict[str, nn.Module] = {}
    modules = {name: module for name, module in model.named_modules() if name}

    def choose(what: str, wanted: object, fits: Callable[[str, nn.Module], bool]) -> None:
        found = {name: module for name, module in modules.items() if fits(name, module)}
        if not found:
            raise ConfigError(f"No module of this {type(model).__name__} is of the {what} {wanted!r}: none is a leaf.")
        chosen.update(found)

    for each in classes:
        choose("class", each, lambda name, module, each=each: each in _names_of(type(module)))  # type: ignore[misc]
    for each in names:
        choose("name", each, lambda name, module, each=each: name == each)  # type: ignore[misc]
    for each in suffixes:
        choose("name ending", each, lambda name, module, each=each: name.endswith(each))  # type: ignore[misc]
    for module in chosen.values():
        setattr(module, LEAF, True)
    return list(chosen.values())


def _names_of(kind: type) -> tuple[type | str, ...]:
    return kind, kind.__name__, f"{kind.__module__}.{kind.__qualname__}"


def _repeated(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of one class, several in one container, each with parameters in more than one module."""
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        composite = [(key, child) for key, child in container.named_children() if _owns_parameters_below(child)]
        kinds = Counter(type(child) for _, child in composite)
        for key, child in composite:
            if kinds[type(child)] > 1:
                yield (f"{name}.{key}" if name else key), child


def _owns_parameters_below(module: nn.Module) -> bool:
    return sum(bool(any(p is not None for p in each._parameters.values())) for each in module.modules()) > 1


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def find_units(model: nn.Module, parameters: tuple[ParamSites, ...]) -> tuple[Unit, ...]:
    """Group `parameters` into blocks and the runs between them, in registration order."""
    blocks = find_blocks(model)
    groups: list[tuple[str, list[ParamSites]]] = []  # (block name or "", parameters)
    for each in parameters:
        path = [each.owner, *_ancestors(each.owner)]
        block = next((name for name in path if name in blocks), "")
        if not groups or groups[-1][0] != block:
            groups.append((block, []))
        groups[-1][1].append(each)
    return tuple(
        Unit(block or _run_name(members), tuple(each.spec for each in members), is_block=bool(block))
        for block, members in groups
    )


def _run_name(members: list[ParamSites]) -> str:
    first, last = members[0].owner or members[0].spec.fqn, members[-1].owner or members[-1].spec.fqn
    return first if first == last else f"{first} to {last}"
