"""Checks the house's rule of dependency, hub and spoke, by reading sources and pyproject.toml files; runs none of them.

    floor 4             infer
    floor 3         zero     pipe         a wheel imports zcore.core and its own outside libraries; never another
    floor 2    comm  kernels  offload     feature wheel, on whatever floor; the core imports none of them
    floor 1             core

It also finds circles between the modules of a wheel, a zcore/__init__.py (it would shut out the other wheels), imports
that pyproject.toml does not declare, and file names that say nothing. An import that runs with its module needs a hard
dependency; inside a function or under TYPE_CHECKING one of an extra will do. `[tool.zcore.behind-extra]` names the
modules that as a whole belong to an extra, such as a pytest plugin.

    python tools/check_layers.py [ROOT]    prints one line for each finding and exits with 1, or prints one line with ok
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FLOORS = {"core": 1, "comm": 2, "kernels": 2, "offload": 2, "zero": 3, "pipe": 3, "infer": 4}
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
# Where the name to import is not the name to install. pydantic pins pydantic_core and re-exports from it.
DISTRIBUTIONS = {
    "_pytest": "pytest",
    "PIL": "pillow",
    "pydantic_core": "pydantic",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@dataclass(frozen=True, slots=True)
class Import:
    """One name that a file imports, dotted: `from zcore.core import mesh` is "zcore.core.mesh"."""

    target: str
    line: int
    is_eager: bool  # runs when the file is imported


@dataclass(frozen=True, slots=True)
class Wheel:
    """One folder packages/zcore-X: what its pyproject.toml declares, and where its modules lie."""

    name: str  # X
    pyproject: Path
    required: frozenset[str]  # distributions
    extras: Mapping[str, frozenset[str]]
    behind_extra: Mapping[str, str]  # module -> the extra it belongs to
    modules: Mapping[str, Path]  # "zcore.zero.layout" -> file


def read_wheel(folder: Path) -> Wheel:
    """Read one wheel's declarations and find its modules."""
    pyproject = folder / "pyproject.toml"
    tables = tomllib.loads(pyproject.read_text())
    project = tables["project"]
    modules = {}
    for file in sorted([*folder.glob("src/**/*.py"), *folder.glob("src/**/*.pyi")]):  # a stub stands for compiled code
        parts = file.relative_to(folder / "src").with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return Wheel(
        name=folder.name.removeprefix("zcore-"),
        pyproject=pyproject,
        required=_distributions(project.get("dependencies", [])),
        extras={extra: _distributions(names) for extra, names in project.get("optional-dependencies", {}).items()},
        behind_extra=tables.get("tool", {}).get("zcore", {}).get("behind-extra", {}),
        modules=modules,
    )


def _distributions(requirements: list[str]) -> frozenset[str]:
    """Reduce requirements to distribution names in their normal form: "PyYAML>=6; os_name == 'nt'" is "pyyaml"."""
    names = (re.match(r"[\w.-]+", requirement.strip()) for requirement in requirements)
    return frozenset(re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name)


def find_imports(source: str) -> list[Import]:
    """List what a source file imports, in functions and under TYPE_CHECKING too."""

    def visit(node: ast.AST, is_eager: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno, is_eager) for alias in node.names)
            case ast.ImportFrom():
                base = "." * node.level + (node.module or "")
                yield from (Import(f"{base}.{alias.name}", node.lineno, is_eager) for alias in node.names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in {"import_module", "__import__"}:
                    yield Import(name, node.lineno, is_eager)
        is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for field, value in ast.iter_fields(node):
            is_type_only = isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, is_eager and not is_deferred and not is_type_only)

    return list(visit(ast.parse(source), True))


def check_declarations(wheel: Wheel) -> Iterator[str]:
    """Find feature wheels that this one would install."""
    for where, distributions in {"dependencies": wheel.required, **wheel.extras}.items():
        for distribution in sorted(distributions):
            other = distribution.removeprefix("zcore-")
            if other in FLOORS and other not in {"core", wheel.name}:
                yield f"{wheel.pyproject}: {where} drags in {distribution}; a feature wheel depends on zcore-core only."


def check_imports(wheel: Wheel) -> Iterator[str]:
    """Find imports that break the layering or that the wheel does not declare."""
    for module, file in wheel.modules.items():
        for found in find_imports(file.read_text()):
            finding = _judge(found, module, wheel)
            if finding:
                yield f"{file}:{found.line}: {finding}"


def _judge(found: Import, module: str, wheel: Wheel) -> str | None:
    """Say what is wrong with an import in `module`, or None."""
    top, *rest = found.target.split(".")
    extra = wheel.behind_extra.get(module)
    if top == "":
        return f"relative import {found.target}; write the module's whole name."
    if top == "zcore" and rest[:1] == [wheel.name]:
        other_extra = wheel.behind_extra.get(_owner(found.target, wheel.modules) or "", extra)
        if found.is_eager and other_extra != extra:
            return f"{found.target} is behind the extra {other_extra}; import it where it is used."
        return None
    if top == "zcore" and rest[:1] != ["core"]:
        other = ".".join(rest[:1])
        if FLOORS.get(other, 0) > FLOORS[wheel.name]:
            floors = f"from floor {FLOORS[wheel.name]} to floor {FLOORS[other]}"
            return f"zcore.{wheel.name} imports upward, {floors}: zcore.{other}."
        return f"zcore.{wheel.name} imports zcore.{other}; feature wheels meet through contracts of zcore.core."
    if top in sys.stdlib_module_names:
        return None
    distribution = "zcore-core" if top == "zcore" else DISTRIBUTIONS.get(top, top.replace("_", "-").lower())
    if distribution in wheel.required | wheel.extras.get(extra or "", frozenset()):
        return None
    if not any(distribution in names for names in wheel.extras.values()):
        return f"{top} comes from {distribution}, which {wheel.pyproject} does not declare."
    return f"only an extra brings {top}; import it where it is used." if found.is_eager else None


def check_circles(wheel: Wheel) -> Iterator[str]:
    """Find one circle among the modules of a wheel, if there is any."""
    edges: dict[str, set[str]] = {}
    for module, file in wheel.modules.items():
        targets = (_owner(found.target, wheel.modules) for found in find_imports(file.read_text()))
        edges[module] = {target for target in targets if target and target != module}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        yield f"{wheel.pyproject.parent}: modules import in a circle: {' <- '.join(error.args[1])}."


def _owner(target: str, modules: Mapping[str, Path]) -> str | None:
    """Return the module that holds `target`: "zcore.zero.layout" for "zcore.zero.layout.plan_bucket"."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target or None


def check_names(wheel: Wheel) -> Iterator[str]:
    """Find files outside the wheel's own package, above all zcore/__init__.py, and names that say nothing."""
    for module, file in wheel.modules.items():
        if module == "zcore":
            yield f"{file}: zcore is a namespace that the wheels share; delete this file."
        elif module.split(".")[:2] != ["zcore", wheel.name]:
            yield f"{file}: lies outside zcore.{wheel.name}, the one package of this wheel."
        for name in sorted(VAGUE_NAMES.intersection(module.split("."))):
            yield f"{file}: {name} says nothing about what is inside; name the idea."


def check_tree(root: Path) -> list[str]:
    """Return every finding of the tree at `root`, one line each; none for a sound tree."""
    folders = [root / "packages" / f"zcore-{name}" for name in FLOORS]
    missing = [
        f"{folder}: this wheel has no pyproject.toml." for folder in folders if not (folder / "pyproject.toml").exists()
    ]
    wheels = [read_wheel(folder) for folder in folders if (folder / "pyproject.toml").exists()]
    checks = (check_declarations, check_imports, check_circles, check_names)
    findings = missing + [finding for wheel in wheels for check in checks for finding in check(wheel)]
    return [finding.replace(f"{root}/", "") for finding in dict.fromkeys(findings)]


def main() -> int:
    """Check the tree named on the command line, or else the one this file lies in."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    findings = check_tree(root)
    print("\n".join(findings) or f"ok: {len(FLOORS)} wheels, hub and spoke, no circle, nothing undeclared")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
