"""Construct a model on meta and compute each parameter later, one at a time, with the values plain torch would give.

Inside `deferred_init()` a parameter takes no memory. Every operation that makes or edits a tensor is run on meta for
its shapes, and kept with the state of the random generator, which moves on as if the operation had run. `materialize`
then replays what one tensor depends on, whenever and in whichever order it is asked:

    record   w = empty(1000, 1000)       meta; no values
             w.uniform_(-k, k)           keep the generator's state, draw 1,000,000 numbers into scratch, drop them
             w.normal_(std=0.02)         the same; overwrites all of w, so the draw above is never replayed
    replay   w: empty, then normal_ from its kept state

Small constants (`zeros`, `arange`, ... up to SMALL_NUMEL) are made for real, since constructors look at their values.
"""

from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from zcore.core.errors import StateError

__all__ = ["Recording", "deferred_init", "find_recording", "recording_of"]

SMALL_NUMEL = 2**16
OVERWRITES = frozenset(
    {
        "normal_",
        "uniform_",
        "zero_",
        "fill_",
        "copy_",
        "random_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
    }
)  # in-place operations that read nothing of what they write, if they write all of it
READS_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
READS_VALUES = frozenset({Tensor.tolist, Tensor.numpy})  # calls that never arrive at the dispatcher
IS_META, DEVICE = Tensor.is_meta.__get__, Tensor.device.__get__  # type: ignore[attr-defined]  # descriptors at run time
TAG = "_zcore_recording"  # on modules, since `deepcopy` of a module carries its attributes along


@dataclass(frozen=True, slots=True)
class _Ref:
    """A tensor of the recording: a view of a numbered storage."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Operation:
    """One recorded call; tensors of the recording stand as `_Ref`, others as they were."""

    func: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    random_state: Tensor | None  # of the call's generator
    default_dtype: torch.dtype
    outputs: tuple[_Ref, ...]  # storages that the call makes
    reads: tuple[int, ...]
    overwrites: int | None  # the storage of which nothing from before is left

    @property
    def storages(self) -> set[int]:
        """All that the call reads, edits or makes."""
        overwritten = () if self.overwrites is None else (self.overwrites,)
        return {*self.reads, *overwritten, *(ref.storage for ref in self.outputs)}


class Recording(TorchDispatchMode):
    """The operations of one construction. Entered as a mode it records; afterwards it materialises."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is not annotated
        self._operations: list[_Operation] = []
        self._writers: list[list[int]] = []  # per storage: the operations that make or edit it
        self._devices: list[torch.device] = []  # per storage: where it will be
        self._storages: dict[int, tuple[int, torch.UntypedStorage]] = {}  # by address; held, so no address is reused
        self._scratch: torch.UntypedStorage | None = None  # in which numbers are drawn

        self.is_open = True  # inside the block, where operations are recorded

    def close(self) -> None:
        """The construction is over: what is recorded from now on is asked for by `resumed`."""
        self.is_open = False
        self._scratch = None

    def __deepcopy__(self, memo: dict[int, object]) -> "Recording":
        return self  # a copied module refers to the same construction

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` has no values yet and can be materialised here."""
        return _is_meta(tensor) and tensor.untyped_storage()._cdata in self._storages

    def device_of(self, tensor: Tensor) -> torch.device:
        """Where `tensor` will be once it has values."""
        return self._devices[self._ref(tensor).storage]

    def later(self, read: Callable[[], Tensor], *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without memory whose values on the CPU `read` gives, contiguous, whenever they are wanted."""
        made = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._append(read, (), {}, random_state=None, made=[made], writes=[])
        return made

    @contextmanager
    def resumed(self) -> Generator[None]:
        """Operations inside are recorded, whether the construction is over or not."""
        if self.is_open:
            yield
            return
        with self:
            yield

    def materialize(self, tensor: Tensor) -> Tensor:
        """The values of `tensor`, computed now; nothing is kept."""
        with torch.no_grad(), torch._C._DisableTorchDispatch():  # asked by a constructor, nothing here is recorded
            return self._replay(self._ref(tensor), before=len(self._operations))

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Record `func` if it makes memory or touches a tensor without values; run it otherwise."""
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        deferred = [each for each in tensors if self.owns(each)]
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if deferred and (_reads_values(func, args) or _edits_real(func, args, kwargs)):
            args, kwargs = tree_map_only(Tensor, self.real, (args, kwargs))
            return func(*args, **kwargs)
        if func is torch.ops.aten.empty_like.default and not deferred and _is_meta(tensors[0]):
            # Models are built on meta in order to be loaded, and this is how they are given memory.
            func, args, kwargs = _without_tensor(tensors[0], kwargs)
            tensors = []
        if func is torch.ops.aten.scalar_tensor.default:  # torch makes it of the number in `weight[2:4] = 1.0`
            kwargs["device"] = torch.device("cpu")
        elif not deferred:
            is_factory = not tensors and any(each.name == "device" for each in func._schema.arguments)
            if not is_factory or torch.device(cast(str, kwargs.get("device") or "cpu")).type == "meta":
                return func(*args, **kwargs)
            if not is_random and _is_kept(func, args, kwargs):
                return func(*args, **kwargs)
        return self._record(func, args, kwargs, is_random=is_random)

    def _record(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], *, is_random: bool
    ) -> object:
        known = set(self._storages)
        meta_args, meta_kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        if "device" in {each.name for each in func._schema.arguments}:
            meta_kwargs["device"] = torch.device("meta")
        result = func(*meta_args, **meta_kwargs)
        outputs = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        made = [each for each in outputs if each.untyped_storage()._cdata not in known]
        writes = _written(func, args, kwargs)
        if not made and not any(self.owns(each) for each in writes):
            return result  # a view
        random_state = self._draw(func, args, kwargs) if is_random else None
        overwrites = func._schema.name.partition("::")[2] in OVERWRITES
        self._append(func, args, kwargs, random_state=random_state, made=made, writes=writes, overwrites=overwrites)
        return writes[0] if writes and len(outputs) == 1 and not made else result

    def _append(
        self,
        func: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        *,
        random_state: Tensor | None,
        made: Sequence[Tensor],
        writes: Sequence[Tensor],
        overwrites: bool = False,
    ) -> None:
        frozen_args, frozen_kwargs = tree_map_only(Tensor, self._freeze, (args, kwargs))
        reads = [each for each in tree_flatten((frozen_args, frozen_kwargs))[0] if isinstance(each, _Ref)]
        target = torch.device(cast(str, kwargs.get("device") or (self._devices[reads[0].storage] if reads else "cpu")))
        for each in made:
            storage = each.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = len(self._writers), storage
                self._writers.append([])
                self._devices.append(target)
        written = {self._ref(each).storage for each in (*made, *writes) if self.owns(each)}
        overwritten = None
        if len(writes) == 1 and overwrites and self.owns(writes[0]):
            edited = writes[0]
            if edited.numel() * edited.element_size() == edited.untyped_storage().nbytes():
                overwritten = self._ref(edited).storage
        for storage_index in written:
            self._writers[storage_index].append(len(self._operations))
        self._operations.append(
            _Operation(
                func,
                frozen_args,
                frozen_kwargs,
                random_state,
                torch.get_default_dtype(),
                outputs=tuple(self._ref(each) for each in made),
                reads=tuple(ref.storage for ref in reads if ref.storage != overwritten),
                overwrites=overwritten,
            )
        )

    def _draw(self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
        """Move the call's generator on as if `func` had run, and return the state it had before."""
        state = _generator_of(kwargs).get_state()

        name = func._schema.name.partition("::")[2]
        reads_nothing = name in OVERWRITES or name.endswith("_like")
        # Means and probabilities are refused out of range, and decide how many numbers some operations draw.
        stand_in = self._scratch_for if reads_nothing else self.real
        args, kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
        func(*args, **kwargs)
        return state

    def _scratch_for(self, tensor: Tensor) -> Tensor:
        """Memory like `tensor`, if that has none. The same for all: glibc would keep what each of them lets go."""
        if not self.owns(tensor):
            return tensor
        if self._scratch is None or self._scratch.nbytes() < tensor.untyped_storage().nbytes():
            self._scratch = None
            self._scratch = torch.UntypedStorage(tensor.untyped_storage().nbytes())
        return torch.empty(0, dtype=tensor.dtype).set_(self._scratch, 0, tensor.size(), tensor.stride())

    def _ref(self, tensor: Tensor) -> _Ref:
        index, _ = self._storages[tensor.untyped_storage()._cdata]
        return _Ref(index, tuple(tensor.size()), tensor.stride(), cast(int, tensor.storage_offset()), tensor.dtype)

    def _freeze(self, tensor: Tensor) -> _Ref | Tensor:
        if self.owns(tensor):
            return self._ref(tensor)
        if tensor.is_meta:
            raise StateError(
                f"A tensor on the meta device (shape {tuple(tensor.shape)}) without values is used inside `zero.Init` "
                'to compute a parameter. Leave out `device="meta"` there: zero.Init itself takes care of memory.'
            )
        return tensor.detach().clone()

    def real(self, tensor: Tensor) -> Tensor:
        """`tensor` with values: materialised if it is of this recording, else itself."""
        return self.materialize(tensor) if self.owns(tensor) else tensor

    def _writers_that_decide(self, storage: int, *, before: int) -> list[int]:
        """The operations that make and edit `storage` up to operation `before`; no edits that were overwritten."""
        made, *edits = self._writers[storage][: bisect_left(self._writers[storage], before)]
        overwrites = (index for index, each in enumerate(edits) if self._operations[each].overwrites == storage)
        return [made, *edits[max(overwrites, default=0) :]]

    def _needed(self, storage: int, *, before: int) -> list[int]:
        """All operations, in order, on which depends what `storage` holds when operation `before` starts."""
        found: set[int] = set()
        to_follow = [(storage, before)]
        while to_follow:
            storage, before = to_follow.pop()
            for position in self._writers_that_decide(storage, before=before):
                if position not in found:
                    found.add(position)
                    to_follow += [(read, position) for read in set(self._operations[position].reads)]
        return sorted(found)

    def _replay(self, wanted: _Ref, *, before: int) -> Tensor:
        storages: dict[int, Tensor] = {}

        def real(ref: _Ref) -> Tensor:
            base = storages[ref.storage]
            start = cast(int, base.storage_offset()) * base.element_size() // ref.dtype.itemsize  # in a file's memory
            typed = torch.empty(0, dtype=ref.dtype, device=base.device)
            return typed.set_(base.untyped_storage(), start + ref.offset, ref.size, ref.stride)

        needed = self._needed(wanted.storage, before=before)
        last_use = {storage: position for position in needed for storage in self._operations[position].storages}
        last_use[wanted.storage] = before
        for position in needed:
            operation = self._operations[position]
            args, kwargs = tree_map_only(_Ref, real, (operation.args, operation.kwargs))
            with _as_it_was(operation):
                result = operation.func(*args, **kwargs)
            made = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)][-len(operation.outputs) :]
            for ref, tensor in zip(operation.outputs, made, strict=False):
                storages[ref.storage] = tensor
            del args, kwargs, result, made
            for storage in operation.storages:
                if last_use[storage] == position:
                    storages.pop(storage, None)
        return real(wanted)


class _Poised(TorchFunctionMode):
    """Lets a tensor without values answer like the one it will be.

    Needed because torch's initialisers skip what says that it is on meta.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Answer what recorded tensors are asked about values, `is_meta` and `device`; pass everything else on."""
        if func in (IS_META, DEVICE) and isinstance(args[0], Tensor) and self._recording.owns(args[0]):
            return False if func == IS_META else self._recording.device_of(args[0])
        if func in READS_VALUES:
            args = tree_map_only(Tensor, self._recording.real, args)
        return func(*args, **(kwargs or {}))


def _reads_values(func: torch._ops.OpOverload, args: tuple[object, ...]) -> bool:
    if func is torch.ops.aten.index.Tensor:  # only a mask decides how many elements there will be
        return any(each.dtype in (torch.bool, torch.uint8) for each in cast(list[Tensor], args[1]) if each is not None)
    return not READS_TAGS.isdisjoint(func.tags)


def _generator_of(kwargs: Mapping[str, object]) -> torch.Generator:
    return cast(torch.Generator | None, kwargs.get("generator")) or torch.default_generator


def _is_meta(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():  # recorded tensors deny it
        return tensor.is_meta


def _edits_real(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether `func` writes to a tensor that has values, such as a small constant."""
    return any(not _is_meta(each) for each in _written(func, args, kwargs))


def _without_tensor(
    tensor: Tensor, kwargs: Mapping[str, object]
) -> tuple[torch._ops.OpOverload, tuple[object, ...], dict[str, object]]:
    """`empty_like(tensor, **kwargs)` as a call that needs no tensor."""
    like = torch.ops.aten.empty_like.default(tensor, **{**kwargs, "device": torch.device("meta")})
    sizes = (list(like.size()), list(like.stride()))
    device = kwargs.get("device") or torch.device("meta")
    return torch.ops.aten.empty_strided.default, sizes, {"dtype": like.dtype, "device": device}


@contextmanager
def _as_it_was(operation: _Operation) -> Generator[None]:
    """What a call depends on besides its arguments, for the length of the block."""
    generator, dtype = _generator_of(operation.kwargs), torch.get_default_dtype()
    state = generator.get_state() if operation.random_state is not None else None
    try:
        if operation.random_state is not None:
            generator.set_state(operation.random_state)
        torch.set_default_dtype(operation.default_dtype)
        yield
    finally:
        torch.set_default_dtype(dtype)
        if state is not None:
            generator.set_state(state)


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _is_kept(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether the call makes a small constant; or nothing, which programs then give the memory of a file."""
    result = func(*args, **{**kwargs, "device": torch.device("meta")})
    has_values = not func._schema.name.startswith("aten::empty")
    return isinstance(result, Tensor) and result.numel() <= (SMALL_NUMEL if has_values else 0)


def _written(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The tensors that `func` edits in place."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]
    return written


@contextmanager
def deferred_init() -> Generator[Recording]:
    """Modules constructed inside have parameters and buffers without memory, to be materialised later."""
    recording = Recording()

    def tag(module: nn.Module, name: str, value: Tensor | None) -> None:
        if TAG not in module.__dict__:
            module.register_load_state_dict_pre_hook(_refuse_load_after)
        module.__dict__[TAG] = recording

    handles = [register_module_parameter_registration_hook(tag), register_module_buffer_registration_hook(tag)]
    try:
        with recording, _Poised(recording):
            yield recording
    finally:
        recording.close()
        for handle in handles:
            handle.remove()


def _refuse_load_after(module: nn.Module, *rest: object) -> None:
    recording = module.__dict__.get(TAG)  # gone once the module is sharded
    if isinstance(recording, Recording) and not recording.is_open:
        raise StateError(
            "load_state_dict() was called on a model of `zero.Init` after the block, where its parameters have no "
            "memory to load into. Call it inside the block, or `zero.load_pretrained(model, path)`, which needs none."
        )


def find_recording(module: nn.Module, tensor: Tensor) -> Recording | None:
    """The recording that can materialise `tensor`, found on any module of the tree it belongs to."""
    for each in module.modules():
        recording = each.__dict__.get(TAG)
        if isinstance(recording, Recording) and recording.owns(tensor):
            return recording
    return None


def recording_of(module: nn.Module, tensor: Tensor, name: str) -> Recording:
    """The same. Raises StateError for a tensor on meta that was not constructed inside `deferred_init`."""
    recording = find_recording(module, tensor)
    if recording is not None:
        return recording
    if any(TAG in each.__dict__ for each in module.modules()):
        raise StateError(
            f"{name} has no values: it was made for this model after the `zero.Init` block that constructed the rest, "
            "where adapters and resized embeddings take the device of what they are next to, meta. Add and resize "
            "inside that same block: there torch's own initialisers run, and read the values that they need."
        )
    raise StateError(
        f"{name} is on the meta device, but was not constructed inside `zero.Init`, so its values are "
        "unknown. Construct the model inside `with zero.Init():` instead of `with torch.device('meta'):`, or "
        "give it values first."
    )
