"""Where the model tells the sharding what it is about to do. Hooks ask for transitions and decide nothing.

root forward     begin: phase, inputs cast, stale whole buckets refreshed      end: back to rest without autograd
site forward     a block, or a module that owns parameters: its buckets AVAILABLE before, idle after
site outputs     gradients are about to flow into the site: its buckets AVAILABLE again
site inputs      all gradients of the site's inputs are there: it reads its parameters no more
parameter        its gradient is final for this backward: move it into the bucket
end of backward  reduce what is left, hand out gradients, everything SHARDED
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from zcore.core import compat
from zcore.core.errors import StateError
from zcore.zero.bucket import Bucket
from zcore.zero.gathering import Gatherer
from zcore.zero.precision import Precision
from zcore.zero.reduction import Reducer
from zcore.zero.trace import Pass

__all__ = ["Conductor", "Phase", "Site"]


logger = logging.getLogger(__name__)


class Phase(Enum):
    """What the root module is doing."""

    REST = auto()
    FORWARD = auto()
    BACKWARD = auto()


class Site:
    """A module whose forward uses buckets."""

    __slots__ = ("buckets", "name")

    def __init__(self, name: str, buckets: Sequence[Bucket]) -> None:
        self.name = name
        self.buckets = tuple(buckets)


class Conductor:
    """Turns hooks into requests to the gatherer and the reducer; keeps the phase."""

    def __init__(
        self, buckets: Sequence[Bucket], *, gatherer: Gatherer, reducer: Reducer, precision: Precision
    ) -> None:
        self._buckets = buckets
        self.gatherer = gatherer
        self._reducer = reducer
        self._precision = precision
        self._phase = Phase.REST
        self._open_calls: dict[int, int] = {}  # per bucket: calls whose input gradients are still to come
        self.has_gradients = False  # whether a parameter got one in the last backward
        self._complete: set[int] = set()  # buckets whose gradients are all there
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for bucket in buckets:
            bucket.host = weakref.ref(self)

    def attach(self, root: nn.Module, sites: Sequence[tuple[nn.Module, Site]]) -> None:
        """Install every hook. The modules keep the conductor alive; nothing below keeps the modules alive."""
        keep = self._handles.append
        untraced: Callable[[Any], Any] = torch.compiler.disable  # torch.compile is to see the modules, not these
        for module, site in sites:  # before the root's: a root that owns parameters begins first, and ends last
            keep(module.register_forward_pre_hook(untraced(self._site_pre(site)), with_kwargs=True))
            keep(module.register_forward_hook(untraced(self._site_post(site))))
        keep(root.register_forward_pre_hook(untraced(self._root_pre), with_kwargs=True, prepend=True))
        keep(root.register_forward_hook(untraced(self._root_post), always_call=True))
        for bucket in self._buckets:
            if bucket.gradients is None:
                continue
            for index, param in enumerate(bucket.params):
                keep(
                    param.full.register_post_accumulate_grad_hook(_on_gradient(weakref.ref(self), bucket.index, index))
                )

    def __reduce__(self) -> str:
        raise StateError(
            "A sharded model cannot be copied or pickled: its parameters are spread over the ranks. Copy the model "
            "before sharding it, or load `engine.consolidated_state_dict()` into a second model, as for an average."
        )

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def is_running(self) -> bool:
        """See BucketHost."""
        return self._phase is not Phase.REST

    def borrow(self, bucket: Bucket) -> None:
        """See BucketHost."""
        self.gatherer.use(bucket, self._pass, module="an operation outside its module")
        self.gatherer.let_go(bucket, self._pass)

    def watch_outputs(self, bucket: Bucket, result: object) -> None:
        """See BucketHost."""
        if bucket.is_transient and torch.is_grad_enabled():
            self._hook_tensors(result, self._before_backward_of((bucket,)))

    @property
    def _pass(self) -> Pass:
        return Pass.BACKWARD if self._phase is Phase.BACKWARD else Pass.FORWARD

    def _root_pre(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        if compat.in_backward():  # recomputation of a checkpointed root: the step is under way already
            return self._precision.cast_inputs(args, kwargs)
        if self._phase is Phase.BACKWARD:
            self._recover()
        self._phase = Phase.FORWARD
        self.gatherer.begin(training=torch.is_grad_enabled())
        return self._precision.cast_inputs(args, kwargs)

    def _root_post(self, module: nn.Module, args: object, result: object) -> None:
        if compat.in_backward():
            return
        self._phase = Phase.REST
        if torch.is_grad_enabled():
            self.gatherer.conceal()
        else:
            self.gatherer.rest()

    def _site_pre(self, site: Site) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            during = self._pass
            outermost = False
            for bucket in site.buckets:
                outermost |= self.gatherer.enter(bucket, during, module=site.name)
            if outermost and during is Pass.FORWARD and torch.is_grad_enabled():
                self._watch_inputs(site, (args, kwargs))

        return enter

    def _site_post(self, site: Site) -> Callable[[nn.Module, object, object], None]:
        transient = tuple(bucket for bucket in site.buckets if bucket.is_transient)
        before_backward = self._before_backward_of(transient)

        def leave(module: nn.Module, args: object, result: object) -> None:
            if transient and torch.is_grad_enabled() and self._phase is not Phase.BACKWARD:
                self._hook_tensors((result, _kept_on(module)), before_backward)
            outermost = [self.gatherer.leave(bucket, self._pass) for bucket in site.buckets]
            if self._phase is Phase.REST and all(outermost):  # a submodule that was called by itself
                if torch.is_grad_enabled():
                    self.gatherer.conceal()
                else:
                    self.gatherer.rest()

        return leave

    def _before_backward_of(self, buckets: Sequence[Bucket]) -> Callable[[Tensor], None]:
        def gather_again(grad: Tensor) -> None:
            if torch.is_grad_enabled():
                raise StateError(
                    "A backward with create_graph=True ran through sharded parameters, which are freed before the "
                    "second backward would need them. Use stage 2 for gradient penalties."
                )
            self._begin_backward()
            for bucket in buckets:
                bucket.check_unchanged()
                self.gatherer.use(bucket, Pass.BACKWARD, module="the backward pass")

        return gather_again

    @staticmethod
    def _hook_tensors(result: object, hook: Callable[[Tensor], None]) -> None:
        for tensor in _tensors_in(result):
            if tensor.requires_grad:
                tensor.register_hook(hook)

    def _watch_inputs(self, site: Site, inputs: object) -> None:
        """Count the call as open until all gradients of its inputs are there."""
        buckets = tuple(bucket for bucket in site.buckets if bucket.is_transient)
        tensors = [each for each in _tensors_in(inputs) if each.requires_grad]
        if not buckets or not tensors:
            return
        for bucket in buckets:
            self._open_calls[bucket.index] = self._open_calls.get(bucket.index, 0) + 1

        to_come = len(tensors)

        def note(grad: Tensor) -> None:
            nonlocal to_come
            to_come -= 1
            if to_come == 0:
                for bucket in buckets:
                    self._open_calls[bucket.index] = max(0, self._open_calls.get(bucket.index, 0) - 1)
                    self._release_if_done(bucket)

        # Not torch's register_multi_grad_hook: its hook holds the graph nodes that hold the hook, and nothing is freed.
        for tensor in tensors:
            tensor.register_hook(note)

    def on_gradient(self, bucket_index: int, index: int) -> None:
        """The gradient of a whole parameter is final for this backward."""
        self._begin_backward()
        bucket = self._buckets[bucket_index]
        bucket.check_unchanged()
        full = bucket.params[index].full
        grad, full.grad = full.grad, None
        assert grad is not None
        self.has_gradients = True
        if self._reducer.add(bucket, index, grad.detach()):
            self._complete.add(bucket_index)
            self._release_if_done(bucket)

    def _release_if_done(self, bucket: Bucket) -> None:
        finished = bucket.gradients is None or bucket.index in self._complete
        if self._phase is Phase.BACKWARD and finished and not self._open_calls.get(bucket.index):
            self.gatherer.release(bucket)

    def _begin_backward(self) -> None:
        if self._phase is Phase.BACKWARD:
            return
        self._phase = Phase.BACKWARD
        self._complete.clear()
        self.has_gradients = False
        self._reducer.begin()
        compat.queue_backward_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._phase = Phase.REST
        self._open_calls.clear()
        with torch.no_grad():
            self.gatherer.rest()
            if self.has_gradients:  # not after autograd.grad of inputs; the same on every rank
                self._reducer.finish()

    def _recover(self) -> None:
        """A backward was cut short by an exception, which the caller caught: its gradients are not to be trusted."""
        self._phase = Phase.REST
        self._open_calls.clear()
        self._reducer.abandon()
        self.gatherer.rest()
        logger.warning(
            "The last backward did not finish, so all gradients of this step are incomplete and were dropped. Run the "
            "micro-batches of this step again."
        )


def _tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested containers, and of objects with attributes such as a dataclass, each one once."""
    to_look_at, seen = [value], set[int]()
    while to_look_at:
        for leaf in compat.tree_leaves(to_look_at.pop()):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, nn.Module | type) and hasattr(leaf, "__dict__") and id(leaf) not in seen:
                seen.add(id(leaf))
                to_look_at.append(list(vars(leaf).values()))


def _kept_on(module: nn.Module) -> list[Tensor]:
    """What a forward computed and put on its module, as routers do with their loss."""
    return [each for each in vars(module).values() if isinstance(each, Tensor) and each.grad_fn is not None]


def _on_gradient(conductor: "weakref.ref[Conductor]", bucket_index: int, index: int) -> Callable[[Tensor], None]:
    def on_gradient(param: Tensor) -> None:
        alive = conductor()
        if alive is not None:
            alive.on_gradient(bucket_index, index)

    return on_gradient
