"""The doctor tells what is here, what is broken and what one would gain, and promises nothing."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from zcore.core import cli, ops
from zcore.core.doctor import Finding, Report, draw, examine, plan_gains
from zcore.core.extensions import WHEELS


def drawn(report: Report, *, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(draw(report))
    return stream.getvalue()


def test_what_a_wheel_serves_is_listed_under_its_contract(
    add_wheel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from zcore.core import ops\nops.reference('rotate')(lambda: None)"
    add_wheel("zcore-fast", "1", {"zcore.ops": {"fast": "fast_ops"}}, fast_ops=source)
    report = examine()
    assert {"torch references", "fast (zcore-fast)"} <= set(report.contracts["zcore.ops"])
    assert report.ops["rotate"]["cpu"] == "reference"
    assert report.problems == ()
    assert report.backends["gloo"]


def test_the_line_of_ops_counts_who_serves_them_and_the_table_says_for_which_dtypes(
    add_wheel: Callable[..., None],
) -> None:
    add_wheel("zcore-fast", "1", {})
    ops.reference("mirror")(lambda: None)
    ops.implementation("mirror", source="fast", priority=1, devices=("cpu",), dtypes=(torch.int8,))(lambda: None)
    examined = examine()
    report = replace(examined, ops={"mirror": examined.ops["mirror"]})
    assert report.ops["mirror"]["cpu"] == "fast (int8)"
    assert "fast (1): see below" in drawn(report, width=120)


def test_a_broken_wheel_is_a_problem_with_its_cause_and_exit_1(
    add_wheel: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_wheel("zcore-torn", "2", {"zcore.stores": {"tape": "torn_module"}}, torn_module="import nonesuch")
    monkeypatch.setattr(sys, "argv", ["zcore", "doctor", "--json"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "zcore-torn 2 offers `tape`" in problem
    assert "nonesuch" in problem


def test_what_a_wheel_finds_on_this_machine_is_shown_under_its_name(add_wheel: Callable[..., None]) -> None:
    source = "from zcore.core.doctor import Finding\nfind = lambda: [Finding('tapes', 'a robot', 'by hand')]"
    add_wheel("zcore-tape", "1", {"zcore.findings": {"tape": "tape_module:find"}}, tape_module=source)
    report = examine()
    assert report.findings["zcore-tape"] == (Finding("tapes", "a robot", "by hand"),)
    assert "zcore-tape on this machine" in drawn(report)
    assert any(line.split() == ["tapes", "a", "robot", "by", "hand"] for line in drawn(report).splitlines())


def test_a_wheel_that_fails_to_look_at_this_machine_is_a_problem_and_the_rest_is_shown(
    add_wheel: Callable[..., None],
) -> None:
    add_wheel("zcore-tape", "1", {"zcore.findings": {"tape": "tape_module:find"}}, tape_module="find = lambda: 1 / 0")
    report = examine()
    assert report.problems == ("zcore-tape finds out nothing: ZeroDivisionError: division by zero",)
    assert "zcore-tape" not in report.findings
    assert report.backends["gloo"]


def test_only_wheels_that_hold_work_are_advised() -> None:
    report = examine()
    empty = [wheel for wheel in WHEELS.values() if not wheel.holds_work]
    assert not any(wheel.name in command for wheel in empty for command in report.gains)
    assert drawn(report).count("nothing yet; to be:") == len(empty)


def test_an_extra_is_advised_where_its_wheel_is_and_what_it_needs_is_not() -> None:
    bench = "pip install 'zcore-comm[bench]'"
    assert bench in plan_gains({"zcore-core", "zcore-comm"}.__contains__)
    assert bench not in plan_gains({"zcore-core", "zcore-comm", "matplotlib"}.__contains__)
    assert bench not in plan_gains({"zcore-core"}.__contains__)
    assert "pip install 'zcore-core[yaml]'" in plan_gains({"zcore-core"}.__contains__)


@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_drawing_fits_its_width(width: int) -> None:
    report = replace(examine(), problems=("zcore-torn 2 offers `tape`, but fails to load. " * 3,))
    lines = drawn(report, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert {"Wheels", "Contracts", "To gain"} <= {line.strip() for line in lines}


def test_the_drawing_shows_versions_gains_and_ops() -> None:
    wheels = {"zcore-zero": "9.8.7", "zcore-comm": None}
    text = drawn(replace(examine(), wheels=wheels, gains={"pip install it": "speed"}, ops={"scale": {"cpu": "cpp"}}))
    assert "9.8.7" in text
    assert "pip install it" in text
    assert any(line.split() == ["scale", "cpp"] for line in text.splitlines())
    assert "every wheel that holds something is here" in drawn(replace(examine(), gains={}))


def test_an_op_that_nothing_serves_here_says_so(add_wheel: Callable[..., None]) -> None:
    add_wheel("zcore-fast", "1", {})
    ops.implementation("far", source="cuda", priority=1, devices=("cuda",))(lambda: None)
    assert examine().ops["far"]["cpu"] == "nothing"
