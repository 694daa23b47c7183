"""Measured bytes of model states on each rank, beside what plain data parallelism would hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zcore.core.quantities import shown_bytes
from zcore.core.tables import Table, draw_tables, write_tables
from zcore.zero.placement import Placement
from zcore.zero.sharding import Sharding

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["MemoryReport", "RankMemory", "measure_memory"]


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank holds between steps, and the most it ever gathered at once. Bytes."""

    parameters_bytes: int  # the copy that computes; sharded bf16 parameters have none, they are cast from the master
    gradients_bytes: int
    optimizer_bytes: int  # the optimizer's own state, and the fp32 master under mixed precision
    gathered_peak_bytes: int  # whole buckets of parameters and gradients that lived at the same time

    @property
    def states_bytes(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """`ranks` are the data-parallel ranks in order; `data_parallel` is what each would hold if nothing were sharded."""

    ranks: tuple[RankMemory, ...]
    data_parallel: RankMemory

    def __str__(self) -> str:
        return write_tables([_table(self)])

    def __rich__(self) -> "RenderableType":
        return draw_tables([_table(self)])


def _table(report: MemoryReport) -> Table:
    named = {str(rank): each for rank, each in enumerate(report.ranks)} | {"data parallel": report.data_parallel}
    rows = tuple(
        (
            name,
            *map(shown_bytes, (each.parameters_bytes, each.gradients_bytes, each.optimizer_bytes, each.states_bytes)),
            shown_bytes(each.gathered_peak_bytes) if each is not report.data_parallel else "-",
        )
        for name, each in named.items()
    )
    columns = ("rank", "parameters", "gradients", "optimizer", "together", "gathered at most")
    return Table("Memory of model states", columns, rows, words=("rank",))


def measure_memory(sharding: Sharding, optimizers: Iterable[torch.optim.Optimizer]) -> MemoryReport:
    """Add up the live tensors of this rank and exchange the sums; every rank calls it."""
    parameters_bytes = master_bytes = gradients_bytes = 0
    for bucket in sharding.buckets:
        compute, master = bucket.memory.resting_bytes
        parameters_bytes += compute
        master_bytes += master
        gradients_bytes += bucket.gradients.held_bytes if bucket.gradients is not None else 0
    own_states_bytes = sum(
        _bytes(value)
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim() > 0
    )
    own = RankMemory(parameters_bytes, gradients_bytes, own_states_bytes + master_bytes, sharding.ledger.peak_bytes)
    rows = _exchange(own, sharding)
    one_copy = rows[: sharding.dp.shard_size] if sharding.row.optimizer is Placement.SHARD else rows[:1]
    whole_parameters = sum(
        spec.numel * bucket.memory.gathered.element_size() for bucket in sharding.buckets for spec in bucket.plan.params
    )
    whole_gradients = sum(
        spec.numel * bucket.memory.master.element_size()
        for bucket in sharding.buckets
        if bucket.gradients is not None
        for spec in bucket.plan.params
    )
    whole = RankMemory(whole_parameters, whole_gradients, sum(each.optimizer_bytes for each in one_copy), 0)
    return MemoryReport(rows, whole)


def _exchange(own: RankMemory, sharding: Sharding) -> tuple[RankMemory, ...]:
    """Every data rank's row, in order of replica, then of rank in the shard group."""
    dp, device = sharding.dp, sharding.device
    values = [own.parameters_bytes, own.gradients_bytes, own.optimizer_bytes, own.gathered_peak_bytes]
    table = torch.zeros(dp.size, len(values), dtype=torch.int64, device=device)
    table[dp.rank] = torch.tensor(values, device=device)
    sharding.groups.all_reduce(table.view(-1), label="memory report")
    return tuple(RankMemory(*row) for row in table.tolist())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
