"""Which algorithm moves a collective between pairs of ranks: a short table, by op, ranks and bytes.

`zcore comm tune` measures a table anew for the machines it runs on and writes it where `read_table` finds it; the one
here is of two and four ranks on a host.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from zcore.core.errors import ConfigError

__all__ = ["ALGORITHMS", "DEFAULT_TABLE", "Rule", "Table", "read_table", "rules_from", "table_path"]

ALGORITHMS = {
    "all_gather": ("exchange", "ring"),
    "reduce_scatter": ("exchange",),
    "all_reduce": ("gather", "exchange"),  # everybody adds everything; or each its slot, and then they exchange sums
    "all_to_all": ("exchange",),
    "broadcast": ("direct", "scatter"),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """For `op` among up to `max_size` ranks and up to `max_bytes` of the larger side."""

    op: str
    max_size: int
    max_bytes: int
    algorithm: str

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS.get(self.op, ()):
            there_are = ", ".join(f"{op}: {' or '.join(names)}" for op, names in ALGORITHMS.items())
            raise ConfigError(f"A rule gives {self.op} the algorithm {self.algorithm!r}; there are {there_are}.")


@dataclass(frozen=True, slots=True)
class Table:
    """The first rule that fits decides; without one, the last algorithm of the op, which is for the largest calls."""

    rules: tuple[Rule, ...] = ()

    def choose(self, op: str, *, size: int, num_bytes: int) -> str:
        """The algorithm for a call.

        >>> DEFAULT_TABLE.choose("all_reduce", size=2, num_bytes=4)
        'gather'
        """
        for rule in self.rules:
            if rule.op == op and size <= rule.max_size and num_bytes <= rule.max_bytes:
                return rule.algorithm
        return ALGORITHMS[op][-1]

    def digest(self) -> int:
        """Equal for equal tables; 32 bits."""
        return zlib.crc32(repr(self.rules).encode())

    def to_json(self) -> str:
        """The text of a file that `read_table` reads."""
        return json.dumps({"rules": [asdict(rule) for rule in self.rules]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """The table of such a text. Raises ConfigError where it is none."""
        try:
            return cls(tuple(Rule(**rule) for rule in json.loads(text)["rules"]))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"This is no table of algorithms: {type(error).__name__}: {error}. Measure one with `zcore comm tune`."
            ) from error


def rules_from(measured: Sequence[tuple[str, int, int, str]]) -> tuple[Rule, ...]:
    """Rules from the fastest algorithm for each (op, size, bytes), with equal neighbours made one."""
    rules: list[Rule] = []
    for op, size, num_bytes, algorithm in sorted(measured):
        last = rules[-1] if rules else None
        if last is not None and (last.op, last.max_size, last.algorithm) == (op, size, algorithm):
            rules[-1] = Rule(op, size, num_bytes, algorithm)
        else:
            rules.append(Rule(op, size, num_bytes, algorithm))
    return tuple(rules)


ANY_SIZE, ANY_BYTES = 1 << 31, 1 << 62
DEFAULT_TABLE = Table(
    (
        Rule("all_gather", 2, ANY_BYTES, "exchange"),
        Rule("all_gather", ANY_SIZE, 1 << 20, "exchange"),
        Rule("all_reduce", 2, 1 << 20, "gather"),  # 256 KiB: half the time of an exchange
        Rule("all_reduce", 4, 64 << 10, "gather"),
        Rule("all_reduce", ANY_SIZE, 4 << 10, "gather"),
        Rule("broadcast", 2, ANY_BYTES, "direct"),
        Rule("broadcast", ANY_SIZE, 256 << 10, "direct"),
    )
)


def table_path() -> Path:
    """Where a measured table lies: $ZCORE_COMM_TABLE, else in the user's folder for settings."""
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("ZCORE_COMM_TABLE") or settings / "zcore" / "comm-table.json")


@cache
def read_table() -> Table:
    """The measured table if there is one, else the default."""
    path = table_path()
    if not path.exists():
        return DEFAULT_TABLE
    try:
        return Table.from_json(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
