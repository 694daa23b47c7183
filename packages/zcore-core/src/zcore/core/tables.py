"""Small tables and the units in them, as plain text and in Rich; nothing here knows what the tables are about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zcore.core.quantities import two_digits

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Table", "draw_tables", "shown_rate", "shown_seconds", "write_tables"]


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
            lines.append("  ".join(cells).rstrip())
    return [*lines, *table.notes]


def _widths(table: Table) -> list[int]:
    return [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]


def draw_tables(tables: Sequence[Table]) -> "RenderableType":
    """For a terminal; where it is narrow words are cut, numbers are not."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[RenderableType] = []
    for table in tables:
        if parts:
            parts.append(Text())
        if table.title:
            parts.append(Text(table.title, style="bold"))
        if table.rows:
            drawn = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
            for column, width in zip(table.columns, _widths(table), strict=True):
                if column in table.words:
                    drawn.add_column(column, no_wrap=True, overflow="ellipsis")
                else:
                    drawn.add_column(column, justify="right", no_wrap=True, min_width=width)
            for row in table.rows:
                drawn.add_row(*map(Text, row))
            parts.append(drawn)
        parts.extend(Text(note) for note in table.notes)
    return Group(*parts)


def shown_seconds(seconds: float) -> str:
    """In the unit people would say it in; in 6 characters up to 999 seconds.

    >>> [shown_seconds(each) for each in (0.0, 0.0000042, 0.0123, 75.04)]
    ['0 us', '4.2 us', '12 ms', '75 s']
    """
    if seconds < 0.9995e-3:
        return f"{two_digits(seconds * 1e6)} us"
    return f"{two_digits(seconds * 1e3)} ms" if seconds < 0.9995 else f"{two_digits(seconds)} s"


def shown_rate(bytes_per_s: float) -> str:
    """In GB/s, 10^9 bytes as nccl-tests counts.

    >>> [shown_rate(each) for each in (0.0, 4.2e6, 1.234e9, 12.34e9)]
    ['0.00', '0.00', '1.23', '12']
    """
    gigabytes_per_s = bytes_per_s / 1e9
    return f"{gigabytes_per_s:.2f}" if gigabytes_per_s < 9.995 else f"{gigabytes_per_s:.0f}"
