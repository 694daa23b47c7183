"""Blocks that compute their activations again train the same bits, hold less, and are gathered no more often."""

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from parity import GPT, Recipe, bits_that_differ, by_row, train_rows
from tiny_models import TinyModel, refusal, settings, train_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from zcore import zero
from zcore.core import compat
from zcore.core.collectives import Collectives
from zcore.core.errors import ConfigError, MismatchError, StateError
from zcore.core.mesh import build_mesh
from zcore.core.torch_collectives import choose_collectives
from zcore.zero.partitioned import partition_inputs

Ranks = Callable[..., Any]
Trained = tuple[list[float], dict[str, torch.Tensor], int]
RECIPE = Recipe("gpt", model_options=(("num_blocks", 3),), steps=2, accumulation=2, clip=0.5)
WAYS: list[dict[str, Any]] = [{"every": 1}, {"every": 2, "save": ["matmul"]}, {"every": 1, "save": ["attention"]}]


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputing_changes_no_bit(ranks: Ranks, stage: int) -> None:
    row = {"stage": stage}
    trainings = [(RECIPE, row), *((RECIPE, {**row, "recompute": way}) for way in WAYS)]
    straight, *recomputed = by_row(ranks(2, train_rows, trainings))
    assert [bits_that_differ(run, straight) for run in recomputed] == [[] for _ in WAYS]


@pytest.mark.parametrize("way", ["dropout", "autocast"])
def test_nor_do_random_numbers_or_casts(ranks: Ranks, way: str) -> None:
    recipe = Recipe("dropping", steps=2) if way == "dropout" else replace(RECIPE, autocast="bfloat16")
    straight, recomputed = by_row(
        ranks(2, train_rows, [(recipe, {"stage": 3}), (recipe, {"stage": 3, "recompute": {"every": 1}})])
    )
    assert bits_that_differ(recomputed, straight) == []


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def operations_of_backward(**settings: Any) -> dict[str, int]:
    torch.manual_seed(0)
    model = GPT(num_blocks=4)
    if settings:
        assert zero.checkpoint(model, **settings) is model
    loss = model(tokens())
    with Operations() as operations:
        loss.backward()
    return operations.counts


def test_policies_choose_which_blocks_and_which_operations_run_again() -> None:
    plain = operations_of_backward()
    assert "native_layer_norm" not in plain
    every = operations_of_backward(every=1)
    assert every["native_layer_norm"] == 4 * 2  # two in each block
    assert operations_of_backward(every=3)["native_layer_norm"] == 2 * 2  # blocks 0 and 3
    kept = operations_of_backward(every=1, save=("matmul",))
    assert kept["native_layer_norm"] == every["native_layer_norm"]
    assert (every["addmm"], kept.get("addmm", 0)) == (4 * 3, 0)  # no gradient needs the last one's result
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert attention in every
    assert attention not in operations_of_backward(every=1, save=("attention",))


def saved_bytes(model: nn.Module) -> int:
    """Of what autograd keeps of a forward, but the parameters."""
    kept: dict[int, int] = {}
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens())
    total = sum(kept.values())
    loss.backward()
    return total


def test_what_is_held_between_forward_and_backward_shrinks_block_by_block() -> None:
    plain, half, all_blocks = (
        saved_bytes(model)
        for model in (
            GPT(num_blocks=8),
            zero.checkpoint(GPT(num_blocks=8), every=2),
            zero.checkpoint(GPT(num_blocks=8)),
        )
    )
    assert all_blocks < half < plain
    assert all_blocks < 0.25 * plain


def count_gathers() -> list[dict[str, int]]:
    counts = []
    for section in ({}, {"every": 1}):
        engine = zero.initialize(TinyModel(), settings(3, activation_checkpointing=section))
        train_step(engine, 0)
        before = engine.traffic()["gather"].calls.copy()
        train_step(engine, 1)
        counts.append(dict(engine.traffic()["gather"].calls - before))
    return counts


def test_stage_3_gathers_no_more_often(ranks: Ranks) -> None:
    straight, recomputed = ranks(2, count_gathers)[0]
    assert straight["all_gather"] > 0
    assert recomputed == straight


class Recomputing(nn.Module):
    """Blocks that run again, and nothing else that could tell of changed weights."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch_checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x.sum()


def step_before_a_backward(stage: int) -> list[str]:
    """What is said of a step in between; and the same losses as a plain model without one, whatever checkpoint runs."""
    said = []
    for use_reentrant in (False, True):
        torch.manual_seed(0)
        plain = Recomputing(use_reentrant=use_reentrant)
        model = zero.shard(copy.deepcopy(plain), build_mesh(dp=-1), stage=stage)
        models = [(each, torch.optim.SGD(each.parameters(), lr=0.1)) for each in (plain, model)]
        x = torch.ones(2, 6, requires_grad=True)
        for _ in range(3):
            losses = []
            for each, optimizer in models:
                loss = each(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        model(x).backward()
        late = model(x)
        models[1][1].step()
        said.append(refusal(late.backward))
    return said


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_between_a_forward_and_what_is_computed_again_is_refused(ranks: Ranks, stage: int) -> None:
    for straight, _ in ranks(2, step_before_a_backward, stage):
        assert straight.startswith("StateError: Parameters of 'small parameters' were changed")
        assert "Run the forward again after a change" in straight


def test_without_gradients_nothing_is_set_up_to_run_again() -> None:
    model = zero.checkpoint(GPT())
    with torch.no_grad(), Operations() as operations:
        model(tokens())
    assert operations.counts["native_layer_norm"] == 5


def test_a_copy_computes_with_its_own_weights() -> None:
    model = zero.checkpoint(GPT())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for param in copied.h.parameters():
            param.zero_()
    copied(tokens()).backward()
    assert all(param.grad is None for param in model.parameters())
    assert copied(tokens()).item() != model(tokens()).item()


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: zero.checkpoint(nn.Linear(3, 3)), ConfigError, "no blocks are recognisable"),
        (lambda: zero.checkpoint(GPT(), every=0), ConfigError, "every is 0"),
        (lambda: zero.checkpoint(GPT(), save=("norms",)), ConfigError, "'norms'; expected some of matmul, attention"),
        (lambda: zero.checkpoint(GPT(), save="matmul"), ConfigError, "save is 'matmul'; expected a list"),
        (lambda: zero.checkpoint(zero.checkpoint(GPT())), StateError, "already"),
    ],
)
def test_what_cannot_be_is_refused_by_name(act: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        act()


def train_llama() -> list[list[float]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    losses = []
    for section in ({}, {"every": 2}):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        again: list[int] = []
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *_, again=again: again.append(1))
        engine = zero.initialize(model, settings(3, activation_checkpointing=section))
        ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(engine.dp_rank))
        losses.append([])
        for _ in range(3):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
        assert len(again) == 3 * (5 if section else 3)  # layers 0 and 2 twice
    return losses


def test_layers_of_transformers_are_recomputed_through_their_own_switch(ranks: Ranks) -> None:
    pytest.importorskip("transformers")
    for straight, recomputed in ranks(2, train_llama):
        assert straight == recomputed


def train_beside_twins(stage: int, dp_size: int, *, partitions: bool) -> Trained:
    """Losses, weights, and how many inputs of blocks live between a forward and its backward; `tp` has 2 ranks."""
    torch.manual_seed(0)
    model, mesh = GPT(num_blocks=4), build_mesh(dp=dp_size, tp=2)
    section = {"every": 1, "partition_activations": partitions}
    engine = zero.initialize(model, settings(stage, activation_checkpointing=section), mesh=mesh)
    inputs: list[weakref.ref[torch.UntypedStorage]] = []
    for block in model.h:
        block.register_forward_pre_hook(lambda block, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    losses, num_alive = [], 0
    for step in range(3):
        inputs.clear()
        batch = torch.randint(0, 61, (8, 9), generator=torch.Generator().manual_seed(10 * step + engine.dp_rank))
        loss = engine(batch)
        num_alive = sum(each() is not None for each in inputs)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, engine.consolidated_state_dict(rank=None), num_alive


def train_with_and_without_parts(stage: int, dp_size: int) -> list[Trained]:
    return [train_beside_twins(stage, dp_size, partitions=partitions) for partitions in (False, True)]


@pytest.mark.parametrize(("stage", "dp_size"), [(0, 1), (3, 1), (3, 2)])
def test_ranks_with_the_same_inputs_keep_a_part_each_and_train_the_same_bits(
    ranks: Ranks, stage: int, dp_size: int
) -> None:
    for whole, in_parts in ranks(2 * dp_size, train_with_and_without_parts, stage, dp_size):
        assert in_parts[0] == whole[0]
        assert all(torch.equal(in_parts[1][name], value) for name, value in whole[1].items())
        assert (whole[2], in_parts[2]) == (4, 0)


class Twins:
    """Ranks in one thread: what each keeps of the same tensor, one after the other, and then all of it."""

    size = 3

    def __init__(self) -> None:
        self.rank, self.kept = 0, list[torch.Tensor]()

    def empty(self, numel: int, **options: Any) -> torch.Tensor:
        return torch.empty(numel, **options)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, label: str) -> "Twins":
        output.copy_(torch.cat(self.kept) if label.startswith("inputs") else input.repeat(self.size))
        return self

    def wait(self) -> None:
        """It is there."""


class Unlike(Twins):
    """The other ranks have what `change` makes of an input; it is told as samples, so it is asked for these."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, label: str) -> Twins:
        output.copy_(torch.cat((input, *[self.change(input)] * (self.size - 1))))
        return self


def with_one(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.cat((x[:5], x.new_tensor([value]), x[6:]))


ONES = torch.ones(1024)
A_UNIT = 2.0**-7  # of bf16
UNLIKE: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "by rounding": (ONES, lambda x: x * (1 + 2e-7), False),
    "by a thousandth": (ONES, lambda x: x * 1.001, True),
    "in one element, by many units": (ONES, lambda x: with_one(x, 1.01), True),
    "in one large element, by a unit": (
        with_one(ONES, 512.0).bfloat16(),
        lambda x: with_one(x, 512.0 * (1 + A_UNIT)),
        False,
    ),
    "beside a NaN that all have": (with_one(ONES, torch.nan), lambda x: with_one(x * 1.001, x[5].item()), True),
    "in every other column": (torch.stack((torch.ones(4096), torch.zeros(4096)), 1), lambda x: x.clamp(min=0.1), True),
}


@pytest.mark.parametrize("how", UNLIKE)
def test_inputs_may_differ_by_rounding_and_not_by_more(how: str) -> None:
    (x, change, is_refused), hooks = UNLIKE[how], list[Any]()
    run = partition_inputs(
        lambda function, x: hooks.append(compat.saved_tensors_hooks_on_top()),
        cast("Collectives", Unlike(change)),
        least_bytes=0,
    )
    x = x.clone().requires_grad_()
    run(None, x)
    with pytest.raises(MismatchError) if is_refused else nullcontext():
        hooks[0][0](x)


def layouts_of(*shape: int) -> list[torch.Tensor]:
    """Tensors of that shape, in several orders of memory."""
    found = []
    for dims in permutations(range(len(shape))):
        stored = torch.randn([shape[dim] for dim in dims], requires_grad=True)
        found.append(stored.permute([dims.index(dim) for dim in range(len(dims))]))
    return found


@pytest.mark.parametrize("x", [*layouts_of(4, 9), *layouts_of(1, 1), *layouts_of(2, 3, 5), *layouts_of(7)])
def test_parts_of_any_shape_and_layout_are_put_together_again(x: torch.Tensor) -> None:
    group, hooks = Twins(), list[Any]()
    run = partition_inputs(
        lambda function, x: hooks.append(compat.saved_tensors_hooks_on_top()), cast("Collectives", group), least_bytes=0
    )
    run(None, x)
    keep, bring_back = hooks[0]
    parts = []
    for rank in range(Twins.size):
        group.rank = rank
        parts.append(keep(x))
        group.kept.append(parts[-1].part)
    assert len({part.part.numel() for part in parts}) == 1
    assert parts[0].part.numel() * group.size < x.numel() + group.size
    for part in parts:
        again = bring_back(part)
        assert torch.equal(again, x)
        assert again.stride() == x.stride()
    assert bring_back(keep(x.detach())) is not None  # what has no gradient is kept as it is
    assert not hasattr(keep(x.detach()), "part")


class Turned(nn.Module):
    """Blocks that are handed a view, by name, beside a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TurnedBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(24, dtype=x.dtype)
        for block in self.blocks:
            x = block(x=torch.tanh(x).transpose(0, 1), mask=mask)
        return x.square().mean()


class TurnedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1).view(-1, 24) * mask  # refuses what is not in the caller's order
        return self.down(torch.tanh(self.up(x))).view(16, 8, 24)


def train_turned(kind: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Gradients without and with parts; or what is told where inputs are not alike."""
    group, found = choose_collectives(dist.group.WORLD, name="tp"), list[Any]()
    for over in (None, group):
        torch.manual_seed(0)
        model = Turned().to(dtype)
        zero.checkpoint(model, partition_over=over)
        x = torch.randn(16, 8, 24, dtype=dtype, requires_grad=True)
        if kind == "unlike":
            x = x.roll(group.rank, dims=0).detach().requires_grad_()
        if kind == "other dropout":  # which the first block's input knows nothing of
            torch.manual_seed(group.rank)
            model.blocks[0].register_forward_hook(lambda block, args, result: nn.functional.dropout(result, 0.1))
        try:
            model(x).backward()
            found.append([param.grad for param in model.parameters()])
        except MismatchError as error:
            found.append(str(error))
    return found


def test_views_that_blocks_are_handed_by_name_are_spread_and_come_back_as_they_were(ranks: Ranks) -> None:
    for whole, in_parts in ranks(2, train_turned, "alike"):
        assert all(map(torch.equal, whole, in_parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "number"), [("unlike", 1), ("other dropout", 2)])
def test_inputs_that_are_not_alike_are_refused_at_once(
    ranks: Ranks, kind: str, number: int, dtype: torch.dtype
) -> None:
    for _, told in ranks(2, train_turned, kind, dtype):
        assert f"have different ones: elements of number {number} are" in told


def test_a_mask_that_is_edited_later_is_refused_as_without_parts() -> None:
    run = partition_inputs(partial(torch_checkpoint, use_reentrant=False), cast("Collectives", Twins()), least_bytes=0)
    mask = torch.ones(4)
    weight = torch.ones(4, requires_grad=True)
    result = run(lambda mask: torch.tanh(weight * mask), mask)
    mask.zero_()
    with pytest.raises(StateError, match="was modified in place after the block had run"):
        result.sum().backward()


def tell_of_keys() -> str:
    config = settings(1, activation_checkpointing={"partition_activations": True, "cpu_checkpointing": True})
    return refusal(lambda: zero.initialize(TinyModel(), config))


def test_saved_activations_are_not_moved_yet(ranks: Ranks) -> None:
    assert "activation_checkpointing.cpu_checkpointing" in ranks(1, tell_of_keys)[0]
