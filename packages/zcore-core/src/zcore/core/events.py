"""Metrics as values with units, the sinks they go to, and a progress display for long work.

    Events(sinks) --emit("loss", 2.31, unit="nats", step=7)--> each sink's write(Metric)

There is no global stream: whoever measures owns an `Events` and passes it on. Which rank writes or shows is the
caller's decision, made where the rank is known.
"""

import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self, SupportsFloat, TextIO, cast

from zcore.core import extensions
from zcore.core.errors import ConfigError

__all__ = [
    "Events",
    "JsonlSink",
    "LogSink",
    "MemorySink",
    "Metric",
    "Progress",
    "Sink",
    "log_visibly",
    "open_sink",
    "progress",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number."""

    name: str
    value: float
    unit: str  # as people write it: "s", "bytes", "tokens/s", "nats"; "" for a plain count
    step: int | None = None
    rank: int = 0  # global

    def __str__(self) -> str:
        at = "" if self.step is None else f"step {self.step} "
        return f"{at}{self.name} {self.value:.6g} {self.unit}".rstrip()


class Sink(Protocol):
    """Where metrics go. A sink that fails raises: a monitor that is silently dead is worse than none."""

    def write(self, metric: Metric) -> None:
        """Take one metric; it may be kept back until `close`."""

    def close(self) -> None:
        """Write out what was kept back and let go of files and connections. Nothing is written afterwards."""


class Events:
    """Passes each metric to every sink, in order.

    >>> sink = MemorySink()
    >>> with Events([sink]) as events:
    ...     events.emit("loss", 2.5, unit="nats", step=1)
    >>> print(*sink.metrics)
    step 1 loss 2.5 nats
    """

    def __init__(self, sinks: Sequence[Sink] = (), *, rank: int = 0) -> None:
        self.sinks = tuple(sinks)
        self.rank = rank

    def emit(
        self, name: str, value: SupportsFloat, *, unit: str, step: int | None = None, rank: int | None = None
    ) -> None:
        """Send one number on; `value` is read to a Python float here, which waits for a tensor on an accelerator.

        rank: of whom it is, by default `self.rank`.
        """
        metric = Metric(name, float(value), unit, step, self.rank if rank is None else rank)
        for sink in self.sinks:
            sink.write(metric)

    def close(self) -> None:
        """Close every sink, also when one of them fails to."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class MemorySink:
    """Keeps every metric in a list."""

    metrics: list[Metric] = field(default_factory=list)

    def write(self, metric: Metric) -> None:
        """Append."""
        self.metrics.append(metric)

    def close(self) -> None:
        """Nothing to let go of; the list stays."""


class LogSink:
    """One log line at INFO for each metric."""

    def write(self, metric: Metric) -> None:
        """Log."""
        logger.info("%s", metric)

    def close(self) -> None:
        """Nothing to let go of."""


class JsonlSink:
    """One JSON object a line, appended, each line flushed: the file is good up to the moment a run dies."""

    def __init__(self, path: str | Path) -> None:
        self._file: TextIO = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close()

    def write(self, metric: Metric) -> None:
        """Append a line; NaN and infinities are null, as JSON has no word for them."""
        values = asdict(metric)
        values["value"] = metric.value if abs(metric.value) < float("inf") else None
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


SINKS: dict[str, Callable[..., Sink]] = {"jsonl": JsonlSink, "log": LogSink, "memory": MemorySink}


def open_sink(name: str, **options: Any) -> Sink:
    """The sink called `name`: the core's, or what a wheel offers in the entry point group `zcore.sinks`.

    >>> open_sink("memory")
    MemorySink(metrics=[])
    """
    factory = SINKS.get(name) or cast(Callable[..., Sink], extensions.load("zcore.sinks", name))
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"The sink `{name}` is given {sorted(options) or 'no options'}: {error}.") from error
    return factory(**options)


def log_visibly(logger: logging.Logger, message: str, *args: object) -> None:
    """Log at INFO what a user has asked to see; on stderr, plainly, while nobody has configured logging.

    No handler is left behind: a program that adds one later has all further lines there, each once.
    """
    if logger.hasHandlers():
        logger.info(message, *args)
    else:
        record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, args, None)
        logging.StreamHandler().handle(record)


class Progress:
    """What `progress` gives, to be used in a `with`. This one shows nothing, as ranks other than 0 do."""

    def update(self, advance: int = 1, **values: float | str) -> None:
        """So much more is done; `values` replace the values shown, `tokens_per_s` under the name tokens/s."""

    def close(self) -> None:
        """Show where the work stopped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(title: str, *, total: int, rank: int = 0, stream: TextIO | None = None) -> Progress:
    """Show how far a long piece of work is, on rank 0: a live bar on a terminal with Rich, otherwise a line at times.

    >>> with progress("training", total=2, stream=sys.stdout) as bar:
    ...     bar.update(2, loss=2.5, tokens_per_s=12340.5, memory="1.2 GiB")
    training 2/2  loss 2.5  tokens/s 12,340  memory 1.2 GiB
    """
    stream = stream or sys.stderr
    if rank != 0:
        return Progress()
    if stream.isatty() and find_spec("rich") is not None:
        return _Bar(title, total, stream)
    return _Lines(title, total, stream)


def _joined(values: Mapping[str, float | str]) -> str:
    """Large numbers with thousands separators, others to four digits."""
    return "".join(
        f"  {name.replace('_per_', '/')} "
        + (value if isinstance(value, str) else format(value, ",.0f" if abs(value) >= 1000 else ".4g"))
        for name, value in values.items()
    )


class _Lines(Progress):
    """For a pipe or a log file: the first step, the last, where work stopped, and a line each 5 s between."""

    def __init__(self, title: str, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._total, self._stream, self._clock = title, total, stream, clock
        self._done, self._shown = 0, 0
        self._due_s = clock()
        self._values: dict[str, float | str] = {}

    def update(self, advance: int = 1, **values: float | str) -> None:
        self._done += advance
        self._values |= values
        if self._done >= self._total or self._clock() >= self._due_s:
            self._show()

    def _show(self) -> None:
        self._shown, self._due_s = self._done, self._clock() + 5.0
        self._stream.write(f"{self._title} {self._done}/{self._total}{_joined(self._values)}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._shown != self._done:
            self._show()


class _Bar(Progress):
    """For a terminal: a live bar with the time taken and the time left, and the values on the line below."""

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        from rich import progress as bars
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        self._bar = bars.Progress(
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left", style="dim"),
            bars.TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._bar.add_task(title, total=total)
        self._text = Text(style="cyan", no_wrap=True, overflow="ellipsis")
        self._values: dict[str, float | str] = {}
        self._live = Live(Group(self._bar, self._text), console=Console(file=stream), refresh_per_second=8)

    def update(self, advance: int = 1, **values: float | str) -> None:
        self._bar.advance(self._task, advance)
        self._values |= values
        self._text.plain = _joined(self._values).lstrip()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def close(self) -> None:
        self._live.stop()
