"""round_with_noise: the rounding of round_stochastic, with noise from elsewhere."""

import pytest
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_inputs import equal_bits, moved, on_threads, values_of
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.noise import noise_at
from zcore.kernels.ops.round_stochastic import round_stochastic
from zcore.kernels.ops.round_with_noise import reference, round_with_noise

CPU = torch.device("cpu")


def noise_of(numel: int, *, seed: int) -> Tensor:
    return torch.randint(0, 1 << 16, (numel,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=100)
@given(numel=st.integers(0, 700), start=st.integers(0, 5), seed=st.integers(0, 999), num_special=st.integers(0, 9))
def test_it_is_what_the_reference_says(*, device: str, numel: int, start: int, seed: int, num_special: int) -> None:
    values = values_of(numel + start, seed=seed, num_special=num_special)[start:]
    noise = noise_of(numel + start, seed=seed)[start:]
    assert equal_bits(round_with_noise(*moved((values, noise), device)).cpu(), reference(values, noise))


def test_with_the_noise_of_the_counter_it_is_round_stochastic() -> None:
    values = values_of(1001, seed=1, num_special=5)
    noise = noise_at(7, 1001, seed=3, device=CPU)
    assert equal_bits(round_with_noise(values, noise), round_stochastic(values, seed=3, offset=7))


def test_the_number_of_threads_changes_nothing() -> None:
    values, noise, results = values_of(200_001, seed=2), noise_of(200_001, seed=2), []
    for count in (1, 2):
        with on_threads(count):
            results.append(round_with_noise(values, noise))
    assert torch.equal(*results)


def test_torch_and_the_registry_know_it() -> None:
    operands = (values_of(77, seed=1), noise_of(77, seed=1))
    torch.library.opcheck(torch.ops.zcore.round_with_noise.default, operands)
    assert [item.source for item in ops.implementations()["round_with_noise"]] == ["cpp", "cuda", "reference"]


ONES, NOISE = torch.ones(64), torch.ones(64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("values", "noise", "error", "message"),
    [
        (ONES.half(), NOISE, ConfigError, "values is torch.float16; expected torch.float32"),
        (ONES, NOISE.long(), ConfigError, "noise is torch.int64; expected torch.int32"),
        (ONES, NOISE[1:], LayoutError, "noise has 63 elements; expected 64"),
        (ONES, NOISE.to("meta"), LayoutError, "noise is on meta; expected the CPU"),
        (ONES, NOISE.view(8, 8).t(), LayoutError, "noise, of shape (8, 8), has strides (1, 8)"),
    ],
)
def test_it_refuses_by_name(values: Tensor, noise: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        round_with_noise(values, noise)
    assert message in str(caught.value) and str(caught.value).startswith("round_with_noise: ")
