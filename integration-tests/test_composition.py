"""Whatever set of wheels is installed forms one house: they import together, and nothing of the others is there.

The matrix session runs this with each of its combinations, the tests session with all wheels.
"""

import subprocess
import sys
from importlib.metadata import distributions, entry_points, version
from importlib.util import find_spec

import pytest

import zcore

NAMES = ("core", "comm", "zero", "pipe", "offload", "infer", "kernels")
DISTRIBUTIONS = {distribution.name for distribution in distributions()}
INSTALLED = tuple(name for name in NAMES if f"zcore-{name}" in DISTRIBUTIONS)


@pytest.mark.parametrize("names", [INSTALLED, INSTALLED[::-1]], ids=["upward", "downward"])
def test_all_installed_wheels_import_in_one_process(names: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-c", "".join(f"import zcore.{name}\n" for name in names)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_is_there_exactly_if_its_wheel_is(name: str) -> None:
    assert (find_spec(f"zcore.{name}") is not None) == (name in INSTALLED)


@pytest.mark.parametrize("name", INSTALLED)
def test_every_installed_wheel_says_its_version(name: str) -> None:
    assert [int(part) for part in version(f"zcore-{name}").split(".")[:2]]


def test_zcore_is_a_namespace_that_no_wheel_closes() -> None:
    assert getattr(zcore, "__file__", None) is None


@pytest.mark.parametrize(
    "group",
    [f"zcore.{name}" for name in ("collectives", "recorders", "stores", "ops", "optimizers", "commands", "sinks")],
)
def test_what_the_wheels_offer_each_other_loads(group: str) -> None:
    for entry_point in entry_points(group=group):
        assert entry_point.load() is not None
