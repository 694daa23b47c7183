"""round_stochastic and copy_stochastic: right on average, and the same wherever it is done."""

import pytest
import torch
from devices import DEVICES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_inputs import equal_bits, moved, on_threads, values_of
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.copy_stochastic import copy_stochastic
from zcore.kernels.ops.copy_stochastic import reference as copy_reference
from zcore.kernels.ops.noise import noise_at
from zcore.kernels.ops.round_stochastic import reference, round_stochastic

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=200)
@given(
    numel=st.integers(0, 700),
    start=st.integers(0, 5),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.sampled_from([0, 3, 2**32 - 100, 2**40]),
    num_special=st.integers(0, 9),
)
def test_it_is_what_the_reference_says(
    *, device: str, numel: int, start: int, seed: int, offset: int, num_special: int
) -> None:
    values = values_of(numel + start, seed=seed % 1000, num_special=num_special)[start:]
    expected, there = reference(values, seed=seed, offset=offset), moved(values, device)
    assert equal_bits(round_stochastic(there, seed=seed, offset=offset).cpu(), expected)
    target, other = torch.zeros(2, numel + start, dtype=torch.bfloat16, device=device)[:, start:].unbind()
    copy_stochastic(target, there, seed=seed, offset=offset)
    copy_reference(other, there, seed=seed, offset=offset)
    assert equal_bits(target.cpu(), expected) and equal_bits(other.cpu(), expected)


def test_the_mean_of_many_roundings_is_the_number_in_double() -> None:
    values, rounds = values_of(512, seed=1), 2000
    total = torch.zeros(512, dtype=torch.float64)
    for seed in range(rounds):
        total += round_stochastic(values, seed=seed)
    gap = 2.0 ** (values.double().abs().log2().floor() - 7)
    assert bool(((total / rounds - values).abs() <= 5 * 0.5 * gap / rounds**0.5).all())


def test_a_sum_of_small_steps_is_kept() -> None:
    weights, steps = torch.ones(4096, dtype=torch.bfloat16), 1000
    for step in range(steps):  # each a 64th of what bf16 can show at 1: to the nearest, all are lost
        copy_stochastic(weights, weights.float() + 2.0**-13, seed=step)
    assert abs(weights.double().mean().item() - (1 + steps * 2.0**-13)) < 2e-3


def test_what_bf16_holds_and_what_is_not_finite_stays() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert equal_bits(round_stochastic(every.float(), seed=3), every)
    nan_of_all_ones = torch.full((100,), -1, dtype=torch.int32).view(torch.float32)
    assert bool(round_stochastic(nan_of_all_ones, seed=3).isnan().all())


def test_seeds_and_neighbours_have_nothing_to_do_with_each_other() -> None:
    numel = 1 << 16
    one, two = (noise_at(0, numel, seed=seed, device=CPU).double() / 2**16 - 0.5 for seed in (1, 2))
    shifted = noise_at(1, numel, seed=1, device=CPU).double() / 2**16 - 0.5
    deviation = (1 / 12) / numel**0.5  # of the mean of a product of two that are uniform
    for other in (two, shifted):
        assert abs((one * other).mean().item()) < 5 * deviation
    counts = torch.histc(one, bins=256, min=-0.5, max=0.5)
    chi_squared = ((counts - numel / 256) ** 2 / (numel / 256)).sum().item()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def test_the_number_of_threads_changes_nothing_and_neither_do_parts() -> None:
    values, results = values_of(200_001, seed=2), []
    for count in (1, 2):
        with on_threads(count):
            results.append(round_stochastic(values, seed=4))
    parts = [round_stochastic(values[:777], seed=4), round_stochastic(values[777:], seed=4, offset=777)]
    assert torch.equal(*results) and torch.equal(results[0], torch.cat(parts))


def test_it_keeps_the_shape() -> None:
    assert round_stochastic(torch.zeros(2, 3), seed=1).shape == (2, 3)


@needs_cuda
def test_a_gpu_has_the_bits_of_the_cpu() -> None:
    values = values_of(1_000_003, seed=2, num_special=9)
    there, here = (round_stochastic(values.to(device), seed=4, offset=2**33 - 500_000) for device in ("cuda", "cpu"))
    assert equal_bits(there.cpu(), here)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_knows_the_ops(device: str) -> None:
    values = values_of(77, seed=1).to(device)
    torch.library.opcheck(torch.ops.zcore.round_stochastic.default, (values,), {"seed": 3})
    target = torch.zeros(77, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(torch.ops.zcore.copy_stochastic.default, (target, values), {"seed": 3, "offset": 5})


def test_the_registry_serves_the_compiled_ops() -> None:
    registered = ops.implementations()
    for op in ("round_stochastic", "copy_stochastic"):
        assert [item.source for item in registered[op]] == ["cpp", "cuda", "reference"]


ONES, TARGET = torch.ones(64), torch.ones(64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("target", "values", "offset", "error", "message"),
    [
        (TARGET, ONES.half(), 0, ConfigError, "values is torch.float16; expected torch.float32"),
        (TARGET.half(), ONES, 0, ConfigError, "target is torch.float16; expected torch.bfloat16"),
        (TARGET[1:], ONES, 0, LayoutError, "target has 63 elements; expected 64"),
        (TARGET, ONES.to("meta"), 0, LayoutError, "values is on meta; expected the CPU"),
        (TARGET.view(8, 8).t(), ONES, 0, LayoutError, "target, of shape (8, 8), has strides (1, 8)"),
        (TARGET, ONES, -1, ConfigError, "offset is -1"),
    ],
)
def test_it_refuses_by_name(target: Tensor, values: Tensor, offset: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        copy_stochastic(target, values, seed=1, offset=offset)
    assert message in str(caught.value) and str(caught.value).startswith("copy_stochastic: ")
