"""What the optimizers share: states in the dtype asked for, and one call of an op for all parameters of a kind.

    state_dtype      kept of one state                          bytes an element
    torch.float32    exp_avg                                    4
    torch.bfloat16   exp_avg                                    2, rounded to the nearest after each step
    "8bit"           exp_avg (uint8 codes), exp_avg_scale       1 + 1/64; a block that has a NaN is NaN

A group holds it by name ("float32", "bfloat16", "8bit"), so that it goes through JSON; either may be passed.

Parameters of a group are of one kind where the dtypes of both parameter and gradient and the number of the step agree.
The ops come from the registry, so that `ZCORE_OPS=reference`, and a device without kernels, takes references.

What a step or a load refuses it refuses before it changes anything: states that are begun and counts of steps are put
in place once the op has run.

Parameters in bf16 and fp16 are stepped in fp32 and rounded to the nearest in the same pass, as torch's fused optimizers
do; what is too small for their dtype is lost, as there. For a master in fp32 keep parameters in fp32 and compute under
autocast.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.dynamic_code import decode, encode, num_blocks
from zcore.kernels.ops.pieces import FLOATS
from zcore.kernels.optim.shards import check_shard, grad_shard_of, note_shard_step, shard_of

__all__ = ["FlatOptimizer", "Params", "Pieces", "StateDtype", "check_averages"]

StateDtype = torch.dtype | Literal["float32", "bfloat16", "8bit"]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}


@dataclass(slots=True)
class Pieces:
    """Operands of one call, flat, one entry for each parameter in every list."""

    step: int  # the number of this one, from 1
    is_first: bool  # a state is made for this step
    stepped: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)  # each with the states made for it
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def call(self, op: str, *operands: list[Tensor], **settings: Any) -> Any:
        """Call `op` for `params` and these operands; `ZCORE_OPS=reference` takes its reference."""
        first = self.params[0]
        return ops.get(op, device=first.device, dtype=first.dtype)(self.params, *operands, **settings)


class FlatOptimizer(torch.optim.Optimizer):
    """A subclass names its states, and steps the pieces of a group."""

    signs: ClassVar[Mapping[str, bool]]  # of each state, whether it has values below 0
    is_elementwise: ClassVar[bool] = True  # so a shard is stepped as in the whole

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._check_settings(defaults)  # also where every group has its own
        super().__init__(params, defaults)

    def states_of(self, group: Mapping[str, Any]) -> Iterable[str]:
        """The states that parameters of `group` need."""
        return self.signs

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """Step `pieces`, whose states are in `pieces.states`, under their names and, scales, `name_scale`."""
        raise NotImplementedError

    def initial(self, group: Mapping[str, Any]) -> float:
        """What a state begins with."""
        return 0.0

    def check_settings(self, group: Mapping[str, Any]) -> None:
        """Raise ConfigError for a setting of `group` outside the limits that torch.optim has for it."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; returns what `closure` returns, if there is one.

        Raises LayoutError or ConfigError, with nothing stepped, for a gradient or a parameter that is not served.
        torch.compile runs it as it is, between two graphs.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step_groups = self._step_groups
        if torch.compiler.is_compiling():  # a graph would be made anew for the number of each step
            step_groups = torch.compiler.disable(step_groups)
        step_groups()
        return loss

    def _step_groups(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # a shard of a parameter is stepped as the memory that it is
            gathered = [(group, self._gather(group)) for group in self.param_groups]
        for group, kinds in gathered:
            for pieces in kinds:
                self.step_pieces(group, pieces)
                for param, made in pieces.stepped:
                    note_shard_step(param)
                    state = self.state[param]
                    state.update(made)
                    state["step"] += 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own. Raises ConfigError for a dtype or a setting that is not served."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's, a view of the states, but codes are named `exp_avg_codes`: torch would take them for values."""
        saved = super().state_dict()
        saved["state"] = {index: self._with_codes_named(state) for index, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states of this class or of torch.optim's of the same name.

        Each group keeps its own `state_dtype`, to which what is loaded is converted, from codes too. Raises ConfigError
        or LayoutError, with groups and states left as they were, for what cannot be taken over.
        """
        groups, states = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)  # puts new ones in place of both
            self._take_over(state_dict, [group["state_dtype"] for group in groups])
        except BaseException:
            self.param_groups, self.state = groups, states
            raise

    def _take_over(self, state_dict: dict[str, Any], state_dtypes: Sequence[str]) -> None:
        """Complete what torch has loaded, which knows neither codes nor dtypes other than the parameter's."""
        for group, state_dtype, saved in zip(self.param_groups, state_dtypes, state_dict["param_groups"], strict=True):
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # torch's groups have no settings of ours
            group["state_dtype"] = state_dtype
            if "capturable" in group:
                group["capturable"] = False  # it says where torch counts steps
            self._check_group(group)
            for param, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
                    self.state[param] = self._adopt(param, state_dict["state"][index], state_dtype)

    def _with_codes_named(self, state: Mapping[str, Any]) -> dict[str, Any]:
        codes = {name for name in self.signs if name + "_scale" in state}
        return {name + "_codes" if name in codes else name: value for name, value in state.items()}

    def _check_settings(self, group: Mapping[str, Any]) -> None:
        name = type(self).__name__
        _refuse_torchs(name, group)
        self.check_settings(group)
        if str(group["state_dtype"]).removeprefix("torch.") not in STATE_DTYPES:
            raise ConfigError(
                f'{name}: state_dtype is {group["state_dtype"]!r}; expected torch.float32, torch.bfloat16 or "8bit".'
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_settings(group)
        name = type(self).__name__
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
        if len(set(group["params"])) < len(group["params"]):
            raise ConfigError(f"{name}: a parameter stands in the group twice; expected each once. Leave it out.")
        for index, param in enumerate(group["params"]):
            if param.dtype not in FLOATS:
                raise ConfigError(
                    f"{name}: parameter {index} of the group is {param.dtype}; expected {_listed(FLOATS)}. "
                    "Convert the model, or take torch.optim."
                )

    def _gather(self, group: Mapping[str, Any]) -> list[Pieces]:
        """What a step of `group` calls its op with; changes nothing of `group` or its states."""
        kinds: dict[tuple[torch.dtype, torch.dtype, torch.device, int, bool], Pieces] = {}
        names = self.states_of(group)
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise LayoutError(
                    f"{type(self).__name__}: the gradient of parameter {index} is {grad.layout}; expected "
                    "torch.strided. Make the embedding with sparse=False."
                )
            if grad.dtype not in FLOATS:
                raise ConfigError(
                    f"{type(self).__name__}: the gradient of parameter {index} is {grad.dtype}; expected "
                    f"{_listed(FLOATS)}. Convert it."
                )
            check_shard(
                type(self).__name__, param, state_dtype=group["state_dtype"], is_elementwise=self.is_elementwise
            )
            state = self.state.get(param, {})
            made = self._missing(param, state, group)
            if made:
                state = {**state, **made}
            key = (
                param.dtype,
                grad.dtype,
                param.device,
                int(state["step"]) + 1,
                bool(made) and not made.keys().isdisjoint(names),
            )
            pieces = kinds.setdefault(key, Pieces(step=key[3], is_first=key[4]))
            pieces.stepped.append((param, made))
            shard = shard_of(param)
            pieces.params.append(_flat(shard))
            pieces.grads.append(_flat(_laid_out_as(shard, grad_shard_of(param, grad))))
            for name in names:
                pieces.states[name].append(_flat(shard_of(state[name])))
                if name + "_scale" in state:
                    pieces.states[name + "_scale"].append(state[name + "_scale"])
        return list(kinds.values())

    def _begin(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The states of `param`, made where there are none."""
        with torch._C.DisableTorchFunctionSubclass():
            state: dict[str, Tensor] = self.state[param]
            state.update(self._missing(param, state, group))
        return state

    def _missing(self, param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Tensor]:
        """What `state` lacks for a step of `param`, as it is before the first one."""
        made = {} if "step" in state else {"step": torch.tensor(0.0)}
        for name in self.states_of(group):
            if state.get(name) is not None:
                continue
            value = self.initial(group)
            if group["state_dtype"] == "8bit":
                codes, _ = encode(torch.tensor(value), is_signed=self.signs[name])
                made[name] = torch.full_like(param, int(codes), dtype=torch.uint8)
                made[name + "_scale"] = torch.full((num_blocks(param.numel()),), value, device=param.device)
            else:
                made[name] = torch.full_like(param, value, dtype=STATE_DTYPES[group["state_dtype"]])
        return made

    def _adopt(self, param: Tensor, saved: Mapping[str, Any], state_dtype: str) -> dict[str, Any]:
        """What was saved of `param`, as copies in its memory layout and in `state_dtype`."""
        values = {name: saved.get(name, saved.get(name + "_codes")) for name in self.signs}
        begun = any(value is not None for value in values.values())  # torch.optim.SGD counts no steps
        state: dict[str, Any] = {"step": torch.tensor(float(saved.get("step", begun)))}
        for name, is_signed in self.signs.items():
            value = values[name]
            if value is None:
                continue
            if value.shape != param.shape:
                raise LayoutError(
                    f"{type(self).__name__}: the saved {name} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(param.shape)}. Load the state of a model of the same shapes, in the same order."
                )
            held = value.to(param.device)
            if value.dtype is torch.uint8:
                # Codes are scaled in the order of memory, which is that of the tensor they were saved as.
                scales = saved[name + "_scale"].to(param.device)
                held = _like(held, decode(_flat(held), scales, is_signed=is_signed))
            wide = torch.empty_like(param, dtype=torch.float32).copy_(held)
            if state_dtype == "8bit":
                codes, state[name + "_scale"] = encode(_flat(wide), is_signed=is_signed)
                state[name] = _like(wide, codes)
            else:
                state[name] = wide.to(STATE_DTYPES[state_dtype])
        return state


def check_averages(name: str, **settings: Any) -> None:
    """Raise ConfigError for a decay of averages outside [0, 1), or another setting below 0: torch.optim's limits."""
    for key, value in settings.items():
        values = value if key == "betas" else (value,)
        if any(isinstance(each, Tensor) and each.numel() != 1 for each in values):
            raise ConfigError(f"{name}: {key} is {value!r}; expected one number, or a tensor of one element.")
        if key == "betas" and not all(0.0 <= float(each) < 1.0 for each in values):
            raise ConfigError(f"{name}: betas are {value!r}; averages decay by factors of at least 0 and below 1.")
        if not all(float(each) >= 0.0 for each in values):
            raise ConfigError(f"{name}: {key} is {value!r}; expected 0 or more.")


def _refuse_torchs(name: str, group: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first of torch's settings that would change results, and is not served."""
    for key in ("amsgrad", "capturable", "differentiable"):
        if group.get(key):
            raise ConfigError(
                f"{name}: {key}=True is not served; the step is always fused, and not differentiable. "
                f"Leave {key} out, or take torch.optim."
            )
    if group.get("foreach") and group.get("fused"):
        raise ConfigError(
            f"{name}: foreach and fused are both True; expected one at most, as in torch. Leave both out."
        )


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(map(str, dtypes))


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the order of memory, a view; a tensor with gaps or overlaps is refused."""
    plain = tensor.detach()
    if plain.is_contiguous():
        return plain
    if torch.empty_like(plain, device="meta").stride() != plain.stride():
        raise LayoutError(
            f"A parameter of shape {tuple(plain.shape)} has strides {plain.stride()}, with gaps or overlaps; expected "
            "memory of its own. Make it with `nn.Parameter(tensor.contiguous())`."
        )
    return plain.as_strided((plain.numel(),), (1,))


def _like(layout: Tensor, flat: Tensor) -> Tensor:
    """`flat` in the shape and strides of `layout`; a view."""
    return flat.as_strided(layout.shape, layout.stride())


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    if param.stride() == grad.stride() or (param.is_contiguous() and grad.is_contiguous()):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
