"""The report of `zcore comm bench` as tables: for each op its sizes, and at each size every implementation."""

from zcore.comm.bench.contenders import COPY
from zcore.comm.bench.measure import Plan, Report, Row
from zcore.core.machine import load_notes
from zcore.core.quantities import shown_bytes
from zcore.core.tables import Table, shown_rate, shown_seconds

__all__ = ["tables_of"]

COLUMNS = ("size", "implementation", "latency", "spread", "bus", "of copy", "speedup")
WIDE = 0.5  # a spread beyond which a figure says little; where a quarter are so wide, the reader is told


def tables_of(report: Report) -> list[Table]:
    """One for each op, and what to know before reading them."""
    machine, size = report.machine, report.world_size
    device = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores"
    title = f"{size} ranks on {device}, torch {report.versions['torch']}, {report.backend}"
    notes = [
        "latency: one call of many back to back, on the slowest rank; median of rounds",
        "spread: distance of the quartiles over the median; - of a single round",
        "bus: bytes/s that a link carries for it; k, M, G: 10^3, 10^6, 10^9",
        "of copy: speed beside a memory copy of what a link would carry, on all ranks",
        f"speedup: the time of {report.plain} over this one's, in the same round; median",
    ]
    notes += load_notes(report.load[0])
    wide = sum(_spread(row) > WIDE for row in report.rows)
    if wide * 4 > len(report.rows):
        notes.append(f"{wide} of {len(report.rows)} figures spread by more than {WIDE:.0%}: others used the machine.")
    ops = list(dict.fromkeys(row.op for row in report.rows))
    return [Table(title, notes=tuple(notes)), *(_table(report, op) for op in ops)]


def _table(report: Report, op: str) -> Table:
    rows: list[tuple[str, ...]] = []
    last_bytes = -1
    for row in report.rows:
        if row.op == op:
            rows.append(
                (shown_bytes(row.payload_bytes) if row.payload_bytes != last_bytes else "", *_cells(row, report.plan))
            )
            last_bytes = row.payload_bytes
    return Table(op, COLUMNS, tuple(rows), words=("implementation",))


def _spread(row: Row) -> float:
    return (row.time_s.high - row.time_s.low) / row.time_s.median


def _cells(row: Row, plan: Plan) -> tuple[str, ...]:
    is_copy = row.implementation == COPY
    time_s = row.time_s
    speedup = None if is_copy else row.speedup
    return (
        row.implementation,
        shown_seconds(time_s.median),
        f"{_spread(row):.0%}" if plan.rounds > 1 else "-",
        shown_rate(row.bus_bytes_per_s.median) if row.bus_bytes_per_s else "",
        _shown_share(row.of_copy.median) if row.of_copy and not is_copy else "",
        f"{speedup.median:.{2 if speedup.median < 9.995 else 0}f}x" if speedup else "",
    )


def _shown_share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"
