"""What a module has registered while its parameters are sharded: this rank's fragment, which knows what it is part of.

An optimizer steps it like any parameter. In a forward it stands for the whole: whoever uses it there, outside the
module that owns it, has it gathered (a weight that one module borrows from another just works). Used anywhere else,
where a fragment would give a wrong result or a puzzling shape error, it refuses by name.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zcore.core.errors import StateError

if TYPE_CHECKING:
    from zcore.zero.parts import Parts

__all__ = ["GRAD", "FragmentValues", "ParameterOwner", "ShardedParameter", "UnreducedGradient", "lost_edit"]

# What acts on each element by itself, and so means the same on a fragment: optimizers may, without autograd.
ELEMENTWISE = frozenset(
    name
    for names in (
        "add sub mul div true_divide neg abs sign sqrt rsqrt square pow exp log reciprocal sigmoid tanh lerp addcmul",
        "addcdiv clamp clamp_min clamp_max maximum minimum where isnan isinf isfinite eq ne lt gt le ge",
        "clone to float double half bfloat16 cpu cuda type contiguous",
        "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__",
        "__itruediv__ __neg__ __pow__ __abs__",
        "copy zero fill masked_fill nan_to_num sgn floor ceil round trunc frac exp2 expm1 log1p log2 erf sin cos",
        "absolute negative subtract multiply divide clip",
    )
    for name in names.split()
)
# What may be asked while the values are elsewhere.
METADATA = frozenset(
    name
    for names in (
        "stride storage_offset element_size get_device data_ptr untyped_storage detach requires_grad_",
        "is_floating_point is_complex is_contiguous __hash__ __format__ __repr__ __get__ __set__",
    )
    for name in names.split()
)
# What is answered of the whole at any time, without its values: shapes decide who gets weight decay.
OF_THE_WHOLE = frozenset({"size", "dim", "ndimension", "numel", "nelement", "__len__", "register_hook"})
SHAPE_PROPERTIES = frozenset({"shape", "ndim"})
DATA_SET = Tensor.data.__set__  # type: ignore[attr-defined]  # a descriptor at run time
GRAD: Any = Tensor.grad  # a descriptor at run time
REQUIRES_GRAD: Any = Tensor.requires_grad
STEPS = ("_foreach_", "_fused_")  # what optimizers call
VIEW_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "imag"})


class ParameterOwner(Protocol):
    """The bucket that a fragment belongs to, as the fragment needs it."""

    def parts(self, index: int) -> "Parts":
        """Where the parts of a parameter lie over the ranks."""
        ...

    def stands_for_whole(self) -> bool:
        """Whether the parameters are being read or edited whole."""
        ...

    def keeps_edits(self) -> bool:
        """Whether what is written to the whole parameter outlasts its gathered memory."""
        ...

    def mark_stale(self) -> None:
        """The fragment is edited in place: what was gathered is out of date."""
        ...

    def may_gather(self) -> bool:
        """Whether a forward or backward of the model is running, so that using the parameter means the whole."""
        ...

    def whole(self, index: int) -> Tensor:
        """The whole parameter, as what it is; its data may be elsewhere."""
        ...

    def lend(self, index: int) -> Tensor:
        """The whole parameter with its data, until `take_back`."""
        ...

    def take_back(self) -> None:
        """An operation that was lent a parameter is over."""
        ...

    def follow(self, index: int, *, is_trained: bool) -> None:
        """The fragment of a parameter is frozen, or thawed."""
        ...

    def keep_for(self, result: object) -> None:
        """The data stay until the forward ends if `result`, of such an operation, is a view of them."""
        ...


class ShardedParameter(nn.Parameter):
    """This rank's fragment of one parameter: flat, a view of the bucket's master shard, possibly empty."""

    fqn: str
    full_shape: tuple[int, ...]
    full_start: int  # where the fragment begins in the flattened parameter
    full_stop: int
    position: int  # in its bucket
    use_muon: bool  # whether optimizers for hidden matrices step it
    _owner: "weakref.ref[ParameterOwner]"  # weak: the bucket owns the fragment

    @classmethod
    def of(
        cls,
        fragment: Tensor,
        *,
        owner: ParameterOwner,
        index: int,
        fqn: str,
        full_shape: tuple[int, ...],
        start: int,
        is_trained: bool,
    ) -> "ShardedParameter":
        """Wrap `fragment` without a copy."""
        self = Tensor._make_subclass(cls, fragment, is_trained)
        self._owner, self.position = weakref.ref(owner), index
        self.fqn, self.full_shape = fqn, full_shape
        self.full_start, self.full_stop = start, start + fragment.numel()
        return self

    @property
    def owner(self) -> ParameterOwner | None:
        """The bucket, or None once the sharded model is gone."""
        return self._owner()

    @property
    def grad(self) -> Tensor | None:
        """The fragment's gradient. Read of every parameter in every step, so not by way of `__torch_function__`."""
        with torch._C.DisableTorchFunctionSubclass():
            found: Tensor | None = GRAD.__get__(self)
            return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            GRAD.__delete__(self)

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter is trained."""
        with torch._C.DisableTorchFunctionSubclass():
            found: bool = REQUIRES_GRAD.__get__(self)
            return found

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            REQUIRES_GRAD.__set__(self, value)
        owner = self.owner
        if owner is not None:
            owner.follow(self.position, is_trained=value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """See `torch.Tensor.requires_grad_`."""
        self.requires_grad = requires_grad
        return self

    def __repr__(self) -> str:  # type: ignore[override]  # torch types it with a keyword of its own
        held = f"[{self.full_start}:{self.full_stop}]"
        return f"ShardedParameter({self.fqn}, shape {self.full_shape}, this rank holds elements {held})"

    def __deepcopy__(self, memo: dict[int, object]) -> "ShardedParameter":
        raise StateError(
            f"{self.fqn} is sharded and cannot be copied on its own. Copy the model before sharding it, or take "
            "`engine.consolidated_state_dict()` and load it into a second model."
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Act as the fragment for optimizers and metadata, as the whole in a forward, and refuse elsewhere."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            first = _first_sharded(args, kwargs)
            if first is None or first.owner is None:
                return func(*args, **kwargs)
            if func == DATA_SET or func is torch._has_compatible_shallow_copy_type:
                if _is_same_memory(args):
                    return func(*args, **kwargs)  # model.to() the device and dtype that it has
                raise StateError(
                    f"{first.fqn} is sharded, and its .data was to be replaced, as model.to(), .half() or an "
                    "assignment do. Cast and move the model before sharding; copy values into place with "
                    "`zero.GatheredParameters`."
                )
            if func.__name__ in OF_THE_WHOLE or _property_name(func) in SHAPE_PROPERTIES:
                return _call_on_whole(func, args, kwargs, with_data=False)
            if first.owner.may_gather() or first.owner.stands_for_whole():
                if first is args[0] and _is_in_place(func) and _wants_values(func) and not first.owner.keeps_edits():
                    raise lost_edit(first.fqn)
                wants_data = _wants_values(func) or func.__name__ == "detach" or _property_name(func) == "data"
                return _call_on_whole(func, args, kwargs, with_data=wants_data)
            if _wants_values(func) and (torch.is_grad_enabled() or not _is_elementwise(func)):
                raise StateError(_outside_forward(first, func))
            if func.__name__ == "copy_":
                _refuse_whole(first, args)
            _note_edit(func, args)
            if _property_name(func) == "data":  # with the version counter of the fragment: edits show, and reads do not
                return first.detach().as_subclass(FragmentValues)
            return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise StateError(
            f"{self.fqn} is sharded and cannot be saved or sent as it is. Save `engine.consolidated_state_dict()`, or "
            "a checkpoint of the engine."
        )

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> NoReturn:
        """Refused: there is no moment inside the backward at which `.grad` is whole and reduced."""
        raise StateError(
            f"{self.fqn} is sharded, and its gradient is there after the backward, not in it: a hook that waits for "
            ".grad would never run. Step the optimizer after the backward; `register_hook` works."
        )


NORMS = (torch.norm, torch.linalg.norm, torch.linalg.vector_norm, torch._foreach_norm, Tensor.norm)
RANDOM = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_"}


class FragmentValues(Tensor):
    """Values of one rank's part, as `.grad` and `.data` of a fragment give them.

    A norm would be this rank's only, and a random fill would repeat itself in each rank's part: both are refused.
    Everything else is as on a plain tensor.
    """

    # Optimizers ask it of every gradient in every step: by way of `__torch_function__` the answer takes 2 us.
    is_sparse = False

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Refuse what has no meaning on a part."""
        if func in NORMS:
            raise StateError(
                "A norm was asked of one rank's part of a parameter or gradient, and would differ from rank to rank. "
                "Use `zero.clip_grad_norm_(model, max_norm)`, or the `gradient_clipping` setting of the engine; for "
                "your own arithmetic on the local values take `part.as_subclass(torch.Tensor)`."
            )
        if func.__name__ in RANDOM:
            raise StateError(
                f"`{func.__name__}` would fill each rank's part of a parameter with the same numbers. Initialise "
                "before sharding, or inside `with zero.GatheredParameters([param], modifier_rank=0)`."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and (func.__name__ == "detach" or _property_name(func) == "data"):
                return result.as_subclass(FragmentValues)
            return result


class UnreducedGradient(FragmentValues):
    """Stands for a gradient that this rank has accumulated and no backward has reduced: it can only be dropped."""

    was_zeroed = False

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Note that it is zeroed, answer what has no values, refuse the rest."""
        name = func.__name__
        if name in ("zero_", "_foreach_zero_") or (name == "fill_" and tuple(args[1:]) == (0,)):
            for each in args[0] if isinstance(args[0], list | tuple) else args[:1]:
                if isinstance(each, UnreducedGradient):
                    each.was_zeroed = True
                elif isinstance(each, Tensor):
                    each.zero_()
            return args[0]
        if name in ("detach", "detach_") or _property_name(func) == "data":
            return args[0]
        if _wants_values(func) and name not in OF_THE_WHOLE and _property_name(func) not in SHAPE_PROPERTIES:
            raise StateError(
                f"`{name}` was called on a gradient that is not reduced yet: the last backward ran inside "
                "no_sync(), or is not the last one of its step. Step, clip and read gradients after a backward outside "
                "no_sync()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _first_sharded(args: Sequence[object], kwargs: Mapping[str, object]) -> ShardedParameter | None:
    return next(_all_sharded((*args, *kwargs.values())), None)


def _wants_values(func: Callable[..., object]) -> bool:
    """False for what an object may be asked while its values are elsewhere: attributes, sizes, `detach`, `*_like`."""
    name = func.__name__
    return not (name in METADATA or name.endswith("_like")) or _property_name(func) in VIEW_PROPERTIES


def _property_name(func: Callable[..., object]) -> str:
    """`T` for the getter of `Tensor.T`; empty for what is no getter."""
    return getattr(getattr(func, "__self__", None), "__name__", "")


def _is_elementwise(func: Callable[..., object]) -> bool:
    name = func.__name__
    if name.startswith(STEPS):
        return name != "_foreach_norm"
    return name in ELEMENTWISE or (_is_in_place(func) and name.removesuffix("_") in ELEMENTWISE)


def _is_in_place(func: Callable[..., object]) -> bool:
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _note_edit(func: Callable[..., object], args: Sequence[object]) -> None:
    """Tell the buckets of parameters that `func` edits, which are its first argument or in that."""
    if _is_in_place(func) and _wants_values(func):
        for owner in {param.owner for param in _all_sharded(args[:1])}:
            if owner is not None:
                owner.mark_stale()


def _refuse_whole(param: ShardedParameter, args: Sequence[object]) -> None:
    held, new = args[0], args[1]
    held_numel = param.full_stop - param.full_start
    if held is param and isinstance(new, Tensor) and new.numel() != 1 and tuple(new.shape) != (held_numel,):
        raise StateError(
            f"{param.fqn} is sharded: this rank holds {held_numel} of its elements, in a row, and a tensor of shape "
            f"{tuple(new.shape)} was to be copied into them. Copy whole values inside `with "
            "zero.GatheredParameters([param], modifier_rank=0)`."
        )


def _all_sharded(args: Sequence[object]) -> Iterator[ShardedParameter]:
    for arg in args:
        for each in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(each, ShardedParameter):
                yield each


def _is_same_memory(args: Sequence[object]) -> bool:
    held, new = args
    if not isinstance(held, Tensor) or not isinstance(new, Tensor):
        return False
    return held.dtype == new.dtype and held.data_ptr() == new.data_ptr() and held.shape == new.shape


def _call_on_whole(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], *, with_data: bool
) -> object:
    lenders: list[ParameterOwner] = []  # all are kept until the operation is over: gathering one may release others

    def whole(param: ShardedParameter) -> Tensor:
        owner = param.owner
        if owner is None or not with_data:
            return param if owner is None else owner.whole(param.position)
        lent = owner.lend(param.position)
        lenders.append(owner)
        return lent

    try:
        args, kwargs = tree_map_only(ShardedParameter, whole, (tuple(args), dict(kwargs)))
        result = func(*args, **kwargs)
    finally:
        for owner in lenders:
            owner.take_back()
    for owner in lenders:
        owner.keep_for(result)
    return result


def lost_edit(fqn: str) -> StateError:
    """The error for an edit of a copy that will be freed, or written anew."""
    return StateError(
        f"{fqn} was edited in place inside the model's forward, as clipping of weights or max_norm of an embedding do. "
        "That edits the copy which computes: under stage 3 it is freed, and with `bf16` or `fp16` it is written anew "
        "from the fp32 master. Edit it between steps inside `with zero.GatheredParameters([param], modifier_rank=0)`, "
        "or use stage 0, 1 or 2 in fp32 or under `torch_autocast`."
    )


def _outside_forward(param: ShardedParameter, func: Callable[..., object]) -> str:
    if func.__name__ in ("backward", "grad"):  # of torch.autograd, with parameters to differentiate by
        return (
            f"A derivative by {param.fqn} was asked for, which is sharded: this rank's fragment is no part of the "
            "graph. Call `loss.backward()` and read `.grad`; or make the loss and take the derivative by what "
            "is whole, inside `with zero.GatheredParameters([param]) as (whole,)`."
        )
    return (
        f"{param.fqn} (shape {param.full_shape}) is sharded, and `{func.__name__}` was called on it outside the "
        "model's forward, where a parameter is this rank's fragment, flat, at every stage. Use it inside the forward "
        "of the sharded model; or read it inside `with zero.GatheredParameters([param])`, from where a loss may use "
        "it, and edit it there with `modifier_rank=...`; or look at the local fragment with `param.detach()`."
    )
