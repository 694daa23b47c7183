"""The `.grad` of a bucket's fragments: what zcore has put there, and what the user has made of it since.

announce                 deliver
NONE ----------------> ANNOUNCED ----------> DELIVERED      drop and clear lead back to NONE from anywhere;
`-------------------- deliver, assign ---------^          a later announce leads from DELIVERED to ANNOUNCED
"""

from collections.abc import Sequence
from enum import Enum, auto

from torch import Tensor

from zcore.core import compat
from zcore.core.errors import StateError
from zcore.zero.bucket_param import BucketParam, as_plain_tensors
from zcore.zero.buffer import BucketGradients
from zcore.zero.sharded_parameter import GRAD, FragmentValues, UnreducedGradient

__all__ = ["FragmentGradients", "GradState"]


class GradState(Enum):
    """What the `.grad` of a fragment was when zcore set it last; the user may have changed it since."""

    NONE = auto()  # None: no gradient since the last `zero_grad`
    ANNOUNCED = auto()  # stands for one that is not reduced yet, and can only be dropped
    DELIVERED = auto()  # a view of the reduced gradients


class FragmentGradients:
    """Of all parameters of a bucket; `reduced` is where their gradients lie."""

    def __init__(self, params: Sequence[BucketParam], reduced: BucketGradients) -> None:
        self._params = params
        self._gradients = reduced
        self._cuts: list[int] = []  # elements of the reduced gradients: padding, parameter, padding, parameter ...
        end = 0
        for part in (param.fragment for param in params):
            self._cuts += [part.offset - end, part.numel]
            end = part.offset + part.numel
        self._cuts.append(reduced.reduced_numel - end)
        self._states = [GradState.NONE] * len(params)
        self._given: list[tuple[Tensor | None, int]] = [(None, 0)] * len(params)  # what was set as `.grad`, its address

    def deliver(self, used: list[bool]) -> None:
        """Give every fragment its gradient; None to one that no rank used, as plain torch would."""
        with as_plain_tensors():
            parts = self._gradients.live_reduced().split_with_sizes(self._cuts)[1::2]  # sooner than one by one
            for index, (part, is_used) in enumerate(zip(parts, used, strict=True)):
                self._set(index, part if is_used else None)
        self._states = [GradState.DELIVERED if is_used else GradState.NONE for is_used in used]

    def announce(self, used: list[bool]) -> None:
        """Parameters that were used have gradients that a later backward will reduce and deliver.

        What was delivered before is part of them by now.
        """
        with as_plain_tensors():
            for index, (param, is_used) in enumerate(zip(self._params, used, strict=True)):
                if is_used:
                    param.announce_gradient()
                    self._states[index] = GradState.ANNOUNCED

    @property
    def is_as_given(self) -> bool:
        """Whether every fragment has the `.grad` that was delivered, or None where it has no gradient."""
        if self.waits_for_reduction:
            return False
        with as_plain_tensors():
            for param, (given, address) in zip(self._params, self._given, strict=True):
                grad = GRAD.__get__(param.shard)
                if grad is not given or (grad is not None and grad.data_ptr() != address):
                    return False
        return True

    @property
    def waits_for_reduction(self) -> bool:
        """Whether gradients were announced and not delivered yet."""
        return GradState.ANNOUNCED in self._states

    @property
    def with_gradient(self) -> list[int]:
        """The parameters that got a gradient since the last `clear`."""
        return [index for index, state in enumerate(self._states) if state is not GradState.NONE]

    @property
    def dropped(self) -> list[int]:
        """Those of them whose `.grad` is None by now, as `zero_grad` leaves it."""
        with as_plain_tensors():
            return [index for index in self.with_gradient if not self._params[index].has_gradient]

    def assigned(self) -> list[tuple[int, Tensor]]:
        """The gradients that the user has put in place of what was there, by parameter.

        Raises StateError where what was there is not reduced yet; assigned zeros drop it.
        """
        found: list[tuple[int, Tensor]] = []
        with as_plain_tensors():
            for index, (param, state) in enumerate(zip(self._params, self._states, strict=True)):
                grad = param.gradient
                if grad is None or isinstance(grad, UnreducedGradient):
                    continue
                given, address = self._given[index]
                if grad is given and grad.data_ptr() == address:
                    continue
                if state is not GradState.ANNOUNCED:
                    found.append((index, grad))
                elif grad.any():
                    raise StateError(
                        f"The gradient of {param.shard.fqn} was assigned before it was reduced: the last backward ran "
                        "inside no_sync(), or is not the last one of its step. Change gradients after a backward "
                        "outside no_sync()."
                    )
                else:
                    self.drop(index)
        return found

    def assign(self, index: int, grad: Tensor) -> None:
        """Make `grad` the reduced gradient of a parameter. It must not lie in memory of gradients."""
        own = self._reduced_part(index)
        own.copy_(grad)
        with as_plain_tensors():
            self._set(index, own)
        self._states[index] = GradState.DELIVERED

    @property
    def memory(self) -> int:
        """What identifies the memory of the reduced gradients; 0 where there are none."""
        return 0 if self._gradients.reduced is None else compat.storage_key(self._gradients.reduced)

    def drop(self, index: int) -> None:
        """The gradient of a parameter is zero again."""
        self._gradients.drop(index)
        with as_plain_tensors():
            self._set(index, None)
        self._states[index] = GradState.NONE

    def clear(self) -> None:
        """Forget the gradients of fragments and buffers."""
        with as_plain_tensors():
            for param in self._params:
                GRAD.__set__(param.shard, None)
        self._states = [GradState.NONE] * len(self._params)
        self._given = [(None, 0)] * len(self._params)
        self._gradients.clear()

    def _set(self, index: int, grad: Tensor | None) -> None:
        given = None if grad is None else grad.as_subclass(FragmentValues)
        GRAD.__set__(self._params[index].shard, given)
        self._given[index] = given, 0 if given is None else given.data_ptr()

    def _reduced_part(self, index: int) -> Tensor:
        """Where the reduced gradient of a parameter lies, a view."""
        part = self._params[index].fragment
        return self._gradients.live_reduced()[part.offset : part.offset + part.numel]
