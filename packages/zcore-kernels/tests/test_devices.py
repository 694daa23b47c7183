"""What tests on a GPU stand on, tried without one."""

import warnings

import pytest
import torch
from devices import without_waits


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that torch is given; it warns at the first, once it is set."""
    given: list[str] = []

    def set_mode(mode: str) -> None:
        given.append(mode)
        if len(given) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature and ...", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return given


def test_torch_may_warn_of_its_prototype_and_the_mode_ends_with_what_it_is_for(modes: list[str]) -> None:
    with without_waits():
        assert modes == ["error"]
    assert modes == ["error", "default"]


def test_the_mode_ends_where_something_waits(modes: list[str]) -> None:
    with pytest.raises(RuntimeError, match="a wait"), without_waits():
        raise RuntimeError("a wait")
    assert modes == ["error", "default"]


def test_other_warnings_are_not_hidden(modes: list[str]) -> None:
    with pytest.raises(UserWarning, match="another"), without_waits():
        warnings.warn("another", UserWarning, stacklevel=2)
    assert modes == ["error", "default"]
