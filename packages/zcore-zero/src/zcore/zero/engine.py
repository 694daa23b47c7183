"""The engine: a config, a sharded model, an optimizer and a schedule, stepped together; a thin layer on `Sharding`."""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zcore.core.collectives import Traffic
from zcore.core.errors import CollectiveError, MismatchError, NonFiniteError, StateError
from zcore.core.events import Events, log_visibly
from zcore.core.recording import Recording, Report
from zcore.zero import checkpoints
from zcore.zero.accumulation import scaled
from zcore.zero.clipping import clip_factor
from zcore.zero.config import TrainingConfig
from zcore.zero.consolidated import consolidated_state_dict
from zcore.zero.loss_scale import LossScaler
from zcore.zero.memory import MemoryReport, measure_memory
from zcore.zero.names_of_deepspeed import what_to_write
from zcore.zero.optimizers.rounding import rounded_step
from zcore.zero.placement import Placement
from zcore.zero.recorded_steps import RecordedSteps
from zcore.zero.run_state import RunState
from zcore.zero.sharded_parameter import ShardedParameter
from zcore.zero.sharding import Sharding
from zcore.zero.timeline import Timeline

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


class Engine:
    """Made by `zero.initialize`. Call it as the model; then `backward(loss)` and `step()` for every micro-batch.

    A plain `loss.backward()`, or any other backward of autograd's, does as well as `backward(loss)`: of tensors that
    are no loss, of a sum over two engines, of a submodule called by itself. `backward(loss)` also checks its loss.

    An optimizer step happens in each `gradient_accumulation_steps`-th `step()`; gradients are the mean over those
    micro-batches and over all data ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        sharding: Sharding,
        *,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        config: TrainingConfig,
        events: Events | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.module = module
        self.sharding = sharding
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.config = config
        self.recording = recording  # of all collectives since `initialize` began; None unless `comms_logger` is enabled
        if recording is not None:
            weakref.finalize(self, recording.stop)
        self._events = events
        self._losses: list[Tensor] = []  # of this step's backwards; kept only if they are told
        self._losses_of = 0  # which begun step that is
        self.global_steps = 0  # optimizer steps taken
        self._micro_steps_before = 0  # calls of step() in earlier optimizer steps
        self.skipped_steps = 0  # optimizer steps not taken because something was not finite
        self._autocast_dtype = config.torch_autocast.torch_dtype
        is_scaled = config.fp16.enabled or self._autocast_dtype is torch.float16
        self._scaler = LossScaler(config.fp16.loss_scaling) if is_scaled else None
        self._is_step_applied = False
        self._is_stepping = False
        if optimizer is not None and hasattr(
            optimizer, "_optimizer_step_pre_hooks"
        ):  # a wrapper may lack torch's __init__
            optimizer.register_step_pre_hook(_refuse_step_past(weakref.ref(self)))
        self._accumulation = sharding.reducer.accumulation
        self._accumulation.steps = int(config.gradient_accumulation_steps or 1)
        self._accumulation.reduces_each = sharding.row.gradients is Placement.SHARD
        self._accumulation.loss_scale = self.loss_scale
        self._clip_norm = float(config.gradient_clipping)
        self._grad_norm: float | None = None
        self._recorded = RecordedSteps(sharding, rank=self.global_rank)
        if config.wall_clock_breakdown:
            self.explain_steps(every=config.steps_per_print or 10)
        self._said: set[str] = set()  # warnings that are said once
        self._tells_losses = events is not None or (config.steps_per_print is not None and self.global_rank == 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Its arguments and result are the model's own."""
        if self._autocast_dtype is None:
            return self.module(*args, **kwargs)
        # Without a cache: it would hold the cast of every weight to the forward's end, whatever is resharded.
        with torch.autocast(self.device.type, dtype=self._autocast_dtype, cache_enabled=False):
            return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        """One line of facts; asks no other rank."""
        dp, sharding = self.sharding.dp, self.sharding
        copies = f" in {dp.replicate_size} copies of the states" if dp.replicate_size > 1 else ""
        return (
            f"Engine({type(self.module).__name__}, ZeRO stage {sharding.zero_stage}, {dp.size} ranks{copies}, "
            f"{sharding.num_params:,} parameters, {self.global_steps} steps so far)"
        )

    if not TYPE_CHECKING:  # a checker is to find names that are not there

        def __getattr__(self, name: str) -> NoReturn:
            """Refused, with what to write in place of a name of DeepSpeed's."""
            instead = what_to_write(name)
            advice = f", as DeepSpeed's has: write {instead}" if instead else ""
            raise AttributeError(f"zcore's Engine has no attribute {name!r}{advice}.", name=name, obj=self)

    def __iter__(self) -> NoReturn:
        """Refused: DeepSpeed's initialize returns four things, zcore's one."""
        raise StateError(
            "zero.initialize returns one engine, not a tuple: write `engine = zero.initialize(...)` and take "
            "`engine.optimizer` and `engine.lr_scheduler` from it."
        )

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> Tensor:
        """Compute gradients of a scalar loss, divided by the number of accumulated micro-batches; returns `loss`.

        Raises StateError if the loss has no graph, is not one number, or comes from no parameter of the model. When a
        backward raises, all gradients of this optimizer step are dropped, and the step begins anew.
        """
        given = cast("object", loss)  # a training loop that is not type-checked may pass anything
        if not isinstance(given, Tensor) or given.numel() != 1 or not given.requires_grad:
            found = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise StateError(
                "backward() needs one number that the model's parameters lead to, and got "
                f"{found}{'' if not isinstance(given, Tensor) or given.requires_grad else ' without a graph'}. Reduce "
                "the loss with .mean(), and compute it outside torch.no_grad()."
            )
        finished = False
        try:
            self.sharding.backward(self.scale(loss), retain_graph=retain_graph)
            finished = True
        except CollectiveError:
            raise  # the ranks have lost each other: there is no step to begin anew
        except Exception:
            with suppress(CollectiveError, MismatchError):  # of sums under way, which follow from what is raised
                self.sharding.abandon()
            raise
        finally:
            if not finished:
                self._begin_step()
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """What `backward(loss)` differentiates: the loss as it counts in the step, under fp16 times the loss scale.

        For loops that take derivatives themselves under fp16: `engine.scale(loss).backward()` in place of
        `loss.backward()` keeps small gradients from vanishing.
        """
        self.sharding.reducer.note_loss(loss)
        if self._losses_of != self._accumulation.num_begun:
            self._losses, self._losses_of = [], self._accumulation.num_begun
        if self._tells_losses:
            self._losses.append(loss.detach().reshape(()))
        return scaled(loss, self._accumulation.factor)

    def step(self) -> None:
        """Count a micro-batch; at the last one of a step clip, step the optimizer and the schedule, forget gradients.

        Under fp16 a step whose gradients overflowed is skipped on every rank, schedule included, and the loss scale
        follows; see `was_step_applied`.

        Raises StateError without a backward before it or without an optimizer, and NonFiniteError on every rank if a
        loss or the norm of the gradients is not finite (under fp16 only at the smallest loss scale); parameters and
        states are then as before the step.
        """
        self.sharding.conductor.recover()
        accumulation, is_boundary = self._accumulation, self.is_gradient_accumulation_boundary()
        self._is_step_applied = False
        self._refuse_empty_step(is_boundary)
        self._warn_of_backwards()
        self._recorded.note_phase("step")
        if not is_boundary:
            accumulation.end_micro_batch()
            self._recorded.note_phase("outside the model")
            return
        assert self.optimizer is not None
        self._is_stepping = True
        try:
            if not self._is_finite():
                return
            assert self._grad_norm is not None
            loss = self._mean_loss()  # here the device has just been waited for, and has nothing else to do yet
            if self._clip_norm:
                self.sharding.scale_gradients(clip_factor(self._grad_norm, self._clip_norm))
            if self.sharding.has_masters:
                self.optimizer.step()
            else:
                rounded_step(self.module, self.optimizer, step=self.global_steps)
            self._is_step_applied = True
            self.global_steps += 1
            if self._scaler is not None:
                self._scaler.note_clean_step()
        finally:
            self._is_stepping = False
            self.sharding.reducer.clear()
            self._micro_steps_before += accumulation.steps
            self._begin_step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self._tell_step(loss)

    def _refuse_empty_step(self, is_boundary: bool) -> None:
        """Raise StateError where `step()` has nothing to step with, or nothing to step."""
        if not self._accumulation.num_backwards:
            raise StateError(
                "step() was called without a backward() since the last one, so there is no gradient to step with. Call "
                "`engine.backward(loss)` before each `engine.step()`."
            )
        if is_boundary and not self._accumulation.has_synced:
            raise StateError(
                "The last backward of this step ran inside no_sync(), so its gradients were not reduced. Leave "
                "no_sync() before the backward of the last micro-batch."
            )
        if is_boundary and self.optimizer is None:
            raise StateError(
                "step() is to step an optimizer, and this engine has none, so nothing would be trained. Give "
                "`zero.initialize` an `optimizer`, in the config or in the call; to evaluate only, call neither "
                "backward() nor step()."
            )

    @property
    def micro_steps(self) -> int:
        """Micro-batches done."""
        return self._micro_steps_before + self._accumulation.done

    def _begin_step(self) -> None:
        """The next micro-batch is the first one of its optimizer step."""
        timeline = self._recorded.end()
        if timeline is not None and self.config.wall_clock_breakdown and self.global_rank == 0:
            log_visibly(logger, "%s", timeline.summary())
        self._recorded.begin(self.global_steps + 1)
        self._accumulation.begin_step()
        self._accumulation.loss_scale = self.loss_scale
        self._losses = []

    def _warn_of_backwards(self) -> None:
        if self._accumulation.num_backwards > 1:
            self._warn_once(
                "backward() was called twice before step(): both gradients count in full in one micro-batch. For two "
                "losses of one batch that is right (the first with retain_graph=True if they share a graph, or add "
                "them); to accumulate over batches call engine.step() after each backward. Said once."
            )
        if self._scaler is not None and self._accumulation.was_unscaled:
            self._warn_once(
                "A backward ran without the loss scale: gradients that float16 cannot hold, below 6e-8, vanished in "
                "it. Call engine.backward(loss), or engine.scale(loss).backward(). Said once."
            )

    def _warn_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.warning(line)

    def _is_finite(self) -> bool:
        """Whether the step can be taken; equal on every rank. Under fp16 one that cannot is skipped, else refused."""
        bad = self.sharding.reducer.bad_ranks
        norm = self.sharding.norm()
        if not bad and isfinite(norm):
            self._grad_norm = norm
            return True
        self.skipped_steps += 1
        what = f"the loss was not finite on data ranks {list(bad)}" if bad else f"the norm of the gradients is {norm}"
        if self._scaler is not None:
            before = self._scaler.scale
            self._scaler.note_overflow()
            if self.global_rank == 0:
                after = self._scaler.scale
                scale = f"{after:g}, was {before:g}" if after != before else f"stays {after:g}, by hysteresis"
                line = "step %d skipped (%d in all): %s in float16; loss scale %s"
                log_visibly(logger, line, self.global_steps + 1, self.skipped_steps, what, scale)
            return False
        raise NonFiniteError(
            f"In optimizer step {self.global_steps + 1}, {what}. The step was not taken: parameters and optimizer "
            "states are as before it, and its gradients are dropped. Look at the data of this step, lower the learning "
            "rate or set gradient_clipping; to go on with the next batch, catch zcore.core.errors.NonFiniteError."
        )

    def _mean_loss(self) -> float | None:
        """Of this rank's micro-batches in the step at hand, as far as the engine has seen losses, and someone is told.

        Losses of one micro-batch add up.
        """
        if not self._losses or (self._events is None and not self._prints_step(self.global_steps + 1)):
            return None
        return float(torch.stack(self._losses).sum()) / self._accumulation.steps

    def _prints_step(self, number: int) -> bool:
        every = self.config.steps_per_print
        return every is not None and number % every == 0 and self.global_rank == 0

    def _tell_step(self, loss: float | None) -> None:
        if self._prints_step(self.global_steps):
            rates = ", ".join(f"{lr:#.4g}" for lr in self.get_lr())
            seen = "" if loss is None else f"loss {loss:#.4g}, "
            line = "step %d: %sgradient norm %#.4g, learning rate %s"
            log_visibly(logger, line, self.global_steps, seen, self._grad_norm, rates)
        if self._events is None:
            return
        emit = partial(self._events.emit, unit="1", step=self.global_steps, rank=self.global_rank)
        if loss is not None:
            emit("loss", loss)
        emit("grad_norm", self._grad_norm or 0.0)
        if self._scaler is not None:
            emit("loss_scale", self._scaler.scale)
        for index, lr in enumerate(self.get_lr()):
            emit(f"lr/{index}", lr)

    def zero_grad(self) -> None:
        """Drop the gradients that this step has so far, and begin it anew: the next micro-batch is its first one.

        As where an epoch ends before its last step is complete. `step()` does so at the end of each optimizer step.
        """
        if self._accumulation.done:
            self._warn_once(
                f"zero_grad() dropped {self._accumulation.done} of the {self._accumulation.steps} micro-batches of an "
                "optimizer step, which begins anew. Called before each backward no step is ever complete: leave it "
                "out, as step() does it at the end of each optimizer step. Said once."
            )
        self.sharding.reducer.clear()
        self._micro_steps_before += self._accumulation.done
        self._accumulation.begin_step()
        self._losses = []

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch at hand is the last one of its optimizer step."""
        return self._accumulation.is_last

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside keep their gradients on this rank, whole; the next one outside reduces all of them.

        Saves the reductions of stages 2 and 3 between accumulated micro-batches, for the memory of whole gradients.
        """
        with self.sharding.no_sync():
            yield

    def train(self, mode: bool = True) -> "Engine":
        """Put the model into training mode, and let go of what evaluation has kept gathered."""
        self.module.train(mode)
        self.sharding.gatherer.keep_for_inference(not mode)
        return self

    def eval(self) -> "Engine":
        """Put the model into evaluation mode.

        Under stage 3 what forwards without autograd gather stays until `train()`, up to `stage3_max_live_parameters`:
        where that is the whole model, forwards after the first one are this rank's own business, as many as it likes.
        """
        return self.train(False)

    def shard_added(self, *, group: int | None = 0) -> list[ShardedParameter]:
        """Shard what was added to the model since, as `zero.shard_added`; every rank calls it, between optimizer steps.

        The new parameters that are trainable join parameter group `group` of the optimizer, with its settings and
        schedule (of Muon the first group of their kind); with None they join none, and are returned for a group of your
        own.
        """
        if self._accumulation.num_backwards or self._accumulation.done:
            raise StateError("Modules are sharded between optimizer steps: call shard_added() after the step() of one.")
        added = self.sharding.add()
        if self.optimizer is not None and group is not None:
            groups = self.optimizer.param_groups
            for param in added:
                if param.requires_grad:
                    of_kind = [each for each in groups if each.get("use_muon", param.use_muon) == param.use_muon]
                    (of_kind[0] if "use_muon" in groups[group] else groups[group])["params"].append(param)
        return added

    def explain_steps(self, *, every: int = 1) -> None:
        """Record each `every`-th optimizer step of this rank for `explain_step`, from the next on; 0 records no more.

        A recorded step takes some microseconds more for each transfer.
        """
        self._recorded.every = every
        if not self._accumulation.num_backwards and not self._accumulation.done:
            self._recorded.begin(self.global_steps + 1)

    def explain_step(self) -> Timeline:
        """What was gathered and reduced when in the last recorded step, how long this rank waited for it, and why.

        Print it, give it to Rich, take `to_dict()`, or `save_trace("step.json")`. Raises StateError if none was
        recorded.
        """
        return self._recorded.last()

    def get_global_grad_norm(self) -> float | None:
        """The norm of the whole gradient at the last optimizer step, before clipping; None before the first."""
        return self._grad_norm

    def was_step_applied(self) -> bool:
        """Whether the last `step()` has stepped the optimizer: it ended a step, which was not skipped nor refused."""
        return self._is_step_applied

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by in float16; gradients are handed out without it. 1 in other precisions."""
        return 1.0 if self._scaler is None else self._scaler.scale

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def global_rank(self) -> int:
        """This process's rank among all."""
        return dist.get_rank()

    @property
    def dp_size(self) -> int:
        """Ranks that see different data."""
        return self.sharding.dp.size

    @property
    def dp_rank(self) -> int:
        """This rank's place among them: which part of the data it reads."""
        return self.sharding.dp.rank

    @property
    def device(self) -> torch.device:
        """Where parameters and inputs live."""
        return self.sharding.device

    def memory_report(self) -> MemoryReport:
        """Measured bytes of model states on each rank; every rank calls it."""
        return measure_memory(self.sharding, [] if self.optimizer is None else [self.optimizer])

    def traffic(self) -> dict[str, Traffic]:
        """Number and bytes of collectives so far, by group: gathers, reductions, replicas and hpZ's inner groups."""
        groups = self.sharding.groups
        several = {
            "gather": groups.gather,
            "reduce": groups.reduce,
            "replicate": groups.replicate,
            "inner": groups.inner,
        }
        return {name: group.traffic for name, group in several.items() if group is not None}

    def comm_report(self) -> Report:
        """What every collective since `initialize` began has taken, over all ranks; every rank of the run calls it.

        Print it, give it to Rich, or take `to_dict()`. Raises StateError unless `comms_logger.enabled` is true.
        """
        if self.recording is None:
            raise StateError(
                "No collective was recorded, so there is nothing to report. Install zcore-comm, and give the config "
                '{"comms_logger": {"enabled": true}}; counts and bytes are in `engine.traffic()` without it.'
            )
        return self.recording.report(dist.group.WORLD)

    def consolidated_state_dict(self, *, rank: int | None = 0) -> dict[str, Tensor]:
        """See `zero.consolidated_state_dict`."""
        return consolidated_state_dict(self.module, rank=rank)

    def save_checkpoint(
        self, directory: str | Path, tag: str | None = None, client_state: dict[str, Any] | None = None
    ) -> Path:
        """Save under `tag` (by default `global_step<N>`) and return the folder; every rank calls it.

        `client_state` is JSON data of the caller's, each rank its own. Raises CheckpointError, StateError in mid-step.
        """
        if self._accumulation.num_backwards or self._accumulation.done:
            raise StateError("A checkpoint holds no gradients: save after the step() that ends an optimizer step.")
        counters = {"global_steps": self.global_steps, "micro_steps": self.micro_steps, "skipped": self.skipped_steps}
        extra = {"counters": counters, "client_state": client_state or {}}
        if self._scaler is not None:
            extra["loss_scale"] = self._scaler.state_dict()
        return checkpoints.save(directory, tag or f"global_step{self.global_steps}", self._run_state(), extra)

    def load_checkpoint(self, directory: str | Path, tag: str | None = None) -> dict[str, Any]:
        """Continue from a checkpoint, bit for bit, and return its client state; every rank calls it.

        Without a tag the newest. Raises CheckpointError before anything is changed.
        """
        extra = checkpoints.load(directory, tag, self._run_state())
        counters = extra["counters"]
        self.global_steps, self.skipped_steps = counters["global_steps"], counters["skipped"]
        if self._scaler is not None and "loss_scale" in extra:
            self._scaler.load_state_dict(extra["loss_scale"])
        self.sharding.reducer.clear()
        self._micro_steps_before = counters["micro_steps"]
        self._recorded.forget()
        self._begin_step()
        client_state: dict[str, Any] = extra["client_state"]
        return client_state

    def _run_state(self) -> RunState:
        return RunState(self.module, self.sharding, self.optimizer, self.lr_scheduler)

    def close(self) -> None:
        """Remove every hook from the model, leave the process groups that were made for it, and record no more."""
        self.sharding.close()
        if self.recording is not None:
            self.recording.stop()


def _refuse_step_past(engine: "weakref.ref[Engine]") -> Callable[..., None]:
    def refuse(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        alive = engine()
        if alive is not None and not alive._is_stepping:
            raise StateError(
                "The engine's optimizer was stepped by itself, past the engine's clipping, schedule and counts. Call "
                "`engine.step()`; for a loop of your own shard the model with `zero.shard` and build the optimizer."
            )

    return refuse
