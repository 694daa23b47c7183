"""From what all ranks have recorded to a report on their collectives. Pure: asks no rank and no clock.

Bandwidths are those of nccl-tests. The algorithm's is the payload, of the larger side, over the time of a call; the
bus's is what each rank's link carries for that, so that it can be held against the hardware whatever the op:

    all_reduce                               2 (n - 1) / n   of the algorithm's, for n ranks
    all_gather, reduce_scatter, all_to_all     (n - 1) / n
    broadcast, send, recv                             1

The time of a call is that of the rank that took least, from start to done: it came last, and waited for nobody. Where
the program computed in the meantime, the collective may have been done before anybody looked; the bandwidth is then a
lower bound and has ">" before it.

Who comes last is told from waiting, not from clocks: of one call, the rank that waits least is the one for which the
others wait. That is so where all ranks need each other's data, as in `SYMMETRIC_OPS`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from zcore.comm.recording.totals import Group, RankTotals, Totals
from zcore.core.quantities import shown_bytes
from zcore.core.tables import Table, draw_tables, shown_rate, shown_seconds, write_tables

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["SYMMETRIC_OPS", "CommReport", "LabelRow", "OpRow", "RankRow", "build_report", "bus_factor"]

SYMMETRIC_OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
LATE_S = 100e-6  # ranks come this much apart by chance; gloo's and the scheduler's wake-ups take as long
STANDS_OUT = 3.0  # times what the others wait for most ranks, from which on a rank is called a straggler
OVERLAPPED = 0.1  # of a call's time not held by it, from which on its bandwidth is called a lower bound
LEGEND = (
    "wait: how long wait() held the program, on average; done in: since the start.",
    "B/s: payload over the time of whoever came last; bus: what a link carries;",
    "k, M, G: 10^3, 10^6, 10^9; >: or more, as the program computed meanwhile.",
)
RANKS_LEGEND = (
    "recorded: for how long; of that: waiting in wait(), starting in the calls that",
    "start a collective; others waited: longer than this rank, for it.",
)
SHOWN_LABELS = 5
SHOWN_RANKS = 8


@dataclass(frozen=True, slots=True)
class OpRow:
    """Calls of one op, size and algorithm in the groups of one name. Seconds are means over calls and ranks."""

    group: str
    group_size: int  # ranks
    algorithm: str
    op: str
    size_bytes: int  # payloads are at most this, and more than half of it
    num_calls: int  # of one rank
    payload_bytes: int  # of these calls together
    num_open: int  # calls that a rank has not waited for yet, over all ranks
    mean_wait_s: float
    max_wait_s: float
    mean_span_s: float  # from start to done
    algorithm_bandwidth: float  # bytes/s; 0 if no call is done, or nothing sent, as with one rank
    bus_bandwidth: float  # bytes/s
    is_lower_bound: bool


@dataclass(frozen=True, slots=True)
class LabelRow:
    """Calls for one purpose. Seconds are of the rank that waited longest."""

    op: str
    label: str
    num_calls: int  # of that rank
    wait_s: float
    max_wait_s: float


@dataclass(frozen=True, slots=True)
class RankRow:
    """How much of its time one rank was held by collectives, and how often others were held for it."""

    global_rank: int
    host: str
    elapsed_s: float
    wait_s: float
    start_s: float  # inside the calls that start a collective
    num_last: int  # of the compared calls
    delay_s: float  # how much longer the others waited in these, on average over them, added up

    @property
    def wait_share(self) -> float:
        """Of the recorded time."""
        return self.wait_s / self.elapsed_s if self.elapsed_s else 0.0


@dataclass(frozen=True, slots=True)
class CommReport:
    """What `Recording.report` gives. `print` it, or give it to Rich, or take the numbers."""

    ops: tuple[OpRow, ...]
    labels: tuple[LabelRow, ...]  # the longest waits first
    ranks: tuple[RankRow, ...]
    num_compared: int  # calls of which every rank's wait is known
    straggler: int | None  # the global rank for which others wait, if one stands out

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types. Bytes, seconds and bytes/s."""
        return asdict(self)

    def __str__(self) -> str:
        return write_tables(_tables(self))

    def __rich__(self) -> "RenderableType":
        return draw_tables(_tables(self))


def bus_factor(op: str, group_size: int) -> float:
    """What a rank's link carries for each byte of payload.

    >>> bus_factor("all_reduce", 4), bus_factor("all_gather", 4), bus_factor("broadcast", 4)
    (1.5, 0.75, 1.0)
    """
    if op not in SYMMETRIC_OPS:
        return 1.0
    return (2 if op == "all_reduce" else 1) * (group_size - 1) / group_size


def build_report(ranks: Sequence[RankTotals]) -> CommReport:
    """Put together what `ranks` have recorded, in any order."""
    ranks = sorted(ranks, key=lambda each: each.global_rank)
    lateness = _Lateness(ranks)
    return CommReport(
        ops=tuple(_op_rows(ranks)),
        labels=tuple(_label_rows(ranks)),
        ranks=tuple(
            RankRow(
                each.global_rank,
                each.host,
                each.elapsed_s,
                sum(totals.wait_s for totals in each.kinds.values()),
                sum(totals.start_s for totals in each.kinds.values()),
                lateness.num_last[each.global_rank],
                lateness.delay_s[each.global_rank],
            )
            for each in ranks
        ),
        num_compared=lateness.num_compared,
        straggler=lateness.straggler,
    )


def _op_rows(ranks: Sequence[RankTotals]) -> list[OpRow]:
    """By group and algorithm, then by op; the largest payloads first."""
    told: dict[tuple[str, int, str, str, int], dict[Group, list[Totals]]] = {}
    for rank in ranks:
        for kind, totals in rank.kinds.items():
            key = kind.group.name, len(kind.group.ranks), kind.algorithm, kind.op, kind.size_bytes
            told.setdefault(key, {}).setdefault(kind.group, []).append(totals)
    rows = [_op_row(*key, told=list(groups.values())) for key, groups in told.items()]
    sections = list(dict.fromkeys((row.group, row.group_size, row.algorithm) for row in rows))
    return sorted(
        rows,
        key=lambda row: (sections.index((row.group, row.group_size, row.algorithm)), row.op, -row.size_bytes),
    )


def _op_row(
    group: str, group_size: int, algorithm: str, op: str, size_bytes: int, *, told: list[list[Totals]]
) -> OpRow:
    """`told`: for each group of that name, what its ranks tell."""
    everyone = [totals for ranks in told for totals in ranks]
    num_done = sum(totals.num_done for totals in everyone)
    # Of an op in which all need each other the quickest rank waited for nobody; of others one rank may only send.
    choose = min if op in SYMMETRIC_OPS else max
    done = [[totals for totals in ranks if totals.num_done] for ranks in told]
    taken = [choose(ranks, key=lambda totals: totals.span_s / totals.num_done) for ranks in done if ranks]
    span_s = sum(totals.span_s for totals in taken)
    held_s = sum(totals.start_s + totals.wait_s for totals in taken)
    bandwidth = sum(totals.done_bytes for totals in taken) / span_s if span_s and group_size > 1 else 0.0
    most = max(everyone, key=lambda totals: totals.num_calls)
    return OpRow(
        group=group,
        group_size=group_size,
        algorithm=algorithm,
        op=op,
        size_bytes=size_bytes,
        num_calls=most.num_calls,
        payload_bytes=most.payload_bytes,
        num_open=sum(totals.num_calls - totals.num_done for totals in everyone),
        mean_wait_s=sum(totals.wait_s for totals in everyone) / num_done if num_done else 0.0,
        max_wait_s=max(totals.max_wait_s for totals in everyone),
        mean_span_s=sum(totals.span_s for totals in everyone) / num_done if num_done else 0.0,
        algorithm_bandwidth=bandwidth,
        bus_bandwidth=bandwidth * bus_factor(op, group_size),
        is_lower_bound=held_s < (1 - OVERLAPPED) * span_s,
    )


def _label_rows(ranks: Iterable[RankTotals]) -> list[LabelRow]:
    longest: dict[tuple[str, str], Totals] = {}
    for rank in ranks:
        for key, totals in rank.labels.items():
            if key not in longest or totals.wait_s > longest[key].wait_s:
                longest[key] = totals
    rows = [
        LabelRow(op, label, totals.num_calls, totals.wait_s, totals.max_wait_s)
        for (op, label), totals in longest.items()
    ]
    return sorted(rows, key=lambda row: -row.wait_s)


class _Lateness:
    """Which rank came last in each call whose waits are known of all its ranks."""

    def __init__(self, ranks: Sequence[RankTotals]) -> None:
        self.num_compared = 0
        self.num_last = {rank.global_rank: 0 for rank in ranks}
        self.delay_s = {rank.global_rank: 0.0 for rank in ranks}
        told = {rank.global_rank: rank.waits for rank in ranks}
        for group in dict.fromkeys(group for rank in ranks for group in rank.waits):
            if len(group.ranks) > 1 and all(group in told.get(rank, {}) for rank in group.ranks):
                self._compare({rank: told[rank][group] for rank in group.ranks})

    def _compare(self, waits: Mapping[int, Mapping[int, float]]) -> None:
        for index in set.intersection(*(set(each) for each in waits.values())):
            self.num_compared += 1
            by_wait = sorted((each[index], rank) for rank, each in waits.items())
            least_s, last = by_wait[0]
            if by_wait[-1][0] - least_s < LATE_S:
                continue
            others_s = sum(wait_s for wait_s, _ in by_wait[1:]) / (len(by_wait) - 1)
            self.num_last[last] += 1
            self.delay_s[last] += others_s - least_s

    @property
    def straggler(self) -> int | None:
        """The rank for which the others wait longest, if that is much longer than for most."""
        last = max(self.delay_s, key=lambda rank: self.delay_s[rank])
        others_s = [delay_s for rank, delay_s in self.delay_s.items() if rank != last]
        stands_out = bool(others_s) and self.delay_s[last] > STANDS_OUT * median(others_s)
        return last if stands_out else None


def _tables(report: CommReport) -> list[Table]:
    if not report.ops:
        return [Table("No collective was recorded. Between one rank and itself there is none.")]
    return [*_op_tables(report), Table("", notes=LEGEND), *_label_tables(report), _rank_table(report)]


def _op_tables(report: CommReport) -> Iterable[Table]:
    sections: dict[tuple[str, int, str], list[OpRow]] = {}
    for row in report.ops:
        sections.setdefault((row.group, row.group_size, row.algorithm), []).append(row)
    columns = ("op", "up to", "calls", "total", "wait", "longest", "done in", "B/s", "bus")
    for (group, group_size, algorithm), rows in sections.items():
        num_open = sum(row.num_open for row in rows)
        yield Table(
            f"{group}: {group_size} {'ranks' if group_size > 1 else 'rank'}, {algorithm}",
            columns,
            tuple(
                (
                    row.op,
                    shown_bytes(row.size_bytes),
                    str(row.num_calls),
                    shown_bytes(row.payload_bytes),
                    shown_seconds(row.mean_wait_s),
                    shown_seconds(row.max_wait_s),
                    shown_seconds(row.mean_span_s),
                    _rate(row, row.algorithm_bandwidth),
                    _rate(row, row.bus_bandwidth),
                )
                for row in rows
            ),
            words=("op",),
            notes=(f"{num_open} of all ranks' calls were not waited for.",) * bool(num_open),
        )


def _rate(row: OpRow, bytes_per_s: float) -> str:
    return ">" * row.is_lower_bound + shown_rate(bytes_per_s) if row.algorithm_bandwidth else "-"


def _label_tables(report: CommReport) -> Iterable[Table]:
    rows = [row for row in report.labels if row.wait_s][:SHOWN_LABELS]
    if rows:
        yield Table(
            "Longest waits, on the rank that waited most",
            ("together", "longest", "calls", "op", "for"),
            tuple(
                (shown_seconds(row.wait_s), shown_seconds(row.max_wait_s), str(row.num_calls), row.op, row.label)
                for row in rows
            ),
            words=("op", "for"),
        )


def _rank_table(report: CommReport) -> Table:
    """The ranks for which the others waited longest, in order of rank."""
    shown = sorted(report.ranks, key=lambda row: (-row.delay_s, row.global_rank))[:SHOWN_RANKS]
    left_out = len(report.ranks) - len(shown)
    return Table(
        "Ranks",
        ("rank", "host", "recorded", "waiting", "starting", "others waited", "came last"),
        tuple(
            (
                str(row.global_rank),
                row.host,
                shown_seconds(row.elapsed_s),
                _percent(row.wait_s, row.elapsed_s),
                _percent(row.start_s, row.elapsed_s),
                shown_seconds(row.delay_s) if report.num_compared else "-",
                str(row.num_last) if report.num_compared else "-",
            )
            for row in sorted(shown, key=lambda row: row.global_rank)
        ),
        words=("host",),
        notes=(*(f"and {left_out} more ranks" for _ in range(bool(left_out))), *RANKS_LEGEND, _verdict(report)),
    )


def _verdict(report: CommReport) -> str:
    if not report.num_compared:
        if len(report.ranks) == 1:
            return (
                "Of this rank only, and its waits for the others count in B/s;\n"
                "`recording.report(dist.group.WORLD)` on every rank compares them."
            )
        return "Nothing to compare between ranks."
    last = max(report.ranks, key=lambda row: row.delay_s)
    if not last.num_last:
        return f"No rank came last by more than {shown_seconds(LATE_S)} in any of {report.num_compared} calls."
    calls = f"{last.num_last} of {report.num_compared} calls, by {shown_seconds(last.delay_s / last.num_last)} each"
    if report.straggler is None:
        return f"No rank stands out: rank {last.global_rank} was last in {calls}."
    return f"The others wait for rank {last.global_rank}: last in {calls}."


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
