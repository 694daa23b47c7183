"""The factor on fp16 losses that keeps small gradients from vanishing, and how it follows overflows. Pure.

fp16 has no number between 0 and 6e-8. The loss is multiplied by the scale, and with it gradients, which are divided by
it where they are reduced, in fp32 (Micikevicius et al., arXiv 1710.03740, sec. 3.2). A step that overflowed is skipped:

    overflow     one tolerance is spent; with the last one, and from then on, the scale halves each time
    clean step   each `window`-th in a row doubles the scale and refills the tolerances

    hysteresis 2, window 3     overflow  overflow  clean  overflow  clean  clean  clean
    scale 16                   16        8         8      4         4      4      8
    tolerances 2               1         1         1      1         1      1      2
"""

from dataclasses import asdict, dataclass
from typing import Any

from zcore.core.errors import ConfigError, NonFiniteError

__all__ = ["LossScale", "LossScaler"]

FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class LossScale:
    """How the scale begins and follows overflows; DeepSpeed's keys of `fp16`, with their meaning."""

    initial: float = 2.0**16
    is_dynamic: bool = True
    window: int = 1000  # clean steps before the scale doubles
    hysteresis: int = 2  # overflows before it halves
    refills_each_clean_step: bool = False  # tolerances, else with every window only
    minimum: float = 1.0

    def __post_init__(self) -> None:
        if self.is_dynamic and self.initial < self.minimum:
            raise ConfigError(
                f"fp16: the loss scale begins at {self.initial:g}, below its minimum of {self.minimum:g}. Raise "
                "initial_scale_power or lower min_loss_scale."
            )


@dataclass(slots=True)
class _State:
    scale: float
    tolerances: int
    clean_steps: int = 0  # since the last overflow


class LossScaler:
    """The scale of one training, the same on every rank."""

    def __init__(self, policy: LossScale) -> None:
        self._policy = policy
        self._state = _State(policy.initial, policy.hysteresis)

    @property
    def scale(self) -> float:
        """What the next step's losses are multiplied by."""
        return self._state.scale

    def note_clean_step(self) -> None:
        """A step was taken."""
        if not self._policy.is_dynamic:
            return
        state = self._state
        state.clean_steps += 1
        is_full = state.clean_steps % self._policy.window == 0
        if is_full or self._policy.refills_each_clean_step:
            state.tolerances = self._policy.hysteresis
        if is_full:
            state.scale *= FACTOR

    def note_overflow(self) -> None:
        """A step was skipped. Raises NonFiniteError if the scale cannot go down any further."""
        if not self._policy.is_dynamic:
            return
        state = self._state
        state.clean_steps = 0
        if state.tolerances > 1:
            state.tolerances -= 1
            return
        if state.scale <= self._policy.minimum:
            raise NonFiniteError(
                f"Gradients overflow fp16 even at the smallest loss scale, {state.scale:g}, so no step can be taken: "
                "they are not finite by themselves. The parameters are those of the last good step. Look at the data "
                "of this step, lower the learning rate, or set bf16 in place of fp16."
            )
        state.scale = max(state.scale / FACTOR, self._policy.minimum)

    def state_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self._state)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._state = _State(**saved)
