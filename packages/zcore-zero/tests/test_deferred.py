"""Inside `zero.Init` a model takes no memory, and afterwards has the values of plain construction, bit for bit."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import MODELS
from torch import Tensor, nn
from torch.nn import init

from zcore import zero
from zcore.core.errors import StateError
from zcore.core.mesh import build_mesh
from zcore.zero.deferred import SMALL_NUMEL, Recording, deferred_init, recording_of

Ranks = Callable[..., Any]


class Initialised(nn.Module):
    """The initialisers that networks are built with, each on a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name, act in {
            "uniform": init.uniform_,
            "normal": init.normal_,
            "trunc_normal": init.trunc_normal_,
            "constant": lambda weight: init.constant_(weight, 0.3),
            "eye": init.eye_,
            "xavier_uniform": init.xavier_uniform_,
            "xavier_normal": init.xavier_normal_,
            "kaiming_uniform": init.kaiming_uniform_,
            "kaiming_normal": init.kaiming_normal_,
            "orthogonal": init.orthogonal_,
        }.items():
            weight = nn.Parameter(torch.empty(7, 11))
            act(weight)
            self.register_parameter(name, weight)


class Edited(nn.Module):
    """Weights that a constructor computes with, overwrites in part, ties and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=3)
        self.inner = nn.Linear(16, 300)
        self.outer = nn.Linear(300, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.copied = copy.deepcopy(self.inner)
        self.apply(self._initialize)
        with torch.no_grad():
            self.inner.weight[5:9].mul_(3)
            self.inner.weight[:, 2] = self.inner.bias[0]
            self.outer.weight.copy_(self.inner.weight.t() / math.sqrt(2))
            self.outer.bias.add_(self.inner.weight.mean())
        self.inner.weight.data = self.inner.weight.data * 2
        self.scale = nn.Parameter(torch.randn(3, 3) * 0.1)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.half = nn.Linear(4, 4).to(torch.bfloat16)
        self.ones = nn.Parameter(torch.ones(SMALL_NUMEL + 1))
        self.lists = nn.ParameterList([torch.rand(2) for _ in range(3)])

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)


class Branching(nn.Module):
    """A constructor that looks at values, and draws as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 4)]
        self.first = nn.Linear(20, 20)
        if self.first.weight.abs().max() > 0.1:
            init.zeros_(self.first.bias)
        self.drawn = torch.rand(1).item()
        self.second = nn.Linear(20, 20)
        self.second.weight.data = self.second.weight.data[torch.randperm(20)]
        self.mean = float(self.second.weight.detach().mean())


class Buffered(nn.Module):
    """Buffers: large, small, drawn, integer, not persistent, of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(300, 300)))
        self.register_buffer("drawn", torch.randn(5))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("table", torch.arange(SMALL_NUMEL + 5).view(-1, 1) * torch.ones(1, 2), persistent=False)
        positions, rates = torch.arange(40).unsqueeze(1), torch.exp(torch.arange(0, 8, 2) * -0.1)
        sinusoids = torch.zeros(40, 8)
        sinusoids[:, 0::2], sinusoids[:, 1::2] = torch.sin(positions * rates), torch.cos(positions * rates)
        self.register_buffer("sinusoids", sinusoids)
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(6, 7, num_layers=2), nn.MultiheadAttention(8, 2)
        self.conv, self.bilinear = nn.Conv2d(2, 3, 3), nn.Bilinear(3, 4, 5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    **{each.__name__: each for each in (Initialised, Edited, Branching, Buffered, Recurrent)},
}


def build_plain(name: str) -> tuple[nn.Module, Tensor]:
    """The model, and what the generator gives next."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    return model, torch.rand(3)


def build_deferred(name: str) -> tuple[nn.Module, Tensor, Recording]:
    torch.manual_seed(0)
    with deferred_init() as recording:
        model = BUILDERS[name]()
    return model, torch.rand(3), recording


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not persistent too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def real(model: nn.Module, tensor: Tensor, name: str) -> Tensor:
    return recording_of(model, tensor, name).materialize(tensor) if tensor.is_meta else tensor


@pytest.mark.parametrize("name", BUILDERS)
def test_deferred_tensors_have_the_values_of_plain_construction(name: str) -> None:
    plain, _ = build_plain(name)
    deferred, _, _ = build_deferred(name)
    expected, found = tensors_of(plain), tensors_of(deferred)
    assert list(found) == list(expected)
    for key, value in expected.items():
        actual = real(deferred, found[key], key)
        assert (actual.dtype, actual.shape, actual.stride()) == (value.dtype, value.shape, value.stride()), key
        assert torch.equal(actual, value), key


@pytest.mark.parametrize("name", BUILDERS)
def test_values_do_not_depend_on_what_is_asked_first_or_twice(name: str) -> None:
    deferred, _, _ = build_deferred(name)
    found = {key: value for key, value in tensors_of(deferred).items() if value.is_meta}
    in_order = {key: real(deferred, value, key) for key, value in found.items()}
    for key in reversed(found):
        assert torch.equal(real(deferred, found[key], key), in_order[key]), key


@pytest.mark.parametrize("name", BUILDERS)
def test_the_generator_is_left_where_plain_construction_leaves_it(name: str) -> None:
    _, expected = build_plain(name)
    deferred, found, _ = build_deferred(name)
    assert torch.equal(found, expected)
    state = torch.get_rng_state()
    for key, value in tensors_of(deferred).items():
        real(deferred, value, key)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", BUILDERS)
def test_no_parameter_has_memory_and_large_constants_have_none(name: str) -> None:
    deferred, _, _ = build_deferred(name)
    for key, value in tensors_of(deferred).items():
        assert value.is_meta or value.numel() <= SMALL_NUMEL, key
    drawn = [param for param in deferred.parameters() if param.numel() > 64]
    assert all(param.is_meta for param in drawn)


def test_what_a_constructor_reads_is_what_it_would_be() -> None:
    plain, _ = build_plain("Branching")
    deferred, _, _ = build_deferred("Branching")
    for attribute in ("rates", "drawn", "mean"):
        assert getattr(deferred, attribute) == getattr(plain, attribute)


def test_ties_and_copies_are_kept() -> None:
    deferred, _, _ = build_deferred("Edited")
    assert deferred.head.weight is deferred.embed.weight
    assert deferred.copied.weight is not deferred.inner.weight
    assert deferred.copied.weight.requires_grad


def test_frozen_parameters_stay_frozen() -> None:
    deferred, _, _ = build_deferred("odd")
    plain, _ = build_plain("odd")
    assert [param.requires_grad for param in deferred.parameters()] == [
        param.requires_grad for param in plain.parameters()
    ]


# What constructors do to one weight.


def given_to_a_slice() -> Tensor:
    bias = torch.rand(12)
    bias[3:6] = 1.0  # the forget gates of an LSTM
    return bias


def given_to_listed_rows() -> Tensor:
    weight = torch.rand(6, 4)
    weight[torch.tensor([1, 4])] = 0
    return weight


def given_to_a_mask() -> Tensor:
    weight = torch.randn(6, 4)
    weight[weight > 0] = 0
    return weight


def drawn_from_another_generator() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, generator=generator) + torch.empty(5).uniform_(generator=generator)


def drawn_in_another_default_dtype() -> Tensor:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return nn.Linear(5, 5).weight + torch.randn(5, 5)
    finally:
        torch.set_default_dtype(torch.float32)


def drawn_from_another_seed() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return torch.randn(5)


def rejected_until_small() -> Tensor:
    weight = torch.randn(20)
    while (weight.abs() > 1).any():
        weight = torch.where(weight.abs() > 1, torch.randn(20), weight)
    return weight


def in_pieces() -> Tensor:
    weight = torch.empty(6, 4)
    for piece in weight.chunk(3):
        init.orthogonal_(piece)
    return weight


def from_a_list_of_numbers() -> Tensor:
    return torch.tensor([math.sin(number) for number in torch.randn(8).tolist()])


def loaded() -> Tensor:
    linear = nn.Linear(3, 3)
    linear.load_state_dict({key: value + 2 for key, value in linear.state_dict().items()})
    return linear.weight


def by_its_own_mean() -> Tensor:
    weight = torch.randn(6, 4)
    return weight - weight[weight > 0].mean() + float(weight.numpy().max())


def a_small_constant_given_drawn_numbers() -> Tensor:
    weight = torch.zeros(6, 4)
    weight[1:3] = torch.rand(2, 4)
    weight.add_(torch.rand(6, 4))
    torch.mul(torch.rand(4), 2, out=weight[0])
    return weight


def built_on_meta_and_given_memory() -> Tensor:
    with torch.device("meta"):
        linear = nn.Linear(5, 5)
    return init.normal_(torch.empty_like(linear.weight, device="cpu"))


def drawn_around_drawn_numbers() -> Tensor:
    return torch.normal(torch.rand(5), torch.rand(5)) + torch.bernoulli(torch.rand(5))


def after_a_thousand_steps() -> Tensor:
    weight = torch.randn(4)
    for _ in range(1000):
        weight = weight * 1.001
    return weight


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "a number given to a slice": given_to_a_slice,
    "a number given to listed rows": given_to_listed_rows,
    "a number given to a mask": given_to_a_mask,
    "masked_fill": lambda: (weight := torch.randn(6, 4)).masked_fill_(weight > 0, 0),
    "sparse_": lambda: init.sparse_(torch.empty(7, 11), 0.5),
    "dirac_": lambda: init.dirac_(torch.empty(4, 4, 3)),
    "another generator": drawn_from_another_generator,
    "another default dtype": drawn_in_another_default_dtype,
    "another seed": drawn_from_another_seed,
    "drawn again until small": rejected_until_small,
    "piece by piece": in_pieces,
    "from a list of numbers": from_a_list_of_numbers,
    "load_state_dict": loaded,
    "by values picked with a mask": by_its_own_mean,
    "a small constant given drawn numbers": a_small_constant_given_drawn_numbers,
    "built on meta and given memory": built_on_meta_and_given_memory,
    "drawn around drawn numbers": drawn_around_drawn_numbers,
    "a thousand steps": after_a_thousand_steps,
    "rows in random order": lambda: torch.randn(20, 3)[torch.randperm(20)],
    "a factor of a decomposition": lambda: torch.linalg.svd(torch.randn(6, 6))[0],
    "a view of another layout": lambda: torch.randn(6, 4).t(),
    "stacked": lambda: torch.stack([nn.Linear(3, 3).weight.detach() for _ in range(3)]),
    "like another": lambda: torch.randn_like(torch.empty(5)) + torch.bernoulli(torch.full((5,), 0.5)),
    "an inverse error function": lambda: torch.empty(5).uniform_(-1, 1).erfinv_().mul_(2).clamp_(-1, 1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_has_its_value_whatever_the_constructor_does(name: str) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        expected, next_draw = WEIGHTS[name](), torch.rand(3)
        torch.manual_seed(0)
        with deferred_init() as recording:
            deferred = WEIGHTS[name]()
        assert torch.equal(torch.rand(3), next_draw)
        found = recording.materialize(deferred) if deferred.is_meta else deferred
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_what_is_read_later_may_lie_anywhere_in_its_memory() -> None:
    with deferred_init() as recording, torch.no_grad():
        read = recording.later(lambda: torch.arange(10.0)[4:8], shape=(4,), dtype=torch.float32)
        joined = torch.cat([read.view(2, 2)[1], read * 2])
    assert recording.materialize(joined).tolist() == [6, 7, 8, 10, 12, 14]
    assert recording.materialize(read[1:3]).tolist() == [5, 6]


def test_a_model_on_meta_from_elsewhere_is_refused_with_what_to_do() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(StateError, match=r"weight is on the meta device.*with zero\.Init\(\)"):
        recording_of(model, model.weight, "weight")


def test_what_is_added_on_meta_after_the_block_is_refused_with_what_to_do() -> None:
    with zero.Init():
        model = nn.Sequential(nn.Linear(2, 2))
    model.append(nn.Linear(2, 2, device=model[0].weight.device))  # as adapters and resized embeddings do
    with pytest.raises(StateError, match=r"1\.weight has no values.*inside that same block"):
        recording_of(model, model[1].weight, "1.weight")


def test_a_tensor_without_values_is_refused_where_a_weight_is_computed_from_it() -> None:
    with zero.Init(), pytest.raises(StateError, match="without values is used inside"):
        torch.randn(3).copy_(torch.empty(3, device="meta"))


def test_init_can_be_disabled() -> None:
    with zero.Init(enabled=False):
        assert not nn.Linear(2, 2).weight.is_meta


def test_nothing_is_left_behind_by_an_exception_inside() -> None:
    with pytest.raises(ZeroDivisionError), zero.Init():
        1 / 0  # noqa: B018
    assert not nn.Linear(2, 2).weight.is_meta


def shard_deferred(names: list[str]) -> list[str]:
    """Every model, built deferred and sharded in each row: what differs from plain construction."""
    wrong = []
    mesh = build_mesh(dp=-1)
    for name in names:
        plain, next_draw = build_plain(name)
        for stage in (0, 3):
            torch.manual_seed(0)
            with zero.Init():
                model = BUILDERS[name]()
            zero.shard(model, mesh, stage=stage, options=zero.ShardingOptions(small_numel=20))
            if not torch.equal(torch.rand(3), next_draw):
                wrong.append(f"{name} stage {stage}: generator")
            found = zero.consolidated_state_dict(model, rank=None)
            expected = plain.state_dict()
            if list(found) != list(expected):
                wrong.append(f"{name} stage {stage}: names")
            wrong += [f"{name} stage {stage}: {key}" for key in found if not torch.equal(found[key], expected[key])]
            for key, buffer in model.named_buffers():
                if buffer.is_meta or not torch.equal(buffer, plain.get_buffer(key)):
                    wrong.append(f"{name} stage {stage}: buffer {key}")
    return wrong


def test_a_deferred_model_is_sharded_with_the_weights_of_plain_construction(ranks: Ranks) -> None:
    assert ranks(2, shard_deferred, list(BUILDERS)) == [[], []]
