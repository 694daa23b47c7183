"""Small tables and the units in them, as plain text and in Rich; nothing here knows what the tables are about."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zcore.core.quantities import two_digits

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Table", "draw_tables", "plan_widths", "shown_rate", "shown_seconds", "write_tables"]

GAP = 2  # spaces between columns
LEAST_WORD = 4  # characters


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a title, with lines of text below. What is not in `words` is a number, and to the right."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    words: tuple[str, ...] = ()  # columns; those that are cut where there is no room
    notes: tuple[str, ...] = ()


def write_tables(tables: Sequence[Table]) -> str:
    """Plain text, columns aligned by spaces, nothing cut."""
    return "\n\n".join("\n".join(_lines(table)) for table in tables)


def _lines(table: Table) -> list[str]:
    lines = [table.title] if table.title else []
    if table.rows:
        widths = _widths(table)
        for row in (table.columns, *table.rows):
            cells = [
                cell.ljust(width) if column in table.words else cell.rjust(width)
                for column, cell, width in zip(table.columns, row, widths, strict=True)
            ]
            lines.append((" " * GAP).join(cells).rstrip())
    return [*lines, *table.notes]


def _widths(table: Table) -> list[int]:
    return [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]


def draw_tables(tables: Sequence[Table]) -> "RenderableType":
    """For a terminal; where it is narrow words are cut, numbers are not."""
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table as RichTable
    from rich.text import Text

    class Drawn:
        """Drawn once the width is known: Rich by itself takes from every column alike."""

        def __init__(self, table: Table) -> None:
            self._table = table

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> "Iterator[RenderableType]":
            table = self._table
            drawn = RichTable(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
            for column, width in zip(table.columns, plan_widths(table, options.max_width), strict=True):
                justify: Literal["left", "right"] = "left" if column in table.words else "right"
                drawn.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis", width=width)
            for row in table.rows:
                drawn.add_row(*map(Text, row))
            yield drawn

    parts: list[RenderableType] = []
    for table in tables:
        if parts:
            parts.append(Text())
        if table.title:
            parts.append(Text(table.title, style="bold"))
        if table.rows:
            parts.append(Drawn(table))
        parts.extend(Text(note) for note in table.notes)
    return Group(*parts)


def plan_widths(table: Table, max_width: int) -> list[int]:
    """Of the columns, words cut as far as it takes, the longest first, down to `LEAST_WORD` characters.

    >>> plan_widths(Table("", ("op", "time"), (("reduce_scatter", "1.5 ms"),), words=("op",)), 20)
    [12, 6]
    """
    widths = _widths(table)
    excess = sum(widths) + GAP * (len(widths) - 1) - max_width
    for _ in range(excess):
        cuttable = [at for at, column in enumerate(table.columns) if column in table.words and widths[at] > LEAST_WORD]
        if not cuttable:
            break
        widths[max(cuttable, key=lambda at: widths[at])] -= 1
    return widths


def shown_seconds(seconds: float) -> str:
    """In the unit people would say it in; in 6 characters up to 999 seconds.

    >>> [shown_seconds(each) for each in (0.0, 0.0000042, 0.0123, 75.04)]
    ['0 us', '4.2 us', '12 ms', '75 s']
    """
    if seconds < 0.9995e-3:
        return f"{two_digits(seconds * 1e6)} us"
    return f"{two_digits(seconds * 1e3)} ms" if seconds < 0.9995 else f"{two_digits(seconds)} s"


def shown_rate(bytes_per_s: float) -> str:
    """Bytes/s in 10^3, 10^6 or 10^9, as nccl-tests counts; in 5 characters up to a terabyte.

    >>> [shown_rate(each) for each in (0.0, 42.0, 4.2e6, 1.234e9, 12.34e9)]
    ['0', '42', '4.2M', '1.2G', '12G']
    """
    for unit in ("", "k", "M"):
        if bytes_per_s < 999.5:
            return f"{two_digits(bytes_per_s)}{unit}"
        bytes_per_s /= 1000
    return f"{two_digits(bytes_per_s)}G"
