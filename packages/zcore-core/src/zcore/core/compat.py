"""The one place that knows how torch's names differ between releases, and private ones of its collectives and autograd.

torch 2.13 renamed the flat collectives (`all_gather_into_tensor` -> `all_gather_single`) and warns about the old names;
the wheels support torch 2.9 and later. Nothing here decides anything.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.utils.hooks import RemovableHandle

__all__ = [
    "CAN_SWAP_MEMORY",
    "Store",
    "all_gather_flat",
    "all_to_all_flat",
    "another_client_of",
    "backend_name",
    "backend_of",
    "backends_of",
    "current_backward",
    "current_node",
    "current_node_number",
    "default_store",
    "hooks_numbered_alike",
    "in_backward",
    "is_held_elsewhere",
    "is_profiled",
    "name_of",
    "packs_saved_tensors",
    "queue_backward_callback",
    "reduce_scatter_flat",
    "sequence_number",
    "start_coalesced",
    "storage_key",
    "swap_memory",
    "timeout_of",
    "tree_leaves",
]

# What starts several calls as one, a newer name first.
COALESCED = {
    "all_gather": ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
    "reduce_scatter": ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
}


def _first(*names: str) -> Callable[..., dist.Work | None]:
    """The first of `names` that this torch has."""
    return cast("Callable[..., dist.Work | None]", next(getattr(dist, name) for name in names if hasattr(dist, name)))


def all_gather_flat(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> dist.Work | None:
    """Start `output[r * n:(r + 1) * n] = input of rank r`; `input` may be this rank's own slot of `output`."""
    return _first("all_gather_single", "all_gather_into_tensor")(output, input, group=group, async_op=True)


def reduce_scatter_flat(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> dist.Work | None:
    """Start `output = sum over ranks of their slot for this rank`, in whatever order the backend sums."""
    call = _first("reduce_scatter_single", "reduce_scatter_tensor")
    return call(output, input, op=dist.ReduceOp.SUM, group=group, async_op=True)


def all_to_all_flat(output: torch.Tensor, input: torch.Tensor, *, group: dist.ProcessGroup) -> dist.Work | None:
    """Start the exchange of equal slots: slot r of `input` goes to rank r, slot r of `output` comes from it."""
    return cast("dist.Work | None", dist.all_to_all_single(output, input, group=group, async_op=True))


def start_coalesced(
    op: str, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *, group: dist.ProcessGroup
) -> dist.Work | None:
    """Start several calls of one `op`, a sum in place or a flat gather or sum, as one launch of the backend's."""
    # Backends know no complex numbers; torch's own calls look at them so, too.
    written, read = (
        [torch.view_as_real(each) if each.is_complex() else each for each in tensors] for tensors in (outputs, inputs)
    )
    if op == "all_reduce":
        return cast("dist.Work | None", group.allreduce_coalesced(written))
    start = next(getattr(group, name) for name in COALESCED[op] if hasattr(group, name))
    return cast("dist.Work | None", start(written, read))


def name_of(group: dist.ProcessGroup) -> str:
    """What torch calls a group, the same on all its ranks."""
    name: str = group.group_name
    return name


def backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    """What moves tensors on `device`; its class and names are torch's own."""
    return group._get_backend(device)


def backends_of(group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """What moves tensors in `group`, by the type of their device."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def backend_name(group: dist.ProcessGroup | None = None) -> str:
    """What moves tensors of the device computed on in `group`; of another one, if it moves none of that."""
    backends = backends_of(group)
    return backends.get("cuda" if torch.cuda.is_available() else "cpu", next(iter(backends.values())))


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of `group` waits for the other ranks."""
    device_type = "cpu" if backend_name(group) == "gloo" else "cuda"
    timeout: timedelta = backend_of(group, torch.device(device_type)).options._timeout
    return timeout


def default_store() -> Store:
    """Where the ranks of this run met, and may leave each other words."""
    store: Store = dist.distributed_c10d._get_default_store()
    return store


def another_client_of(store: Store) -> Store:
    """A connection of its own to the same store, so that a thread does not wait for another's request."""
    client: Store = store.clone()  # type: ignore[attr-defined]  # not in torch's stubs
    return client


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward pass now running has computed its last gradient."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # private in torch


def tree_leaves(value: object) -> list[object]:
    """The leaves of nested tuples, lists, dicts and registered containers such as a Hugging Face `ModelOutput`."""
    from torch.utils import _pytree  # private, and slow to load: only when a model runs

    return _pytree.tree_leaves(value)


def storage_key(tensor: torch.Tensor) -> int:
    """What identifies the memory that `tensor` is a view of as long as that lives, freed in between or not; else 0."""
    try:  # takes half as long as to ask first
        key: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # it has none
        return 0
    return key


CAN_SWAP_MEMORY = hasattr(torch.UntypedStorage, "_swap_data_ptr_")  # torch 2.13


def swap_memory(one: torch.UntypedStorage, other: torch.UntypedStorage) -> None:
    """Exchange what two storages hold; every tensor on them sees it."""
    one._swap_data_ptr_(other)  # type: ignore[attr-defined]  # private in torch, without a stub


def saved_tensors_hooks_on_top() -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None:
    """What decides in this thread how autograd saves tensors and brings them back, as of a checkpoint or an offload."""
    top: tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top


def packs_saved_tensors() -> object | None:
    """The first of the two."""
    top = saved_tensors_hooks_on_top()
    return top[0] if top is not None else None


def sequence_number() -> int:
    """What the next node of autograd's graph that this thread makes will be numbered; later ones have greater."""
    return int(torch._C._autograd._get_sequence_nr())


def is_held_elsewhere(tensor: torch.Tensor, *, num_views: int = 0) -> bool:
    """Whether other tensors share the memory of `tensor` than the caller's `num_views`."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) > 2 + num_views  # the tensor, and `storage`


def is_profiled() -> bool:
    """Whether a profiler of torch looks on."""
    return bool(torch._C._autograd._profiler_enabled())


@contextmanager
def hooks_numbered_alike() -> Iterator[None]:
    """Hooks on modules that are registered inside have numbers that no other hook has, the same ones each time.

    torch.compile runs one graph for modules that are alike, and those with hooks of other numbers are not alike to it.
    One module takes part once.
    """
    before, RemovableHandle.next_id = RemovableHandle.next_id, -2
    try:
        yield
    finally:
        RemovableHandle.next_id = before


def current_backward() -> int:
    """Which backward pass of autograd this thread is in, a nested one having a number of its own; -1 in none."""
    number: int = torch._C._current_graph_task_id()  # asked many times for each module
    return number


def current_node() -> object | None:
    """The node of autograd's graph that this thread runs; None outside of a backward."""
    node: object | None = torch._C._current_autograd_node()
    return node


def current_node_number() -> int:
    """The number of that node in its graph, above all others for one that accumulates a gradient; -1 in no backward.

    Of one graph, nodes of greater number have run.
    """
    node = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def in_backward() -> bool:
    """Whether this thread is inside a backward pass of autograd."""
    return current_backward() != -1
