"""Feeds check_layers small trees, each with one fault, and reads the one line it says about it."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "check_layers.py"
spec = importlib.util.spec_from_file_location("check_layers", SCRIPT)
assert spec is not None
assert spec.loader is not None
check_layers = importlib.util.module_from_spec(spec)
sys.modules["check_layers"] = check_layers  # dataclasses look their module up
spec.loader.exec_module(check_layers)

ZERO = "packages/zcore-zero/src/zcore/zero"
CORE = "packages/zcore-core/src/zcore/core"
SOUND = {
    f"{CORE}/__init__.py": "",
    f"{CORE}/mesh.py": "import torch\nfrom zcore.core.errors import MeshError",
    f"{CORE}/errors.py": "import enum",
    f"{CORE}/testing.py": "import pytest",
    f"{ZERO}/__init__.py": "from zcore.zero.engine import initialize",
    f"{ZERO}/engine.py": "from zcore.core import mesh\nfrom zcore.zero import layout\ndef plot(): import rich",
    f"{ZERO}/layout.py": "import typing\nif typing.TYPE_CHECKING:\n    import rich",
}
PYPROJECT = """
    [project]
    dependencies = {dependencies}
    optional-dependencies = {{ shiny = ["Rich>=13"], testing = ["pytest"] }}
    [tool.zcore.behind-extra]
    "zcore.core.testing" = "testing"
"""


def check(root: Path, changes: dict[str, str]) -> list[str]:
    """Write the sound tree with `changes` and return the findings."""
    for name in check_layers.FLOORS:
        dependencies = ["torch>=2.9"] if name == "core" else ["zcore-core >=0.1", "torch[x]; os_name != 'nt'"]
        path = root / f"packages/zcore-{name}/pyproject.toml"
        path.parent.mkdir(parents=True)
        path.write_text(dedent(PYPROJECT).format(dependencies=dependencies))
    for file, text in (SOUND | changes).items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    findings: list[str] = check_layers.check_tree(root)
    return findings


def test_a_sound_tree_has_no_finding(tmp_path: Path) -> None:
    assert check(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (f"{ZERO}/a.py", "import zcore.pipe", ":1: zcore.zero imports zcore.pipe; feature wheels meet through"),
        (f"{ZERO}/a.py", "def f():\n    from zcore import comm", ":2: zcore.zero imports zcore.comm; feature wheels"),
        (
            f"{ZERO}/a.py",
            "import importlib\nimportlib.import_module('zcore.offload.aio')",
            ":2: zcore.zero imports zcore",
        ),
        (
            f"{ZERO}/a.py",
            "from zcore.infer.llm import LLM",
            ":1: zcore.zero imports upward, from floor 3 to floor 4: zcore.infer.",
        ),
        (
            f"{CORE}/a.py",
            "from zcore.zero import engine",
            ":1: zcore.core imports upward, from floor 1 to floor 3: zcore.zero.",
        ),
        (
            f"{ZERO}/a.py",
            "from ...pipe import stage",
            ":1: relative import ...pipe.stage; write the module's whole name",
        ),
        (
            f"{ZERO}/a.py",
            "from numpy import linalg, random",
            ":1: numpy comes from numpy, which packages/zcore-zero/pyproject.toml does",
        ),
        (
            f"{CORE}/a.py",
            "def f(): import yaml",
            ":1: yaml comes from pyyaml, which packages/zcore-core/pyproject.toml does",
        ),
        (
            f"{ZERO}/a.py",
            "try:\n    import rich\nfinally: pass",
            ":2: only an extra brings rich; import it where it is",
        ),
        (
            f"{CORE}/a.py",
            "import zcore.core.testing",
            ":1: zcore.core.testing is behind the extra testing; import it where",
        ),
        (f"{ZERO}/../__init__.py", "", "/__init__.py: zcore is a namespace that the wheels share; delete this file."),
        (f"{ZERO}/../shared.py", "", ": lies outside zcore.zero, the one package of this wheel."),
        (f"{ZERO}/utils.py", "", ": utils says nothing about what is inside; name the idea."),
        (f"{ZERO}/misc/a.py", "", ": misc says nothing about what is inside; name the idea."),
    ],
)
def test_a_fault_is_one_readable_line(tmp_path: Path, file: str, source: str, expected: str) -> None:
    (finding,) = check(tmp_path, {file: source})
    assert expected in finding
    assert finding.startswith("packages/")


def test_a_circle_names_the_modules_on_it(tmp_path: Path) -> None:
    (finding,) = check(tmp_path, {f"{ZERO}/layout.py": "def late(): import zcore.zero.engine"})
    assert "packages/zcore-zero: modules import in a circle: zcore.zero." in finding
    assert {"zcore.zero.engine", "zcore.zero.layout"} <= set(finding.removesuffix(".").split())


@pytest.mark.parametrize("where", ["dependencies", "optional-dependencies.shiny"])
def test_a_wheel_that_drags_in_another_is_found(tmp_path: Path, where: str) -> None:
    text = f"[project]\nversion = '1'\n{where} = ['zcore-core', 'zcore_comm>=0.1']\n"
    wheel = tmp_path / "zcore-zero"
    wheel.mkdir()
    (wheel / "pyproject.toml").write_text(text)
    (finding,) = check_layers.check_declarations(check_layers.read_wheel(wheel))
    assert finding.endswith(" drags in zcore-comm; a feature wheel depends on zcore-core only.")


def test_a_missing_wheel_is_found(tmp_path: Path) -> None:
    assert len(check_layers.check_tree(tmp_path)) == 7


def test_the_command_exits_with_1_and_prints_the_findings(tmp_path: Path) -> None:
    check(tmp_path, {f"{ZERO}/a.py": "import zcore.pipe"})
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
