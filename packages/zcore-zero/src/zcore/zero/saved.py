"""What autograd saves of gathered memory, it saves as a claim on the bucket: read in a backward, it is gathered again.

A forward saves views of weights for its backward, and the bucket they lie in is freed in between. Where modules begin
and end says when a bucket is likely to be needed, and hooks there gather ahead; but a regulariser, a loss in a list or
a frozen weight inside a product is read elsewhere. So every tensor that autograd saves is looked at, some
microseconds each, and one that lies in a bucket's memory brings the bucket back when it is read.

Under hooks torch does not check that saved tensors are unchanged, so this does. Where other hooks are on top (a
non-reentrant checkpoint, an offload) they stay in charge. They may keep views of gathered memory, which the hooks of
modules bring back for what a module reads of its own; what is read between modules is a copy then (see `Bucket.lend`).
"""

from collections.abc import Sequence
from weakref import ref

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from zcore.core import compat
from zcore.core.errors import StateError
from zcore.zero.bucket import Bucket
from zcore.zero.sharded_parameter import ShardedParameter

__all__ = ["SavedTensors", "bucket_of", "claims", "is_claimed", "others_decide"]

# Of all models, since one may run inside another's forward: by the memory of what they gather. A WeakValueDictionary
# takes many times as long to find none, which is asked of all that is saved.
BUCKETS: dict[int, ref[Bucket]] = {}

# What stands for a saved tensor: it, its version, the bucket in whose memory it lies, the values that this had, and
# what stands for the graph. A class of its own would take 0.3 us to make.
_Saved = tuple[Tensor, int, Bucket | None, tuple[int, int] | None, object | None]


class SavedTensors:
    """Open while a forward of the model runs, or while parts of it are computed again inside a backward."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._has_any = False
        for bucket in buckets:
            if bucket.is_transient:
                self._has_any = True
                _remember(compat.storage_key(bucket.memory.gathered), bucket)
        self._hooks: saved_tensors_hooks | None = None
        self._node: object | None = None  # of autograd, inside which they were opened

    @property
    def is_open(self) -> bool:
        """Whether these hooks are there, on top or below others; autograd takes away what one of its nodes opened."""
        top = compat.packs_saved_tensors()
        return top is _pack or (self._hooks is not None and top is not None)

    def open(self) -> bool:
        """Watch what is saved from now on; False where nothing is ever freed, or somebody does it already."""
        if not self._has_any or compat.packs_saved_tensors() is not None:
            return False
        self._node = compat.current_node()
        self._hooks = claims()
        self._hooks.__enter__()
        return True

    def close(self) -> None:
        """Stop watching."""
        hooks, self._hooks = self._hooks, None
        node, self._node = self._node, None
        if hooks is not None and compat.packs_saved_tensors() is not None and compat.current_node() is node:
            hooks.__exit__()


def claims() -> saved_tensors_hooks:
    """What is saved inside is saved as claims, whoever has hooks around it."""
    return saved_tensors_hooks(_pack, _unpack)


def is_claimed() -> bool:
    """Whether what autograd saves now is kept as claims."""
    return compat.packs_saved_tensors() is _pack


def others_decide() -> bool:
    """Whether what autograd saves now is kept in another way than as claims."""
    return compat.packs_saved_tensors() not in (None, _pack)


def bucket_of(tensor: Tensor) -> Bucket | None:
    """The bucket in whose gathered memory `tensor` lies, if that is ever freed."""
    found = BUCKETS.get(compat.storage_key(tensor))
    return None if found is None else found()


def _remember(key: int, bucket: Bucket) -> None:
    def forget(gone: ref[Bucket]) -> None:
        if BUCKETS.get(key) is gone:  # else another one has got memory there
            del BUCKETS[key]

    BUCKETS[key] = ref(bucket, forget)


def _pack(tensor: Tensor) -> _Saved:
    if type(tensor) is ShardedParameter:
        raise StateError(
            f"{tensor.fqn} was given to an autograd.Function outside the module that owns it, which sees this "
            "rank's fragment only. Pass `weight.view_as(weight)`, which is the whole, or call the module."
        )
    bucket = bucket_of(tensor)
    held = tensor if tensor.grad_fn is None else tensor.detach()  # an output would hold the node that holds it
    if bucket is None:
        return held, tensor._version, None, None, None
    return held, tensor._version, bucket, bucket.values, bucket.graph()


def _unpack(saved: _Saved) -> Tensor:
    tensor, version, bucket, values, _ = saved
    if tensor._version != version:
        raise StateError(
            f"A tensor of shape {tuple(tensor.shape)} and {tensor.dtype} that the forward saved for its backward "
            "was modified in place in between. torch.autograd.set_detect_anomaly(True) shows which operation had "
            "saved it; use an operation out of place, or clone() before it."
        )
    if bucket is not None:
        bucket.check_values(values)
        bucket.read_in_backward()
    return tensor
