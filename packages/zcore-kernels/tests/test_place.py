"""zcore-kernels has its place in the house: it installs, has a version, and imports alone and without effects."""

import subprocess
import sys
from importlib.metadata import requires, version

# A fresh interpreter: this one has already imported what pytest and its plugins need.
IMPORT_AND_LIST = "import sys, zcore.kernels; print(*sorted(sys.modules))"


def test_the_distribution_says_its_version() -> None:
    assert version("zcore-kernels")


def test_the_import_brings_neither_torch_nor_another_feature_wheel() -> None:
    command = [sys.executable, "-c", IMPORT_AND_LIST]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "zcore.kernels" in modules
    assert "torch" not in modules
    assert [
        name for name in modules if name.startswith("zcore.") and name.split(".")[1] not in {"core", "kernels"}
    ] == []


def test_of_all_zcore_wheels_it_requires_only_the_core() -> None:
    assert [line for line in requires("zcore-kernels") or [] if line.startswith("zcore")] == ["zcore-core>=0.1.0"]
