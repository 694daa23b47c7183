"""Where the model tells the sharding what it is about to do. Hooks ask for transitions and decide nothing.

root forward     begin: phase, inputs cast, stale whole buckets refreshed      end: back to rest without autograd
site forward     a block, or a module that owns parameters: its buckets AVAILABLE before, idle after
site outputs     gradients are about to flow into the site: its buckets AVAILABLE again, those of later sites released
saved tensors    the backward reads what lies in a bucket's memory: AVAILABLE again, whoever reads it (see saved.py)
parameter        its gradient is final for this backward: move it into the bucket
end of backward  reduce what is left, hand out gradients, everything SHARDED
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from zcore.core import compat
from zcore.core.errors import MismatchError, StateError
from zcore.zero.bucket import Bucket
from zcore.zero.first_uses import Graph
from zcore.zero.gathering import Gatherer
from zcore.zero.precision import Precision
from zcore.zero.reduction import Reducer
from zcore.zero.results import nodes_of, own_results, tensors_in
from zcore.zero.saved import SavedTensors, bucket_of, is_claimed, others_decide
from zcore.zero.sharded_parameter import lost_edit
from zcore.zero.timeline import Kind, Recorder
from zcore.zero.trace import Pass

__all__ = ["Conductor", "Phase", "Site"]


logger = logging.getLogger(__name__)

Enter = Callable[[nn.Module, Any], None]  # module, args
Leave = Callable[[nn.Module, Any, Any, Any], object]  # module, args, kwargs, result


class Phase(Enum):
    """What the root module is doing."""

    REST = auto()
    FORWARD = auto()
    BACKWARD = auto()


SHOWN_PHASES = {Phase.REST: "outside the model", Phase.FORWARD: "forward", Phase.BACKWARD: "backward"}


@dataclass(frozen=True, slots=True)
class Site:
    """A module whose forward uses buckets, and the positions in them of the parameters in it and below."""

    name: str
    buckets: tuple[tuple[Bucket, tuple[int, ...]], ...]
    is_served: bool = False  # by the one block that the module is in, which asks for all of these buckets
    # Of each call under way autograd's number at its start; ~number, below 0, of one that has found all it needs in
    # place, and is not counted among those that use its buckets.
    began: list[int] = field(default_factory=list)
    frees: bool = field(init=False)  # whether it has a bucket that comes and goes

    def __post_init__(self) -> None:
        object.__setattr__(self, "frees", any(bucket.is_transient for bucket, _ in self.buckets))


class Conductor:
    """Turns hooks into requests to the gatherer and the reducer; keeps the phase."""

    def __init__(
        self, buckets: Sequence[Bucket], *, gatherer: Gatherer, reducer: Reducer, precision: Precision
    ) -> None:
        self._buckets = buckets
        self.gatherer = gatherer
        self._reducer = reducer
        self._precision = precision
        self._has_gathers = any(bucket.is_transient for bucket in buckets)
        self._phase = Phase.REST
        self._interrupted = Phase.REST  # what the model was doing when the backward began
        self._backward = -1  # which of autograd's
        self._end: Callable[[], object] = lambda: None  # weak: what autograd is to call at the end of it, and holds
        self.has_gradients = False  # whether a parameter got one in the last backward
        self.is_training = False  # whether the backward that is asked for is one of gradients of parameters
        self.recorder: Recorder | None = None  # of the step under way, if it is to be explained
        self._saved = SavedTensors(buckets)
        self._saver: object | None = None  # who opened `saved`: a module in its forward, the number of a backward
        self._last_watch: Callable[[], _Watch | None] = lambda: None  # weak: the graph holds it, and it this
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for bucket in buckets:
            bucket.host = weakref.ref(self)

    def attach(self, root: nn.Module, sites: Sequence[tuple[nn.Module, Site]]) -> None:
        """Install every hook. The modules keep the conductor alive; nothing below keeps the modules alive."""
        keep = self._handles.append
        for module, site in sites:  # before the root's: a root that owns parameters begins first, and ends last
            self.add(module, site)
        untraced: Callable[[Any], Any] = torch.compiler.disable  # torch.compile is to see the modules, not these
        keep(root.register_forward_pre_hook(untraced(self._root_pre), with_kwargs=True, prepend=True))
        keep(root.register_forward_hook(untraced(self._root_post), always_call=True))
        for bucket in self._buckets:
            if bucket.gradients is None:
                continue
            for index, param in enumerate(bucket.params):
                # Or torch refuses the hook: one that is frozen now may be trained later.
                param.full.requires_grad_(True)
                keep(
                    param.full.register_post_accumulate_grad_hook(_on_gradient(weakref.ref(self), bucket.index, index))
                )
                param.full.requires_grad_(param.is_trainable)

    def add(self, module: nn.Module, site: Site) -> None:
        """Have the buckets of `site` gathered whenever `module` runs."""
        is_torchs = type(module).__module__.startswith("torch.nn.")
        enter, leave = self._site_pre(site), self._site_post(site, is_torchs=is_torchs)
        if not site.is_served:
            self._register(module, torch.compiler.disable(enter), torch.compiler.disable(leave))
            return
        with compat.hooks_numbered_alike():  # torch.compile goes through, and finds nothing: the graph stays one
            if site.frees and not _is_leaf_of_torch(module):
                self._register(module, enter, leave)
            else:
                self._handles.append(module.register_forward_pre_hook(self._pass_by(site, enter, leave)))

    def _register(self, module: nn.Module, enter: Enter, leave: Leave) -> None:
        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))

    def _pass_by(self, site: Site, enter: Enter, leave: Leave) -> Enter:
        """Enter a module that its block serves whole: called by that, nothing is to be done, nor is a hook at its end.

        The first call without its block installs that one.
        """
        buckets = tuple(bucket for bucket, _ in site.buckets)
        has_exit = False

        def pass_by(module: nn.Module, args: object) -> None:
            nonlocal has_exit
            if torch.compiler.is_compiling():
                return
            if not has_exit:
                if not site.frees or not (others_decide() or module._forward_hooks):  # those may keep what it reads
                    if self._phase is Phase.FORWARD and self._finds_in_place(buckets):
                        return
                    is_kept = not site.frees or self._saved.is_open or not torch.is_grad_enabled()
                    if is_kept and all(bucket.is_shown and self.gatherer.is_open(bucket) for bucket in buckets):
                        return  # its block has found work, and done it
                has_exit = True
                with compat.hooks_numbered_alike():
                    self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
            enter(module, args)

        return pass_by

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
        return self._phase is Phase.FORWARD or compat.in_backward() or bool(self.gatherer.open_buckets)

    def borrow(self, bucket: Bucket) -> bool:
        """See BucketHost."""
        if compat.in_backward():  # of a recomputation, which may begin with it
            self._begin_backward()
            self.begin_saving(compat.current_backward())
        else:
            self.recover()
        self.gatherer.enter(bucket, self._pass, module="an operation outside its module")
        return is_claimed() or not torch.is_grad_enabled()

    def end_borrow(self, bucket: Bucket) -> None:
        """See BucketHost."""
        self.gatherer.leave(bucket, self._pass)

    def keep_for(self, bucket: Bucket, result: object) -> None:
        """See BucketHost."""
        for each in result if isinstance(result, list | tuple) else (result,):
            if self._pass is Pass.FORWARD and isinstance(each, Tensor) and bucket_of(each) is bucket:
                self.gatherer.keep(bucket)

    @property
    def _pass(self) -> Pass:
        return Pass.BACKWARD if self._phase is Phase.BACKWARD else Pass.FORWARD

    def _root_pre(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        if not compat.in_backward():  # else a checkpointed root is recomputed: the step is under way already
            self.recover()
            self.end_saving(self._saver)  # left open by an interrupt: nothing that opens it encloses the root
            self._enter(Phase.FORWARD)
            self.gatherer.begin(training=torch.is_grad_enabled())
        self.begin_saving(module)
        return self._precision.cast_inputs(args, kwargs)

    def _root_post(self, module: nn.Module, args: object, result: object) -> None:
        self.end_saving(module)
        if compat.in_backward():
            return
        self._enter(Phase.REST)
        self._come_to_rest(result)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self.recorder is not None:
            self.recorder.note(Kind.PHASE, SHOWN_PHASES[phase])

    def _site_pre(self, site: Site) -> Enter:
        buckets = tuple(bucket for bucket, _ in site.buckets)

        def enter(module: nn.Module, args: object) -> None:
            if torch.compiler.is_compiling():
                return
            if self._phase is Phase.FORWARD and self._finds_in_place(buckets):
                site.began.append(~compat.sequence_number() if site.frees else -1)  # who frees nothing watches nothing
                return
            if compat.in_backward():
                self._begin_backward()
                self.begin_saving(compat.current_backward())
            else:
                self.recover()
                self.begin_saving(module)
            site.began.append(compat.sequence_number())
            for bucket, inside in site.buckets:
                self.gatherer.enter(bucket, self._pass, module=site.name, shown=inside)

        return enter

    def _site_post(self, site: Site, *, is_torchs: bool) -> Leave:
        """`is_torchs`: a module that opens no hooks of its own; where another one encloses it, that one watches."""
        transient = tuple(bucket for bucket, _ in site.buckets if bucket.is_transient)

        def is_trained() -> bool:
            return any(param.is_trainable for bucket in transient for param in bucket.params)

        def leave(module: nn.Module, args: object, kwargs: object, result: object) -> object:
            if torch.compiler.is_compiling():
                return result
            began = site.began.pop() if site.began else compat.sequence_number()  # else a hook before ours has raised
            is_in_place = began < 0
            if is_in_place:
                began = ~began
            else:
                if self._phase is Phase.BACKWARD and not compat.in_backward():
                    self.recover()  # the module has caught what a derivative of its own raised
                self.end_saving(module)
                for bucket, _ in site.buckets:
                    self.gatherer.leave(bucket, self._pass)
            if transient:
                nodes = nodes_of(result, since=began)
                if torch.is_grad_enabled() and not nodes:
                    result = own_results((args, kwargs), result, is_trained=is_trained)
                    nodes = nodes_of(result, since=began)
                is_inner = is_in_place or all(map(self.gatherer.is_open, transient))  # whoever encloses it watches
                if nodes and (not (is_inner and is_torchs) or others_decide()):
                    self._watch(transient, nodes)
                self._keep_returned(transient, result)
            if not is_in_place and self._phase is Phase.REST and not self.gatherer.open_buckets:
                self._come_to_rest(result)  # a submodule was called by itself
            return result

        return leave

    def _finds_in_place(self, buckets: Sequence[Bucket]) -> bool:
        """Whether a module in a forward finds all of `buckets` whole and shown; what is freed, since a block has it.

        What is saved inside has to be watched already, or not at all. Asked for each module, so kept short.
        """
        if self._has_gathers and torch.is_grad_enabled() and not self._saved.is_open:
            return False
        for bucket in buckets:  # a generator takes twice as long
            if not bucket.is_in_place or (bucket.is_transient and not self.gatherer.is_open(bucket)):
                return False
        return True

    def _come_to_rest(self, result: object) -> None:
        """A forward is over; with autograd a backward may follow, and memory stays, as that of weights in `result`.

        Raises StateError where it has edited a parameter in vain.
        """
        edited = self.gatherer.take_lost_edit()
        found = [bucket_of(tensor) for tensor in tensors_in(result)]
        returned = {bucket.index for bucket in self._buckets if bucket in found}
        if torch.is_grad_enabled():
            self.gatherer.conceal(returned)
        else:
            self.gatherer.rest(returned)
        if edited is not None:
            raise lost_edit(edited)

    def begin_saving(self, saver: object) -> None:
        """Watch what autograd saves, until the same `saver` ends it; not twice. It may be switched on inside."""
        if not self._saved.is_open and self._saved.open():
            self._saver = saver

    def end_saving(self, saver: object) -> None:
        """Stop, if `saver` has begun it."""
        if self._saver is saver:
            self._saver = None
            self._saved.close()

    def _end_recomputing(self) -> None:
        if isinstance(self._saver, int):
            self.end_saving(self._saver)

    def _watch(self, buckets: tuple[Bucket, ...], nodes: Sequence[Node]) -> None:
        """Have `buckets` AVAILABLE before `nodes` of a module run, and what only later modules read released."""
        indices = frozenset([bucket.index for bucket in buckets])
        still_open = self.gatherer.open_buckets | indices
        watch = self._last_watch()
        graph = self.gatherer.first_uses.graph()
        if watch is None or watch.graph is not graph or watch.indices != indices or watch.still_open != still_open:
            watch = _Watch(self, buckets, indices, still_open, graph)
            self._last_watch = weakref.ref(watch)
        for node in nodes:
            node.register_prehook(watch)

    def before_backward(self, watch: "_Watch") -> None:
        """Gradients are about to flow into what was made inside a module."""
        uses = self.gatherer.backward_uses
        if self._saver is None and uses.goes_on(watch.indices, watch.still_open):
            return
        self._refuse_second_backward()
        self._begin_backward()
        for bucket in watch.buckets:
            self.gatherer.use(bucket, Pass.BACKWARD, module="the backward pass")
        # Autograd runs what was made later first: all that reads the buckets of later modules is done.
        self.gatherer.release_all_but(watch.still_open)
        uses.note_all(watch.indices, watch.still_open)

    def _keep_returned(self, buckets: Sequence[Bucket], result: object) -> None:
        """Keep those of `buckets` of which a module returns a weight, or a view of one."""
        for tensor in tensors_in(result):
            returned = bucket_of(tensor)
            if returned is not None and returned in buckets:
                self.gatherer.keep(returned)

    def graph(self) -> Graph:
        """See BucketHost."""
        return self.gatherer.first_uses.graph()

    def read_in_backward(self, bucket: Bucket) -> None:
        """See BucketHost."""
        if self._saver is None and self.gatherer.backward_uses.goes_on_reading(bucket.index):
            return
        if not compat.in_backward():
            raise StateError(
                f"A tensor that autograd saved of {bucket.plan.name!r} is read outside of a backward, when the bucket "
                "is not there. To look at the values of parameters use `zero.GatheredParameters`."
            )
        if not is_claimed():  # else a second backward would find claims, too
            self._refuse_second_backward()
        self._begin_backward()
        self.gatherer.use(bucket, Pass.BACKWARD, module="the backward pass")

    def on_gradient(self, bucket_index: int, index: int, full: Tensor) -> None:
        """The gradient of the whole parameter `full` is final for this backward. Called for each one, so kept short.

        Tells of nothing that is settled: autograd gives the node at hand the greatest number, and nothing ran after it.
        """
        if self._has_gathers:
            self._refuse_second_backward()
        backward = compat.current_backward()
        if self._phase is not Phase.BACKWARD or self._saver is not None or backward != self._backward:
            self._begin_backward(settles=False)
        grad, full.grad = full.grad, None
        if grad is None:
            return  # autograd calls, and has none, where it was frozen since the forward
        grad = grad.detach() if grad.requires_grad else grad
        if self._reducer.add(bucket_index, index, grad, backward=backward):
            self.has_gradients = True

    def _refuse_second_backward(self) -> None:
        if self._has_gathers and torch.is_grad_enabled():
            raise StateError(
                "A backward with create_graph=True ran through sharded parameters, which are freed before the second "
                "backward would need them. Use stage 2 for gradient penalties."
            )

    def _begin_backward(self, *, settles: bool = True) -> None:
        if self._phase is Phase.BACKWARD and self._end() is None:
            self.recover()  # that one has raised, and this is another
        if self._phase is Phase.BACKWARD:
            if self._saver is not None and self._saver != compat.current_backward():
                self._end_recomputing()  # what was computed again is being differentiated: it saves no more
            if settles and self._has_gathers:
                self._settle()
            return
        self._interrupted = self._phase
        self._enter(Phase.BACKWARD)
        self._backward = compat.current_backward()
        self.has_gradients = False
        self._reducer.begin(self._backward)
        self.gatherer.first_uses.begin_backward(compat.current_node_number())
        end = partial(self._end_backward)  # autograd drops it with a backward that raises
        self._end = weakref.ref(end)
        compat.queue_backward_callback(end)

    def _settle(self) -> None:
        """Before every gather of a backward: tell the reducer which buckets get no more gradients in it.

        Nothing is told in a nested one, whose nodes are numbered by themselves.
        """
        if compat.current_backward() != self._backward:
            return
        number = compat.current_node_number()
        self.gatherer.first_uses.reach(number)
        if self.has_gradients or self.is_training:
            settled = self.gatherer.take_settled(number)
            if settled:
                self._reducer.settle(settled)

    def _end_backward(self) -> None:
        self._phase = self._interrupted
        self._end_recomputing()
        with torch.no_grad():
            if self._phase is Phase.FORWARD:  # a derivative that the forward itself takes, such as forces of an energy
                self.gatherer.go_on_forward()
            else:
                self.gatherer.rest()
            if self.has_gradients:  # not after autograd.grad of inputs; the same on every rank
                try:
                    self._reducer.finish()
                except MismatchError:
                    self._reducer.clear()
                    self.gatherer.forget_order()
                    raise
                except StateError:
                    self._reducer.abandon()
                    raise
        self._enter(self._phase)

    def abandon(self) -> None:
        """Forget a backward that did not finish, with all gradients of this step."""
        self._phase = Phase.REST
        self._reducer.abandon()
        self.gatherer.rest()
        self._end_recomputing()

    def recover(self) -> None:
        """Clear away what an exception in a backward, which the caller caught, has left behind."""
        if self._phase is not Phase.BACKWARD:
            return
        is_inside = self._interrupted is Phase.FORWARD or self.gatherer.open_buckets
        if is_inside and not self.has_gradients:  # a derivative that the forward took itself
            self._end_recomputing()
            self.gatherer.go_on_forward()
            self._enter(self._interrupted)
            return
        self.abandon()
        logger.warning(
            "The last backward did not finish, so all gradients of this step are incomplete and were dropped. Run the "
            "micro-batches of this step again."
        )


class _Watch:
    """Before gradients flow into what a module has made. Modules of one block that follow each other share it."""

    __slots__ = ("__weakref__", "_conductor", "buckets", "graph", "indices", "still_open")

    def __init__(
        self,
        conductor: Conductor,
        buckets: tuple[Bucket, ...],
        indices: frozenset[int],
        still_open: frozenset[int],
        graph: Graph,
    ) -> None:
        self._conductor, self.graph = conductor, graph  # a graph keeps them alive
        self.buckets, self.indices = buckets, indices  # that the module reads
        self.still_open = still_open  # these, and those of modules around it

    def __call__(self, grads: object) -> None:
        self._conductor.before_backward(self)


def _is_leaf_of_torch(module: nn.Module) -> bool:
    """Whether it is a layer of torch's own: it opens no hooks and returns neither its input nor a weight of its own."""
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def _on_gradient(conductor: "weakref.ref[Conductor]", bucket_index: int, index: int) -> Callable[[Tensor], None]:
    def on_gradient(param: Tensor) -> None:
        alive = conductor()
        if alive is not None:
            alive.on_gradient(bucket_index, index, param)

    return on_gradient
