"""The default store keeps the very tensors it is given."""

from collections.abc import Callable

import pytest
import torch

from zcore.core.errors import StateError
from zcore.core.store import DeviceStore, TensorStore


def test_a_fetched_tensor_is_the_one_that_was_put() -> None:
    store: TensorStore = DeviceStore()
    shard = torch.arange(7)
    store.put("layers.0", shard)
    store.prefetch(["layers.0"])
    fetch = store.fetch("layers.0")
    assert fetch.wait() is fetch.wait() is shard
    assert "layers.0" in store
    assert store.stored_bytes() == 7 * 8


def test_putting_again_replaces_and_dropping_forgets() -> None:
    store = DeviceStore()
    store.put("a", torch.zeros(123))
    store.put("a", torch.zeros(1))
    assert store.stored_bytes() == 4
    store.drop("a")
    assert "a" not in store
    assert store.stored_bytes() == 0


@pytest.mark.parametrize(
    "use", [lambda store: store.fetch("b"), lambda store: store.drop("b"), lambda store: store.prefetch(["a", "b"])]
)
def test_a_key_that_was_never_put_is_named(use: Callable[[DeviceStore], object]) -> None:
    store = DeviceStore()
    store.put("a", torch.zeros(0))
    with pytest.raises(StateError, match=r"Nothing is stored under 'b'; put it first. Stored: \['a'\]"):
        use(store)
