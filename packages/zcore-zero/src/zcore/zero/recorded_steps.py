"""Which optimizer steps of an engine are recorded, and what the last of them came to."""

from zcore.core.errors import StateError
from zcore.zero.sharding import Sharding
from zcore.zero.timeline import Kind, Recorder, Timeline

__all__ = ["RecordedSteps"]


class RecordedSteps:
    """Every `every`-th optimizer step of this rank; none while that is 0."""

    def __init__(self, sharding: Sharding, *, rank: int) -> None:
        self.every = 0
        self._sharding = sharding
        self._rank = rank
        self._recorder: Recorder | None = None  # of the step under way, if it is to be explained
        self._last: Timeline | None = None

    def begin(self, step: int) -> None:
        """A step begins, from 1 on, and is recorded if it is its turn."""
        before, self._recorder = self._recorder, None
        if self.every and step % self.every == 0:
            self._recorder = Recorder(self._sharding.ledger, step=step)
            self._recorder.note(Kind.PHASE, "outside the model")
        if before is not self._recorder:
            self._sharding.explain_to(self._recorder)

    def note_phase(self, name: str) -> None:
        """The program turns to something else."""
        if self._recorder is not None:
            self._recorder.note(Kind.PHASE, name)

    def end(self) -> Timeline | None:
        """The step is over; its timeline, if it was recorded."""
        if self._recorder is None:
            return None
        self._recorder.note(Kind.PHASE, "end")
        sizes = {bucket.plan.name: bucket.memory.gathered_bytes for bucket in self._sharding.buckets}
        self._last = Timeline.of(self._recorder.marks, step=self._recorder.step, rank=self._rank, sizes=sizes)
        return self._last

    def forget(self) -> None:
        """The step under way is none."""
        self._recorder = None
        self._sharding.explain_to(None)

    def last(self) -> Timeline:
        """Of the last step that was recorded. Raises StateError if none was."""
        if self._last is None:
            raise StateError(
                "No step was recorded yet. Call `engine.explain_steps(every=10)`, or set wall_clock_breakdown in the "
                "config, and ask after such a step."
            )
        return self._last
