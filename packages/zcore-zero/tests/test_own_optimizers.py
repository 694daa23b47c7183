"""Lion, LAMB and Muon do what their papers say, and on fragments in every row what they do on whole parameters."""

import copy
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from parity import (
    Recipe,
    beyond,
    bits_that_differ,
    build_engine,
    by_row,
    part_of,
    train_plain,
    train_rows,
)
from tiny_models import TinyModel, digest, settings, train_steps
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import ConfigError
from zcore.zero.optimizers.newton_schulz import newton_schulz
from zcore.zero.optimizers.spread import assign

Ranks = Callable[..., Any]
ROWS = tuple({"stage": stage} for stage in range(4))
HYBRIDS = tuple({"stage": stage, "shard_size": 2} for stage in (1, 3))  # two replicas of two shards, on 4 ranks


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,), (4, 6))]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(each.shape, generator=generator) for each in parameters()]


def steps_of(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], *, count: int = 5) -> list[Tensor]:
    for step in range(count):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach().clone() for param in params]


def test_a_copy_of_muon_steps_by_itself() -> None:
    params = parameters()
    steps_of(zero.Muon(params, lr=0.1), params, count=2)
    optimizer = zero.Muon(params, lr=0.1)
    copied = copy.deepcopy(optimizer)
    own = [param for group in copied.param_groups for param in group["params"]]
    by_shape = {tuple(param.shape): param for param in own}
    steps_of(copied, [by_shape[tuple(param.shape)] for param in params])
    expected = steps_of(optimizer, params)
    assert all(torch.equal(by_shape[tuple(value.shape)], value) for value in expected)


def lion_of_the_paper(*, lr: float, decay: float, betas: tuple[float, float]) -> list[Tensor]:
    values = [param.detach().double() for param in parameters()]
    averages = [torch.zeros_like(each) for each in values]
    for step in range(5):
        for value, average, grad in zip(values, averages, gradients(step), strict=True):
            mixed = betas[0] * average + (1 - betas[0]) * grad.double()
            value -= lr * (torch.sign(mixed) + decay * value)
            average.copy_(betas[1] * average + (1 - betas[1]) * grad.double())
    return values


def test_lion_is_algorithm_2_of_its_paper() -> None:
    params = parameters()
    found = steps_of(zero.Lion(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1), params)
    for each, expected in zip(found, lion_of_the_paper(lr=0.01, decay=0.1, betas=(0.9, 0.95)), strict=True):
        torch.testing.assert_close(each.double(), expected, rtol=1e-6, atol=1e-6)


def lamb_of_the_paper(
    *, lr: float, decay: float, betas: tuple[float, float], eps: float, low: float, high: float
) -> list[Tensor]:
    values = [param.detach().double() for param in parameters()]
    firsts, seconds = ([torch.zeros_like(each) for each in values] for _ in range(2))
    for step in range(5):
        for value, first, second, grad in zip(values, firsts, seconds, gradients(step), strict=True):
            first.copy_(betas[0] * first + (1 - betas[0]) * grad.double())
            second.copy_(betas[1] * second + (1 - betas[1]) * grad.double() ** 2)
            ratio = first / (1 - betas[0] ** (step + 1)) / ((second / (1 - betas[1] ** (step + 1))).sqrt() + eps)
            direction = ratio + decay * value
            value -= lr * (value.norm() / direction.norm()).clamp(low, high) * direction
    return values


@pytest.mark.parametrize(("low", "high"), [(0.01, 10.0), (0.5, 0.6)])
def test_lamb_is_algorithm_2_of_its_paper(low: float, high: float) -> None:
    params, hyper = parameters(), {"betas": (0.9, 0.95), "eps": 1e-6}
    found = steps_of(zero.Lamb(params, lr=0.01, weight_decay=0.1, min_coeff=low, max_coeff=high, **hyper), params)
    expected = lamb_of_the_paper(lr=0.01, decay=0.1, low=low, high=high, **hyper)
    for each, value in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), value, rtol=1e-5, atol=1e-6)


def test_lamb_steps_a_parameter_of_zeros_unscaled() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    zero.Lamb([param], lr=0.5).step()
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.5))


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 9)])
def test_newton_schulz_is_that_of_torch_to_the_bit_and_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    param = nn.Parameter(torch.zeros(shape))
    param.grad = matrix.clone()
    torch.optim.Muon([param], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    found = newton_schulz(matrix)
    assert torch.equal(torch.zeros(shape).add_(found, alpha=-sqrt(max(1.0, shape[0] / shape[1]))), param.detach())
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs_muon_and_adamw_to_the_bit(adjust: str) -> None:
    mine, theirs = parameters(), parameters()
    found = steps_of(
        zero.Muon(mine, lr=0.02, adam_lr=0.01, weight_decay=0.1, adjust_lr=adjust, betas=(0.9, 0.95), fused=True), mine
    )
    muon = torch.optim.Muon([each for each in theirs if each.ndim == 2], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW(
        [each for each in theirs if each.ndim != 2], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), fused=True
    )
    for step in range(5):
        for param, grad in zip(theirs, gradients(step), strict=True):
            param.grad = grad.clone()
        muon.step()
        adamw.step()
    assert [torch.equal(a, b) for a, b in zip(found, theirs, strict=True)] == [True] * 3


def test_muon_splits_groups_by_shape_and_tag_and_keeps_what_they_say() -> None:
    matrix, vector, tagged, kernel = (nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), (5, 6), (2, 3, 4)))
    tagged.use_muon = False  # type: ignore[attr-defined]
    optimizer = zero.Muon([{"params": [matrix, vector], "weight_decay": 0.5}, {"params": [tagged, kernel]}], lr=0.1)
    groups = [
        ([tuple(each.shape) for each in group["params"]], group["use_muon"], group["weight_decay"])
        for group in optimizer.param_groups
    ]
    assert groups == [([(3, 4)], True, 0.5), ([(4,)], False, 0.5), ([(2, 3, 4)], True, 0.0), ([(5, 6)], False, 0.0)]
    for each in (matrix, vector, tagged, kernel):
        each.grad = torch.randn_like(each)
    optimizer.step()
    assert optimizer.state[kernel].keys() == {"momentum_buffer"}
    assert optimizer.state[tagged].keys() == {"step", "exp_avg", "exp_avg_sq"}
    again = zero.Muon([{"params": [matrix, vector]}, {"params": [tagged, kernel]}], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    again.step()
    assert again.state[vector]["step"].item() == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: zero.Lion(parameters(), lr=-1.0), "Lion: lr is -1.0"),
        (lambda: zero.Lamb(parameters(), betas=(0.9, 1.0)), "Lamb: betas is"),
        (lambda: zero.Lamb(parameters(), min_coeff=2.0, max_coeff=1.0), "min_coeff is 2, above max_coeff"),
        (lambda: zero.Muon(parameters(), adjust_lr="best"), "adjust_lr is 'best'; expected one of original"),
        (lambda: zero.Muon(parameters(), momentum=1.5), "momentum is 1.5"),
        (lambda: zero.Muon([{"params": parameters(), "use_muon": True}]), r"parameter of shape \(5,\)"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@hypothesis.given(st.data(), st.integers(1, 9))
def test_the_work_on_matrices_is_shared(data: st.DataObject, num_ranks: int) -> None:
    costs = data.draw(st.lists(st.integers(1, 1000), max_size=30))
    held = [data.draw(st.lists(st.integers(0, 9), min_size=num_ranks, max_size=num_ranks)) for _ in costs]
    owners = assign(costs, held, num_ranks=num_ranks)
    assert owners == assign(list(costs), [tuple(each) for each in held], num_ranks=num_ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    if costs:
        assert max(loads) <= sum(costs) / num_ranks + max(costs)


LION = (("lr", 3e-3), ("weight_decay", 0.1))
LAMB = (("lr", 1e-2), ("eps", 1e-3), ("weight_decay", 0.1))
MUON = (("lr", 1e-2), ("adam_lr", 2e-3), ("weight_decay", 0.1))
RECIPES = {
    "Lion": Recipe("odd", steps=5, optimizer="Lion", hyper=LION, num_groups=2),
    "Lamb": Recipe("odd", steps=5, optimizer="Lamb", hyper=LAMB, num_groups=2),
    "Muon": Recipe("gpt", steps=5, optimizer="Muon", hyper=MUON),
    "Muon, odd": Recipe("odd", steps=5, optimizer="Muon", hyper=MUON, num_groups=2),
    "Muon, bf16": Recipe("gpt", steps=5, optimizer="Muon", hyper=MUON, compute=torch.bfloat16),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_steps_as_one_process_does(ranks: Ranks, name: str) -> None:
    recipe, rows = RECIPES[name], [*ROWS, *HYBRIDS]
    runs = by_row(ranks(4, train_rows, [(recipe, row) for row in rows]))
    plain = train_plain(recipe, parts=4)
    assert min(plain.losses) < plain.losses[0]
    for row, run in zip(rows, runs, strict=True):
        if name == "Lamb":  # its norms are sums over ranks
            assert beyond(run, plain, rtol=1e-6) == {}, row
        else:
            assert [each for each in bits_that_differ(run, plain) if each != "norms"] == [], row


def step_matrices(stage: int) -> tuple[dict[str, bool], int, int]:
    """Which parameters are matrices to Muon, and the bytes this rank sent for them in a step; of all matrices."""
    recipe = RECIPES["Muon"]
    engine = build_engine(recipe, stage=stage)
    chosen = {param.fqn: group["use_muon"] for group in engine.optimizer.param_groups for param in group["params"]}
    engine.backward(engine(**part_of(recipe.batch(0, 0), part=engine.dp_rank, parts=engine.dp_size)))
    traffic = engine.sharding.groups.reduce.traffic
    before = traffic.payload_bytes.copy()
    engine.step()
    sent = {op: count for op, count in (traffic.payload_bytes - before).items() if op != "all_reduce"}
    numel = sum(param.numel() for name, param in recipe.build().named_parameters() if chosen.get(name))
    return chosen, sent.get("send", 0) + sent.get("broadcast", 0), 2 * numel


def test_hidden_matrices_are_found_and_cross_to_their_rank_and_back_at_most_once(ranks: Ranks) -> None:
    for stage in (0, 3):
        seen = ranks(2, step_matrices, stage)
        chosen = seen[0][0]
        assert {name for name, is_matrix in chosen.items() if is_matrix} == {
            f"h.{block}.{part}.weight" for block in (0, 1) for part in ("qkv", "proj", "up", "down")
        }
        bytes_of_all = seen[0][2]
        assert 0 < sum(sent for _, sent, _ in seen) <= 2 * bytes_of_all


def continue_run(folder: str, name: str) -> None:
    optimizer = {"type": name, "params": {"lr": 0.01, "weight_decay": 0.1}}
    config = settings(3, optimizer=optimizer, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 9}})
    straight = zero.initialize(TinyModel(), config)
    train_steps(straight, range(3))
    straight.save_checkpoint(folder)
    continued = zero.initialize(TinyModel(seed=1), config)
    continued.load_checkpoint(folder)
    for engine in (straight, continued):
        train_steps(engine, range(3, 6))
    assert digest(straight) == digest(continued)
    assert len({group["lr"] for group in continued.optimizer.param_groups}) == 1


@pytest.mark.parametrize("name", ["lion", "LAMB", "Muon"])  # in DeepSpeed's spelling, whatever its capitals
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(ranks: Ranks, tmp_path: Any, name: str) -> None:
    ranks(2, continue_run, str(tmp_path), name)


def hand_over() -> list[str]:
    """The class, a function, and a loop of one's own."""
    digests = []
    for optimizer in (zero.Muon, lambda groups: zero.Muon(groups, lr=1e-3)):
        engine = zero.initialize(TinyModel(), settings(3, optimizer=None), optimizer=optimizer)
        train_steps(engine, range(3))
        digests.append(digest(engine))
    return digests


def test_muon_is_passed_like_any_optimizer(ranks: Ranks) -> None:
    by_class, by_function = ranks(2, hand_over)[0]
    assert by_class == by_function


def name_groups() -> list[tuple[str, bool]]:
    """Groups that say who steps them, and a matrix of a block that has an embedding's shape."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(16, 16),
            "blocks": nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)) for _ in range(2)),
            "head": nn.Linear(16, 16, bias=False),
        }
    )
    groups = [
        {"params": [model["blocks"][0][0].weight], "use_muon": True, "lr": 0.5},
        {"params": [*model["blocks"][1].parameters(), model["embed"].weight, model["head"].weight]},
    ]
    config = settings(3, optimizer={"type": "Muon", "params": {"lr": 0.01}})
    engine = zero.initialize(model, config, model_parameters=groups)
    assert engine.get_lr() == [0.5, 0.01, 0.01]
    return [(param.fqn, group["use_muon"]) for group in engine.optimizer.param_groups for param in group["params"]]


def test_groups_of_a_config_are_kept_and_shapes_count_outside_of_blocks_only(ranks: Ranks) -> None:
    found = dict(ranks(1, name_groups)[0])
    assert {name for name, is_matrix in found.items() if is_matrix} == {
        "blocks.0.0.weight",
        "blocks.1.0.weight",
        "blocks.1.1.weight",
    }
    optimizer = zero.Muon([nn.Parameter(torch.ones(2, 2))])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))]})
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, True, False]
