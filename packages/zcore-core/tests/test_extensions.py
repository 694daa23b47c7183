"""Wheels find each other by name; what is absent or broken says which wheel and what to do."""

import sys
from collections.abc import Callable

import pytest

from zcore.core.errors import NotInstalledError
from zcore.core.extensions import CONTRACTS, WHEELS, BrokenExtensionError, installed, load, offered


def test_an_offer_is_found_by_name_and_loaded_only_when_asked_for(add_wheel: Callable[..., None]) -> None:
    add_wheel("zcore-fake", "1.2", {"zcore.stores": {"tape": "tape_module:Tape"}}, tape_module="Tape = 'reel'")
    (offer,) = (offer for offer in offered("zcore.stores") if offer.name == "tape")
    assert (offer.wheel, offer.version) == ("zcore-fake", "1.2")
    assert "tape_module" not in sys.modules
    assert load("zcore.stores", "tape") == "reel"


def test_a_wheel_that_fails_to_load_is_named_with_the_cause(add_wheel: Callable[..., None]) -> None:
    add_wheel(
        "zcore-broken", "0.3", {"zcore.stores": {"tape": "torn"}}, torn="raise OSError('libtape.so: no such file')"
    )
    with pytest.raises(BrokenExtensionError) as caught:
        load("zcore.stores", "tape")
    message = str(caught.value)
    assert "zcore-broken 0.3 offers `tape` in zcore.stores" in message
    assert "OSError: libtape.so: no such file" in message
    assert "pip uninstall zcore-broken" in message
    assert isinstance(caught.value.__cause__, OSError)


def test_one_name_offered_by_two_wheels_is_refused(add_wheel: Callable[..., None]) -> None:
    add_wheel("zcore-one", "1", {"zcore.stores": {"tape": "one"}}, one="")
    add_wheel("zcore-two", "1", {"zcore.stores": {"tape": "two"}}, two="")
    with pytest.raises(BrokenExtensionError, match="offered by both zcore-one and zcore-two"):
        load("zcore.stores", "tape")


@pytest.mark.parametrize(("group", "wheel"), [(group, contract.wheel) for group, contract in CONTRACTS.items()])
def test_asking_for_what_is_not_installed_promises_nothing(group: str, wheel: str | None) -> None:
    with pytest.raises(NotInstalledError, match=f"No installed wheel offers `nonesuch` in {group}") as caught:
        load(group, "nonesuch")
    advised = f"pip install {wheel}" in str(caught.value)
    assert advised == bool(wheel and WHEELS[wheel].holds_work and not installed(wheel))
    assert ("holds nothing yet" in str(caught.value)) == bool(wheel and not WHEELS[wheel].holds_work)


def test_every_contract_names_a_wheel_of_the_table() -> None:
    assert {contract.wheel for contract in CONTRACTS.values()} - {None} <= WHEELS.keys()
    assert len(WHEELS) == 7
