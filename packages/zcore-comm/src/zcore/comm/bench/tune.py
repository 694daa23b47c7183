"""`zcore comm tune` on one rank: which algorithm moves a collective between pairs of ranks fastest, by bytes.

    python -m zcore.comm.bench.tune [PLAN [FILE]]   under `zcore run` or torchrun; what was found goes into FILE: JSON

Every algorithm of an op takes turns with its rivals, at this world's size; times are those of the slowest rank, so all
ranks come to one table. An algorithm has to win by more than chance: the one that the table in use names stays until
another takes `MARGIN` less time in three rounds of four. What is known of other world sizes is kept.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zcore.comm.bench.contenders import build_case, pairwise_over
from zcore.comm.bench.measure import sizes_up_to, with_tuples
from zcore.comm.pairs.algorithms import ALGORITHMS, ANY_BYTES, Rule, Table, read_table, rules_from, table_path
from zcore.comm.texts import exchange_texts
from zcore.core import tables
from zcore.core.errors import ConfigError
from zcore.core.events import progress
from zcore.core.machine import load, load_notes
from zcore.core.quantities import shown_bytes
from zcore.core.timing import Spread, time_in_turns
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["Choice", "Found", "TunePlan", "choose_algorithm", "main", "merge_rules", "table_of", "tune", "write_table"]

MARGIN = 0.05
RIVALS = {op: algorithms for op, algorithms in ALGORITHMS.items() if len(algorithms) > 1}


@dataclass(frozen=True, slots=True)
class TunePlan:
    """What to measure."""

    sizes_bytes: tuple[int, ...] = sizes_up_to(64 << 20, min_bytes=256)
    rounds: int = 9
    slice_s: float = 0.02
    is_dry: bool = False  # writes no table

    @classmethod
    def from_json(cls, text: str) -> "TunePlan":
        """The plan of such a text as `json.dumps(asdict(plan))` gives."""
        return cls(**with_tuples(json.loads(text)))


@dataclass(frozen=True, slots=True)
class Choice:
    """One op at one payload: what serves it now, what is to, and what each algorithm took."""

    op: str
    payload_bytes: int
    before: str
    after: str
    median_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured, and the table that follows from it."""

    world_size: int
    path: str
    choices: tuple[Choice, ...]
    table: Table
    load: float = 0.0  # how many processes wanted a processor before

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Found":
        """What such a text tells."""
        told: dict[str, Any] = json.loads(text)
        choices = tuple(Choice(**each) for each in told["choices"])
        return cls(told["world_size"], told["path"], choices, Table.from_json(json.dumps(told["table"])), told["load"])


def choose_algorithm(times_s: Mapping[str, Sequence[float]], *, current: str) -> str:
    """The fastest in the median of rounds, unless `current` is hardly slower, or too often not at all.

    >>> choose_algorithm({"ring": [1.0, 1.0, 1.0], "exchange": [0.98, 0.99, 0.5]}, current="ring")
    'ring'
    >>> choose_algorithm({"ring": [1.0, 1.0], "exchange": [0.5, 0.7]}, current="ring")
    'exchange'
    """
    best = min(times_s, key=lambda name: statistics.median(times_s[name]))
    ratios = [own / theirs for own, theirs in zip(times_s[best], times_s[current], strict=True)]
    return best if Spread.of(ratios).high < 1 - MARGIN else current


def merge_rules(choices: Sequence[Choice], before: Table, *, world_size: int) -> Table:
    """`before` with what was measured for `world_size` in place of its rules for that many ranks.

    The largest payload measured stands for all beyond it.
    """
    largest = {op: max(each.payload_bytes for each in choices if each.op == op) for op in {each.op for each in choices}}
    measured = rules_from(
        [
            (
                each.op,
                world_size,
                ANY_BYTES if each.payload_bytes == largest[each.op] else each.payload_bytes,
                each.after,
            )
            for each in choices
        ]
    )
    kept = [rule for rule in before.rules if rule.max_size != world_size or rule.op not in largest]
    return Table(tuple(sorted([*kept, *measured], key=lambda rule: (rule.op, rule.max_size, rule.max_bytes))))


def tune(group: dist.ProcessGroup, plan: TunePlan) -> Found:
    """Measure on the ranks of `group`, all of which call this and get the same. Writes nothing."""
    size, busy = dist.get_world_size(group), load()
    everyone, device = TorchCollectives(group, name="tune"), torch.device("cpu")
    first, *_ = exchange_texts(read_table().to_json().encode(), everyone, device=device, label="tables of algorithms")
    before = Table.from_json(first.decode())  # hosts may have tables that differ
    rivals = {
        (op, name): pairwise_over(group, Table((Rule(op, size, ANY_BYTES, name),)), name=f"{op} by {name}")
        for op, names in RIVALS.items()
        for name in names
    }
    choices: list[Choice] = []
    with progress("tune", total=len(RIVALS) * len(plan.sizes_bytes), rank=dist.get_rank()) as bar:
        for op, names in RIVALS.items():
            for num_bytes in plan.sizes_bytes:
                runs = {name: build_case(rivals[op, name], op, num_bytes).run for name in names}
                times_s = time_in_turns(runs, group=group, device=device, rounds=plan.rounds, slice_s=plan.slice_s)
                current = before.choose(op, size=size, num_bytes=num_bytes)
                after = choose_algorithm(times_s, current=current)
                medians = {name: statistics.median(each) for name, each in times_s.items()}
                choices.append(Choice(op, num_bytes, current, after, medians))
                bar.update(op=op, bytes=num_bytes)
    return Found(size, str(table_path()), tuple(choices), merge_rules(choices, before, world_size=size), busy)


def table_of(found: Found) -> tables.Table:
    """What was measured, with a word where something changes."""
    shown = [
        (
            each.op,
            shown_bytes(each.payload_bytes),
            "  ".join(f"{name} {tables.shown_seconds(median_s)}" for name, median_s in each.median_s.items()),
            each.after,
            _reason(each),
        )
        for each in found.choices
    ]
    changed = sum(each.after != each.before for each in found.choices)
    columns = ("op", "size", "measured", "algorithm", "change")
    title = f"{found.world_size} ranks: {changed} of {len(shown)} choices change"
    return tables.Table(
        title, columns, tuple(shown), words=("op", "measured", "algorithm", "change"), notes=load_notes(found.load)
    )


def _reason(choice: Choice) -> str:
    """What changes, or why what looked faster is not taken."""
    if choice.after != choice.before:
        return f"was {choice.before}"
    fastest = min(choice.median_s, key=lambda name: choice.median_s[name])
    return "" if fastest == choice.after else f"{fastest} too unsteady, or too close"


def write_table(table: Table, path: Path) -> None:
    """Write `table` where `read_table` looks; whoever reads meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(table.to_json() + "\n")
    Path(file.name).replace(path)


def main(argv: Sequence[str]) -> None:
    """Be one rank. The first of each host writes the table, rank 0 what was found."""
    plan = TunePlan.from_json(argv[0]) if argv else TunePlan()
    dist.init_process_group("gloo")
    try:
        if dist.get_world_size() == 1:
            raise ConfigError("One rank has nobody to exchange messages with. Tune with as many ranks as you train on.")
        assert dist.group.WORLD is not None
        found = tune(dist.group.WORLD, plan)
        if not plan.is_dry and os.environ.get("LOCAL_RANK", "0") == "0":
            write_table(found.table, table_path())
        if dist.get_rank() == 0:
            if len(argv) > 1:
                Path(argv[1]).write_text(found.to_json(), encoding="utf-8")
            else:
                sys.stdout.write(found.to_json())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
