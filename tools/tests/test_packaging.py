"""Every wheel carries what a distribution needs, and what all of them share is the same everywhere."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEELS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.name)
def test_a_wheel_carries_license_readme_changelog_and_the_mark_of_its_types(wheel: Path) -> None:
    assert (wheel / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (wheel / "src/zcore" / wheel.name.removeprefix("zcore-") / "py.typed").exists()
    assert (wheel / "README.md").read_text().startswith(f"# {wheel.name}\n")
    assert (wheel / "CHANGELOG.md").read_text().startswith("# Changelog\n")


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.name)
def test_all_wheels_ask_for_the_same_python_torch_and_core(wheel: Path) -> None:
    project = tomllib.loads((wheel / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["requires-python"]) == (wheel.name, ">=3.11")
    assert set(project["dependencies"]) >= ({"torch>=2.9"} if wheel.name == "zcore-core" else {"zcore-core>=0.1.0"})
