"""The zcore command gathers what wheels offer; a broken one shows its cause and takes no other down."""

import io
import subprocess
import sys
from collections.abc import Callable

import pytest

from zcore.core import cli

GREET = """
import typer
from zcore.core.errors import ConfigError
group = typer.Typer()
@group.command()
def loud() -> None:
    print("HELLO")
@group.command()
def soft() -> None:
    print("hello")
def refuse(stage: int) -> None:
    raise ConfigError(f"stage is {stage}; expected 0 to 3.")
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["zcore", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture(autouse=True)
def _two_wheels(add_wheel: Callable[..., None]) -> None:
    commands = {"greet": "greet_module:group", "refuse": "greet_module:refuse"}
    add_wheel("zcore-greet", "1", {"zcore.commands": commands}, greet_module=GREET)
    add_wheel("zcore-torn", "2", {"zcore.commands": {"torn": "torn_module:app"}}, torn_module="import nonesuch")
    add_wheel("zcore-odd", "3", {"zcore.commands": {"odd": "odd_module:value"}}, odd_module="value = 3")


def test_the_help_lists_every_command_and_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("doctor", "greet", "refuse", "torn", "Broken: zcore-torn 2"))


def test_a_wheels_command_runs_beside_a_broken_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "greet", "loud") == 0
    assert capsys.readouterr().out == "HELLO\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("refuse", "4"), "Error: stage is 4; expected 0 to 3.\n"),
        (("torn", "with", "--any", "arguments"), "No module named 'nonesuch'"),
        (("odd",), "zcore-odd offers `odd` in zcore.commands, which is a int; expected a function or a typer.Typer."),
    ],
)
def test_an_error_is_one_paragraph_and_exit_1(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_wrong_usage_is_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "doctor", "--jsn") == 2
    assert "--json" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_how_to_get_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert run(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err == f"The zcore command needs {missing}: pip install 'zcore-core[cli]'\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_narrow_terminal_that_lacks_characters_shows_the_rest(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "30")  # where words are cut
    assert run(monkeypatch, "doctor") == 1  # as there are broken wheels, with which it ends
    terminal.seek(0)
    shown = terminal.read()
    assert "?" in shown
    assert "Problem: zcore-torn" in shown


def test_the_command_starts_without_importing_torch() -> None:
    program = "import sys; from zcore.core import cli; cli.build_app(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
