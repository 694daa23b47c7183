"""What the optimizers share: states in the dtype asked for, and one call of an op for all parameters of a kind.

    state_dtype      kept of one state                          bytes an element
    torch.float32    exp_avg                                    4
    torch.bfloat16   exp_avg                                    2, rounded to the nearest after each step
    "8bit"           exp_avg (uint8 codes), exp_avg_scale       1 + 1/64; a block that has a NaN is NaN

A group holds it by name ("float32", "bfloat16", "8bit"), so that it goes through JSON; either may be passed.

Parameters of a group are of one kind where the dtypes of both parameter and gradient and the number of the step agree.
The ops come from the registry, so that `ZCORE_OPS=reference`, and a device without kernels, takes references.

Parameters in bf16 and fp16 are stepped in fp32 and rounded to the nearest in the same pass, as torch's fused optimizers
do; what is too small for their dtype is lost, as there. For a master in fp32 keep parameters in fp32 and compute under
autocast.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels.ops.dynamic_code import decode, encode, num_blocks
from zcore.kernels.ops.pieces import FLOATS
from zcore.kernels.optim.shards import begin_shard, grad_shard_of, shard_of

__all__ = ["FlatOptimizer", "Params", "Pieces", "StateDtype", "check_averages", "refuse"]

StateDtype = torch.dtype | Literal["float32", "bfloat16", "8bit"]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}


@dataclass(slots=True)
class Pieces:
    """Operands of one call, flat, one entry for each parameter in every list."""

    step: int  # the number of this one, from 1
    is_first: bool  # a state was made for this step
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

    def states_of(self, group: Mapping[str, Any]) -> Iterable[str]:
        """The states that parameters of `group` need."""
        return self.signs

    def step_pieces(self, group: Mapping[str, Any], pieces: Pieces) -> None:
        """Step `pieces`, whose states are in `pieces.states`, under their names and, scales, `name_scale`."""
        raise NotImplementedError

    def initial(self, group: Mapping[str, Any]) -> float:
        """What a state begins with."""
        return 0.0

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with torch._C.DisableTorchFunctionSubclass():  # a shard of a parameter is stepped as the memory that it is
                gathered = self._gather(group)
            for pieces in gathered:
                self.step_pieces(group, pieces)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own. Raises ConfigError for a dtype that is not served."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states of this class or of torch.optim's of the same name.

        Each group keeps its own `state_dtype`, to which what is loaded is converted, from codes too.
        """
        kept = [group["state_dtype"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, state_dtype, saved in zip(self.param_groups, kept, state_dict["param_groups"], strict=True):
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # torch's groups have no settings of ours
            group["state_dtype"] = state_dtype
            self._check_group(group)
            for param, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
                    self.state[param] = self._adopt(param, state_dict["state"][index], state_dtype)

    def _check_group(self, group: dict[str, Any]) -> None:
        name, asked = type(self).__name__, group["state_dtype"]
        group["state_dtype"] = str(asked).removeprefix("torch.")
        if group["state_dtype"] not in STATE_DTYPES:
            raise ConfigError(f'{name}: state_dtype is {asked!r}; expected torch.float32, torch.bfloat16 or "8bit".')
        refuse(name, amsgrad=group.get("amsgrad"))  # a loaded group may have it
        if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
            raise ConfigError(
                f"{name}: the group has decoupled_weight_decay=False, of torch.optim.Adam; expected that of AdamW. "
                "Set weight_decay to 0, or take torch.optim."
            )
        for index, param in enumerate(group["params"]):
            if param.dtype not in FLOATS:
                served = ", ".join(map(str, FLOATS))
                raise ConfigError(
                    f"{name}: parameter {index} of the group is {param.dtype}; expected {served}. "
                    "Convert the model, or take torch.optim."
                )

    def _gather(self, group: Mapping[str, Any]) -> list[Pieces]:
        kinds: dict[tuple[torch.dtype, torch.dtype, torch.device, int, bool], Pieces] = {}
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise LayoutError(
                    f"{type(self).__name__}: the gradient of parameter {index} is {grad.layout}; expected "
                    "torch.strided. Make the embedding with sparse=False."
                )
            begin_shard(
                type(self).__name__, param, state_dtype=group["state_dtype"], is_elementwise=self.is_elementwise
            )
            state = self.state[param]
            is_first = self._begin(param, group)
            state["step"] += 1
            key = (param.dtype, grad.dtype, param.device, int(state["step"]), is_first)
            pieces = kinds.setdefault(key, Pieces(step=key[3], is_first=is_first))
            shard = shard_of(param)
            pieces.params.append(_flat(shard))
            pieces.grads.append(_flat(_laid_out_as(shard, grad_shard_of(param, grad))))
            for name in self.states_of(group):
                pieces.states[name].append(_flat(shard_of(state[name])))
                if name + "_scale" in state:
                    pieces.states[name + "_scale"].append(state[name + "_scale"])
        return list(kinds.values())

    def _begin(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Make the states that `param` lacks; returns whether there were any."""
        state = self.state[param]
        state.setdefault("step", torch.tensor(0.0))
        missing = [name for name in self.states_of(group) if state.get(name) is None]
        for name in missing:
            value = self.initial(group)
            if group["state_dtype"] == "8bit":
                codes, _ = encode(torch.tensor(value), is_signed=self.signs[name])
                state[name] = torch.full_like(param, int(codes), dtype=torch.uint8)
                state[name + "_scale"] = torch.full((num_blocks(param.numel()),), value, device=param.device)
            else:
                state[name] = torch.full_like(param, value, dtype=STATE_DTYPES[group["state_dtype"]])
        return bool(missing)

    def _adopt(self, param: Tensor, saved: Mapping[str, Any], state_dtype: str) -> dict[str, Any]:
        """What was saved of `param`, as copies in its memory layout and in `state_dtype`."""
        begun = any(saved.get(name) is not None for name in self.signs)  # torch.optim.SGD counts no steps
        state: dict[str, Any] = {"step": torch.tensor(float(saved.get("step", begun)))}
        for name, is_signed in self.signs.items():
            value = saved.get(name)
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


def refuse(name: str, **asked: object) -> None:
    """Raise ConfigError for the first of torch's arguments that is asked for, and not served."""
    for argument, value in asked.items():
        if value is False if argument == "fused" else value:
            raise ConfigError(
                f"{name}: {argument}={value!r} is not served; the step is always fused, and not differentiable. "
                f"Leave {argument} out, or take torch.optim."
            )


def check_averages(name: str, **settings: Any) -> None:
    """Raise ConfigError for a decay of averages outside [0, 1), or another setting below 0."""
    betas = settings.pop("betas", ())
    if not all(0.0 <= float(beta) < 1.0 for beta in chain(betas)):
        raise ConfigError(f"{name}: betas are {betas!r}; averages decay by factors of at least 0 and below 1.")
    for key, value in settings.items():
        if not float(value) >= 0.0:
            raise ConfigError(f"{name}: {key} is {value!r}; expected 0 or more.")


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
