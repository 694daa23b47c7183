"""Micro-batches of an optimizer step: which one is at hand, what its backward does, and how much its gradients count.

A micro-batch counts by `factor`: one part in all of the step's, times the loss scale of fp16. `scaled` multiplies a
loss by it before its backward, so that nothing small is lost on the way; the gradients of any other backward, as of a
plain `loss.backward()`, are multiplied where they arrive. Either way nothing depends on how the loss came about: from
the engine, from a submodule that was called by itself, from two engines, or through several calls of one.
"""

from dataclasses import dataclass
from weakref import WeakValueDictionary

from torch import Tensor

from zcore.core import compat
from zcore.core.errors import StateError

__all__ = ["Accumulation", "scaled"]


class _Factor:
    """Of the losses of a backward; lives as long as that, which may end by an exception and call nothing."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: float) -> None:
        self.value = value


_factors: WeakValueDictionary[int, _Factor] = WeakValueDictionary()  # by autograd's number; inner ones last


def scaled(loss: Tensor, factor: float) -> Tensor:
    """`loss` times `factor`, at least in fp32; the backward of the result knows that its gradients are.

    All of that backward: what is added to the result without the factor is taken to have it.
    """
    result = (loss.float() if loss.dtype.itemsize == 2 else loss) * factor

    def note(grad: Tensor) -> None:
        backward = compat.current_backward()
        known = _value_of(backward)
        if known is None:
            held = _factors[backward] = _Factor(factor)
            compat.queue_backward_callback(lambda: _end(backward, held))  # the only one to hold it
        elif known != factor:  # this frame lives as long as the error does, and holds no _Factor
            raise StateError(
                f"One backward runs through losses scaled by {known:g} and by {factor:g}, so the "
                "gradients of neither engine would be right. Add the plain losses and call loss.backward(), or call "
                "engine.scale(loss).backward() for each engine."
            )

    result.register_hook(note)
    return result


def _value_of(backward: int) -> float | None:
    found = _factors.get(backward)
    return None if found is None else found.value


def _end(backward: int, held: _Factor) -> None:
    if _factors.get(backward) is held:
        del _factors[backward]


@dataclass(slots=True)
class Accumulation:
    """The state of the optimizer step at hand, of an engine or of a hand-written loop; that has one micro-batch."""

    steps: int = 1  # micro-batches of an optimizer step
    reduces_each: bool = True  # gradients after each of them: no rank has room for whole ones
    loss_scale: float = 1.0
    is_held_back: bool = False  # inside no_sync()
    done: int = 0  # micro-batches of this step that are over
    num_backwards: int = 0  # of the one at hand
    has_synced: bool = False  # whether the last backward reduced gradients
    num_begun: int = 0  # optimizer steps that have begun, those anew among them
    was_unscaled: bool = False  # whether one of this step ran without its factor
    _backward_factor: float | None = None

    @property
    def is_last(self) -> bool:
        """Whether the micro-batch at hand is the last one of its optimizer step."""
        return self.done + 1 == self.steps

    @property
    def reduces(self) -> bool:
        """Whether a backward reduces gradients, and does not only add them up on this rank."""
        return (self.is_last or self.reduces_each) and not self.is_held_back

    @property
    def factor(self) -> float:
        """What a loss counts by."""
        return self.loss_scale / self.steps

    def begin_backward(self, backward: int) -> None:
        """Autograd's backward of that number has begun; one inside another has the gradients of the loss of that."""
        own = _value_of(backward)
        self._backward_factor = own if own is not None else next(map(_value_of, reversed([*_factors])), None)

    @property
    def missing_factor(self) -> float:
        """What the gradients of the backward under way are still to be multiplied by."""
        return self.factor / (self._backward_factor or 1.0)

    def end_backward(self) -> None:
        """It has gradients, and is over."""
        self.num_backwards += 1
        self.has_synced = self.reduces
        self.was_unscaled |= self._backward_factor is None

    def end_micro_batch(self) -> None:
        """`step()` was called, and does not end the optimizer step."""
        self.done += 1
        self.begin_micro_batch()

    def begin_micro_batch(self) -> None:
        """No backward of the micro-batch at hand counts."""
        self.num_backwards = 0

    def begin_step(self) -> None:
        """The next micro-batch is the first one of its optimizer step."""
        self.num_begun += 1
        self.done = self.num_backwards = 0
        self.has_synced = self.was_unscaled = False
