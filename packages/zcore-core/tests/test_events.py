"""Metrics reach every sink with their unit, and progress is readable on a terminal, in a pipe and in a log."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zcore.core.errors import ConfigError, NotInstalledError
from zcore.core.events import (
    Events,
    JsonlSink,
    LogSink,
    MemorySink,
    Metric,
    Sink,
    _Lines,
    log_visibly,
    open_sink,
    progress,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_sink_gets_every_metric_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = MemorySink()
    with caplog.at_level(logging.INFO), Events([memory, LogSink(), JsonlSink(tmp_path / "m.jsonl")], rank=1) as events:
        events.emit("loss", torch.tensor(2.5), unit="nats", step=7)
        events.emit("memory", 2**30, unit="bytes")
    assert memory.metrics == [Metric("loss", 2.5, "nats", 7, 1), Metric("memory", 2.0**30, "bytes", None, 1)]
    assert caplog.messages[0] == "step 7 loss 2.5 nats"
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines[0] == {"name": "loss", "value": 2.5, "unit": "nats", "step": 7, "rank": 1}
    assert len(lines) == 2


def test_a_line_that_was_asked_for_is_on_stderr_until_logging_is_configured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = logging.getLogger("alone")
    monkeypatch.setattr(alone, "propagate", False)  # pytest has handlers at the root
    log_visibly(alone, "step %d", 1)
    assert capsys.readouterr().err == "step 1\n"
    configured = io.StringIO()
    monkeypatch.setattr(alone, "handlers", [logging.StreamHandler(configured)])
    log_visibly(alone, "step %d", 2)
    alone.setLevel(logging.INFO)
    log_visibly(alone, "step %d", 3)
    assert configured.getvalue() == "step 3\n"
    assert capsys.readouterr().err == ""


def test_a_jsonl_file_grows_and_is_whole_before_it_is_closed(tmp_path: Path) -> None:
    for step in range(2):
        sink = JsonlSink(tmp_path / "m.jsonl")
        sink.write(Metric("loss", float("nan"), "nats", step))
        lines = (tmp_path / "m.jsonl").read_text().splitlines()
        sink.close()
        assert len(lines) == step + 1
        assert json.loads(lines[-1])["value"] is None


class Unclosable(MemorySink):
    def close(self) -> None:
        raise OSError("the disk is full")


def test_a_sink_that_fails_to_close_raises_and_the_others_close(tmp_path: Path) -> None:
    file = JsonlSink(tmp_path / "m.jsonl")
    orders: list[list[Sink]] = [[Unclosable(), file], [file, Unclosable()]]
    for sinks in orders:
        with pytest.raises(OSError, match="disk is full"):
            Events(sinks).close()
        with pytest.raises(ValueError, match="closed"):
            file.write(Metric("loss", 1.0, "nats"))


def test_sinks_are_opened_by_name(tmp_path: Path) -> None:
    sink = open_sink("jsonl", path=tmp_path / "m.jsonl")
    sink.close()
    assert (tmp_path / "m.jsonl").exists()
    with pytest.raises(ConfigError, match=r"The sink `jsonl` is given \['file'\]"):
        open_sink("jsonl", file="x")
    with pytest.raises(NotInstalledError, match="No installed wheel offers `wandb`"):
        open_sink("wandb")


def test_a_wheels_sink_is_opened_by_name(add_wheel: Callable[..., None]) -> None:
    source = "from zcore.core.events import MemorySink\nclass Board(MemorySink): pass"
    add_wheel("zcore-board", "1", {"zcore.sinks": {"board": "board_sink:Board"}}, board_sink=source)
    assert type(open_sink("board")).__name__ == "Board"


def test_progress_in_a_pipe_is_first_last_and_one_line_each_5_s() -> None:
    now_s = 0.0
    stream = io.StringIO()
    with _Lines("training", 30, stream, lambda: now_s) as bar:
        for step in range(30):
            now_s = step * 0.5
            bar.update(loss=step / 3, tokens_per_s=12_345.6, memory="1.2 GiB")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "training 1/30",
        "training 11/30",
        "training 21/30",
        "training 30/30",
    ]
    assert lines[-1] == "training 30/30  loss 9.667  tokens/s 12,346  memory 1.2 GiB"


def test_work_that_breaks_off_says_where() -> None:
    stream = io.StringIO()

    def work() -> None:
        with progress("training", total=9, stream=stream) as bar:
            bar.update(loss=1.0)
            bar.update(loss=0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stream.getvalue().splitlines()[-1] == "training 2/9  loss 0.5"


def test_only_rank_0_shows_progress() -> None:
    stream = Terminal()
    with progress("training", total=2, rank=1, stream=stream) as bar:
        bar.update(loss=1.0)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_the_values_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with progress("training", total=2, stream=stream) as bar:
        bar.update(loss=2.0)
        bar.update(loss=1.0, memory="1.2 GiB")
    *_, above, below = (line for line in stream.getvalue().splitlines() if line.strip("\x1b[?25h \r"))
    assert "training" in above
    assert "2/2" in above
    assert "loss 1  memory 1.2 GiB" in below
