"""Models and trainings that hypothesis draws: plain data from which every rank builds the same, and shrinks the same.

    ModelPlan    parts and the container they lie in, how often, when and in what order each is used
    Training     a plan, a row of the table, and how it is trained

Each part maps rows of `width` to rows of `width`, whatever is inside: so any order of parts is a model, and hypothesis
may leave parts out until only those that fail are left.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from parity import ROWS, Recipe, widen
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from zcore.zero.units import find_blocks

NUM_INPUTS, NUM_OUTPUTS = 5, 3
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
HYPER: dict[str, tuple[tuple[str, Any], ...]] = {
    # Not fused: torch's fused SGD fails where a parameter gets its first gradient later than another.
    "SGD": (("lr", 0.05), ("momentum", 0.9), ("weight_decay", 0.01), ("foreach", True)),
    "AdamW": (("lr", 1e-2), ("weight_decay", 0.1)),
    "Lion": (("lr", 1e-2), ("weight_decay", 0.1)),
    "Adagrad": (("lr", 1e-2),),
    "RMSprop": (("lr", 1e-2), ("momentum", 0.9)),
}


@dataclass(frozen=True)
class PartPlan:
    """One module of a model."""

    kind: str
    inner: int = 3  # a size inside of it
    dtype: str = "float32"
    frozen: str = "no"  # "no", "all", or "half": every second parameter
    ties: bool = False  # its parameters are those of the first part before it that has the same shapes


@dataclass(frozen=True)
class Use:
    """One use of a part in a forward."""

    part: int  # modulo the number of parts
    when: str = "always"  # in which micro-batches, or on which ranks
    how: str = "called"


@dataclass(frozen=True)
class ModelPlan:
    width: int = 3
    parts: tuple[PartPlan, ...] = ()
    uses: tuple[Use, ...] = ()
    container: str = "list"
    stem_is_frozen: bool = False
    roots: tuple[int, ...] = ()  # sizes of parameters on the root itself; 0 is one without a dimension

    @property
    def has_choices(self) -> bool:
        """Whether ranks use different experts."""
        return any(part.kind == "choice" for part in self.parts)


class Residual(nn.Module):
    """x and what layers make of it, in their own dtype and within bounds."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, seed: int) -> Tensor:
        dtype = next((param.dtype for param in self.layers.parameters()), x.dtype)
        return x + torch.tanh(self.layers(x.to(dtype))).to(x.dtype)


class Numbers(nn.Module):
    """Parameters of its own in odd shapes, among them one without a dimension, two without elements, one not used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.one = nn.Parameter(torch.randn(1))
        self.table = nn.Parameter(torch.randn(7, 5))
        self.empty, self.none = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0))
        self.unused = nn.Parameter(torch.randn(3, 1, width))

    def forward(self, x: Tensor, seed: int) -> Tensor:
        shift = (self.one * self.table.mean() + self.empty.sum() + self.none.sum()).to(x.dtype)
        return x * self.gain.to(x.dtype) + shift


class Lookup(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(inner, width)

    def forward(self, x: Tensor, seed: int) -> Tensor:
        index = (torch.arange(len(x)) + seed) % self.rows.num_embeddings
        return x + torch.tanh(self.rows(index)).to(x.dtype)


class Choice(nn.Module):
    """Experts of which the sign of a row chooses; the last has no token. It is to be a leaf."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Residual(nn.Linear(width, width)) for _ in range(3))

    def forward(self, x: Tensor, seed: int, *, half: bool) -> Tensor:
        return self.experts[int(half)](x, seed)


class Nested(nn.Module):
    """Containers in containers, and a frozen constant of another dtype among the buffers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(
            {
                name: nn.ModuleList(Residual(nn.Linear(width, inner), nn.Linear(inner, width)) for _ in range(2))
                for name in ("first", "second")
            }
        )
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("passing", torch.zeros(2, 1), persistent=False)

    def forward(self, x: Tensor, seed: int) -> Tensor:
        for group in self.groups.values():
            for layer in group:
                x = layer(x, seed)
        return x + self.shift.to(x.dtype) + self.passing.sum().to(x.dtype)


PARTS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda width, inner: Residual(nn.Linear(width, width)),
    "no bias": lambda width, inner: Residual(nn.Linear(width, width, bias=False)),
    "mlp": lambda width, inner: Residual(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width)),
    "norm": lambda width, inner: Residual(nn.LayerNorm(width)),
    "nothing": lambda width, inner: Residual(nn.Identity()),
    "numbers": lambda width, inner: Numbers(width),
    "lookup": Lookup,
    "choice": lambda width, inner: Choice(width),
    "nested": Nested,
}
WHENS: dict[str, Callable[[int, bool], bool]] = {
    "always": lambda seed, half: True,
    "never": lambda seed, half: False,
    "even": lambda seed, half: seed % 2 == 0,
    "odd": lambda seed, half: seed % 2 == 1,
    "late": lambda seed, half: seed > 1,
    "first half": lambda seed, half: not half,
    "second half": lambda seed, half: half,
}
BY_RANK = ("first half", "second half")
REENTRANTLY = "checkpointed reentrantly"  # of one part in all of its uses: else it is refused
HOWS = ("called", "borrowed", "checkpointed", "without autograd", REENTRANTLY)
CONTAINERS = ("list", "dict", "attributes", "sequential", "twice")


class RandomModel(nn.Module):
    """What a plan says, between a linear layer and another one."""

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        self.plan = plan
        self.stem = nn.Linear(NUM_INPUTS, plan.width).requires_grad_(not plan.stem_is_frozen)
        parts = [PARTS[part.kind](plan.width, part.inner).to(DTYPES[part.dtype]) for part in plan.parts]
        for index, part in enumerate(plan.parts):
            for position, param in enumerate(parts[index].parameters()):
                param.requires_grad_(part.frozen == "no" or (part.frozen == "half" and position % 2 == 0))
            if part.ties:
                tie(parts[index], parts[:index])
        self._hold(parts)
        for index, size in enumerate(plan.roots):
            self.register_parameter(f"root_{index}", nn.Parameter(torch.randn(size) if size else torch.tensor(0.3)))
        self.head = nn.Linear(plan.width, NUM_OUTPUTS)
        self.register_buffer("last", torch.tensor(-1))

    def _hold(self, parts: list[nn.Module]) -> None:
        container = self.plan.container
        if container in ("list", "twice"):
            self.held = nn.ModuleList(parts)
        elif container == "sequential":
            self.held = nn.Sequential(*parts)
        elif container == "dict":
            self.held = nn.ModuleDict({f"part{index}": part for index, part in enumerate(parts)})
        else:
            for index, part in enumerate(parts):
                self.add_module(f"part{index}", part)
        if container == "twice" and parts:
            self.alias = parts[-1]

    def _parts(self) -> list[nn.Module]:
        if self.plan.container == "attributes":
            return [getattr(self, f"part{index}") for index in range(len(self.plan.parts))]
        return list(self.held.values() if isinstance(self.held, nn.ModuleDict) else self.held)

    def forward(self, x: Tensor, y: Tensor, seed: int, half: Tensor) -> Tensor:
        parts, is_second = self._parts(), bool(half[0] > 0)
        self.last.fill_(seed)
        x = torch.tanh(self.stem(x))
        for use in self.plan.uses if parts else ():
            if not WHENS[use.when](seed, is_second):
                continue
            part = parts[use.part % len(parts)]
            arguments = {"half": is_second} if isinstance(part, Choice) else {}
            x = self._use(use.how, part, x, seed, arguments)
        for index in range(len(self.plan.roots)):
            x = x + getattr(self, f"root_{index}").mean().to(x.dtype)
        return functional.mse_loss(widen(self.head(x)), widen(y))

    @staticmethod
    def _use(how: str, part: nn.Module, x: Tensor, seed: int, arguments: Mapping[str, Any]) -> Tensor:
        if how == "without autograd":
            with torch.no_grad():
                return x + 0.1 * part(x.detach(), seed, **arguments)
        if how == "borrowed":
            first = next(part.parameters(), None)
            return x if first is None else x + first.square().mean().to(x.dtype)
        if how == "called":
            return part(x, seed, **arguments)
        if how == "checkpointed":
            return checkpoint(part, x, seed, use_reentrant=False, **arguments)
        x = x if x.requires_grad else x.requires_grad_()
        return checkpoint(lambda inner: part(inner, seed, **arguments), x, use_reentrant=True)


def tie(part: nn.Module, earlier: list[nn.Module]) -> None:
    """Give `part` the parameters of the first of `earlier` that is made alike."""
    for other in earlier:
        own, others = dict(part.named_parameters()), dict(other.named_parameters())
        if other is not part and {name: (each.shape, each.dtype) for name, each in own.items()} == {
            name: (each.shape, each.dtype) for name, each in others.items()
        }:
            for name, shared in others.items():
                owner, _, attribute = name.rpartition(".")
                setattr(part.get_submodule(owner), attribute, shared)
            return


@dataclass(frozen=True)
class RandomRecipe(Recipe):
    """A training of a plan."""

    plan: ModelPlan = field(default_factory=ModelPlan)

    def build(self) -> nn.Module:
        """The model, from the seed."""
        torch.manual_seed(self.seed)
        return RandomModel(self.plan)

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """The rows of a micro-batch; `half` is 1 in those of the second half of the ranks."""
        seed = step * self.accumulation + micro
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        x = torch.randn(ROWS, NUM_INPUTS, generator=generator)
        half = (torch.arange(ROWS) >= ROWS // 2).long()
        return {"x": x, "y": torch.tanh(x[:, :NUM_OUTPUTS]), "seed": seed, "half": half}

    def autocasting(self) -> AbstractContextManager[object]:
        """Without a cache, as the engine has none: gradients of several uses would be added up in 16 bits."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=getattr(torch, self.autocast), cache_enabled=False)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """As `Recipe` builds it, but not fused where `hyper` has another way."""
        if "foreach" not in dict(self.hyper):
            return super().build_optimizer(model)
        kind: type[torch.optim.Optimizer] = getattr(torch.optim, self.optimizer)
        return kind(self.groups(model), **dict(self.hyper))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters dealt out to groups of their own learning rates."""
        params, (_, lr) = list(model.parameters()), self.hyper[0]
        dealt = [params[index :: self.num_groups] for index in range(self.num_groups)]
        return [{"params": each, "lr": lr * (1 + index)} for index, each in enumerate(dealt)]


@dataclass(frozen=True)
class Training:
    """A recipe, and the arguments of `parity.train_zero`."""

    recipe: RandomRecipe
    stage: int
    shard_size: int = -1  # -1: all ranks
    secondary_size: int = 1  # of hpZ; 1: none
    holds_back: bool = False
    is_deferred: bool = False
    every: int = 0  # which blocks are recomputed; 0: none
    small_numel: int = 0
    others: tuple[tuple[str, Any], ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """For `parity.train_zero`."""
        choices = {"leaf_module": {"classes": ["Choice"]}} if self.recipe.plan.has_choices else {}
        return {
            "stage": self.stage,
            "shard_size": self.shard_size,
            "holds_back": self.holds_back,
            "is_deferred": self.is_deferred,
            "recompute": {"every": self.every} if self.every else None,
            "stage3_param_persistence_threshold": self.small_numel,
            **({"zero_hpz_partition_size": self.secondary_size} if self.secondary_size > 1 else {}),
            **choices,
            **dict(self.others),
        }

    def reduces_each(self, world_size: int) -> bool:
        """Whether gradients are reduced in each micro-batch."""
        shard_size = world_size if self.shard_size == -1 else self.shard_size
        return self.stage >= 2 and shard_size > 1 and not self.holds_back


def parts() -> st.SearchStrategy[PartPlan]:
    return st.builds(
        PartPlan,
        kind=st.sampled_from(list(PARTS)),
        inner=st.sampled_from([3, 1, 7]),
        dtype=st.sampled_from(["float32", "float32", "float32", "float64", "bfloat16"]),
        frozen=st.sampled_from(["no", "no", "all", "half"]),
        ties=st.booleans(),
    )


def uses() -> st.SearchStrategy[Use]:
    return st.builds(Use, part=st.integers(0, 3), when=st.sampled_from(list(WHENS)), how=st.sampled_from(HOWS))


def plans() -> st.SearchStrategy[ModelPlan]:
    return st.builds(
        ModelPlan,
        width=st.sampled_from([3, 1, 7]),
        parts=st.lists(parts(), max_size=4).map(tuple),
        uses=st.lists(uses(), max_size=6).map(tuple),
        container=st.sampled_from(CONTAINERS),
        stem_is_frozen=st.booleans(),
        roots=st.lists(st.sampled_from([0, 1, 3]), max_size=2).map(tuple),
    )


PRECISIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"compute": torch.bfloat16},
    {"compute": torch.float16, "loss_scale": 64.0},
    {"autocast": "bfloat16"},
)


@st.composite
def trainings(draw: st.DrawFn, *, world_size: int) -> Training:
    plan, precision = draw(plans()), draw(st.sampled_from(PRECISIONS))
    stage = draw(st.sampled_from([3, 0, 1, 2]))
    if precision:  # other dtypes are told apart by nothing then, and autocast leaves them alone
        plan = replace(plan, parts=tuple(replace(part, dtype="float32") for part in plan.parts))
    if stage == 3:  # ranks gather together
        plan = replace(plan, uses=tuple(replace(use, when="odd") if use.when in BY_RANK else use for use in plan.uses))
    accumulation = draw(st.integers(1, 3))
    if any(use.how == REENTRANTLY for use in plan.uses):
        # In each inner backward a parameter gets a gradient, which torch adds up apart from those of other batches.
        only = "checkpointed" if precision or accumulation > 1 else REENTRANTLY
        plan = replace(plan, uses=tuple(replace(use, how=only) for use in plan.uses))
    optimizer = draw(st.sampled_from(list(HYPER)))
    recipe = RandomRecipe(
        steps=3,
        accumulation=accumulation,
        clip=draw(st.sampled_from([0.0, 0.1])),
        optimizer=optimizer,
        hyper=HYPER[optimizer],
        num_groups=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 3)),
        plan=plan,
        **precision,
    )
    shard_size = draw(st.sampled_from([-1] + [size for size in (1, 2) if size < world_size]))
    return Training(
        recipe,
        stage=stage,
        shard_size=shard_size,
        secondary_size=2 if world_size == 4 and stage == 3 and shard_size == -1 and draw(st.booleans()) else 1,
        holds_back=draw(st.booleans()),
        is_deferred=draw(st.booleans()),
        every=draw(st.integers(0, 2)) if find_blocks(recipe.build()) else 0,
        small_numel=draw(st.sampled_from([0, 12, 10**6])),
        others=tuple(sorted(draw(st.sets(st.sampled_from(OTHERS), max_size=2)))),
    )


OTHERS: tuple[tuple[str, Any], ...] = (
    ("overlap_comm", False),
    ("reduce_bucket_size", 30),
    ("stage3_max_live_parameters", 0),
    ("stage3_max_reuse_distance", 0),
    ("stage3_prefetch_bucket_size", 0),
)


def brief(value: object) -> str:
    """The constructor call of a plan, without what is as by default."""
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value))},)" if value else "()"
    if not is_dataclass(value):
        return repr(value)
    given = [
        (each.name, getattr(value, each.name)) for each in fields(value) if getattr(value, each.name) != each.default
    ]
    return f"{type(value).__name__}({', '.join(f'{name}={brief(inside)}' for name, inside in given)})"
