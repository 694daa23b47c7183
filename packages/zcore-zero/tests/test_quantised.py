"""A quantised base with trained adapters trains in every stage as in plain torch; what cannot be sharded is refused.

4 bits are those of bitsandbytes, 8 bits those of torchao, taken apart first.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zcore import zero
from zcore.core.errors import LayoutError, MismatchError, StateError

Ranks = Callable[..., Any]
WIDTH, BLOCKS, STEPS, ROWS = 64, 3, 4, 4
LIBRARY = {"4 bits": "bitsandbytes", "8 bits": "torchao"}
NEEDED = [
    pytest.param(kind, marks=pytest.mark.skipif(find_spec(library) is None, reason=f"needs {library}"))
    for kind, library in LIBRARY.items()
]


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def quantised(kind: str, *, storage: torch.dtype = torch.uint8, is_apart: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted() for _ in range(BLOCKS)))
    for block in model:
        if kind == "4 bits":
            from bitsandbytes.nn import Linear4bit

            packed = Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage)
            packed.load_state_dict(block.base.state_dict())
            block.base = packed.requires_grad_(False).to("cpu")
        else:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
            from torchao.utils import unwrap_tensor_subclass

            quantize_(block.base, Int8WeightOnlyConfig())
            if is_apart:
                unwrap_tensor_subclass(block)
    return model


def rows_of(step: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def train_plainly(kind: str) -> list[float]:
    model, losses = quantised(kind), []
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(rows_of(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(kind: str, stage: int) -> tuple[list[float], int]:
    """The losses of this rank's rows, and what its part of the parameters takes."""
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, rank, size, losses = zero.initialize(quantised(kind), config), dist.get_rank(), dist.get_world_size(), []
    for step in range(STEPS):
        loss = engine(rows_of(step).chunk(size)[rank]).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, engine.memory_report().ranks[rank].parameters_bytes


def train_in_every_stage(kind: str) -> list[tuple[list[float], int]]:
    return [train(kind, stage) for stage in range(4)]


@pytest.mark.parametrize("kind", NEEDED)
def test_adapters_on_a_quantised_base_train_as_in_plain_torch(ranks: Ranks, kind: str) -> None:
    (expected,) = ranks(1, train_plainly, kind)
    whole, *_, sharded = by_stage = list(zip(*ranks(2, train_in_every_stage, kind), strict=True))
    for stage in by_stage:
        mean = [sum(losses) / 2 for losses in zip(*(losses for losses, _ in stage), strict=True)]
        assert mean == pytest.approx(expected, rel=1e-5)  # sums over rows associate differently
        assert [losses for losses, _ in stage] == [losses for losses, _ in whole]
    assert [held for _, held in sharded] == pytest.approx([held / 2 for _, held in whole], rel=0.05)  # for padding


def states_of_4_bits() -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """What a forward without training, and zero.Init, are told; the state dict, and plain torch's."""
    config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    engine = zero.initialize(quantised("4 bits"), config)
    states = engine.consolidated_state_dict(rank=None)
    engine.module.eval()
    told = []
    try:
        engine(rows_of(0))
    except StateError as error:  # only where bitsandbytes packs anew for this processor
        told.append(str(error))
    try:
        with zero.Init():
            model = quantised("4 bits")
        zero.initialize(model, config)
    except LayoutError as error:
        told.append(str(error))
    return told, states, quantised("4 bits").state_dict()


@pytest.mark.parametrize("kind", NEEDED[:1])
def test_a_state_dict_of_4_bits_holds_what_they_mean(ranks: Ranks, kind: str) -> None:
    for (*in_eval, in_init), states, expected in ranks(2, states_of_4_bits):
        assert states.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(states[name], value)] == []
        assert all("Call `model.train()`" in each for each in in_eval)
        assert "was quantised inside zero.Init" in in_init


def refusals() -> dict[str, str]:
    """What each that cannot be sharded is told."""
    from torch.testing._internal.two_tensor import TwoTensor

    class Moved(nn.Parameter):
        has_fp16_weights = False  # as bitsandbytes calls it

    class Packed(nn.Parameter):
        quant_state = "of blocks"

    several = nn.Linear(4, 4)
    several.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)), requires_grad=False)
    moved, packed = nn.Linear(4, 4), nn.Linear(4, 4)
    moved.weight = Moved(torch.ones(4, 4).to(torch.int8), requires_grad=False)
    packed.weight = Packed(torch.ones(4, 4), requires_grad=False)
    late = nn.Linear(4, 4)
    late.weight = Packed(torch.ones(4, 4).to(torch.uint8), requires_grad=False)
    late.weight.bnb_quantized = False
    unlike = nn.Linear(4, 4)
    unlike.weight = Packed(torch.ones(4, 4).to(torch.uint8), requires_grad=False)
    unlike.weight.quant_state = SimpleNamespace(absmax=torch.full((3,), 1.0 + dist.get_rank()))
    told = {}
    for name, model in {"several": several, "moved": moved, "packed": packed, "late": late, "unlike": unlike}.items():
        try:
            zero.initialize(nn.Sequential(model), {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}})
        except (LayoutError, MismatchError) as error:
            told[name] = str(error)
    zero.initialize(nn.Sequential(packed), {"optimizer": {"type": "AdamW"}})  # which casts nothing
    return told


def test_what_cannot_be_sharded_is_refused_by_name_with_the_way_out(ranks: Ranks) -> None:
    told, others = ranks(2, refusals)
    assert told.keys() == others.keys()
    assert told["late"].startswith("0.weight is to be quantised by bitsandbytes, and is not yet")
    assert "statistics of quantised blocks" in told["unlike"]
    assert told["several"].startswith("0.weight is a TwoTensor: several tensors under one name")
    assert "torchao.utils.unwrap_tensor_subclass(model)" in told["several"]
    assert told["moved"].startswith("0.weight is quantised to 8 bits by bitsandbytes")
    assert "holds 4-bit numbers packed into torch.float32, which casting it to torch.bfloat16" in told["packed"]
    assert "bnb_4bit_quant_storage=torch.uint8" in told["packed"]
