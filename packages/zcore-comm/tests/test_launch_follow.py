"""Commands that speak as launchers do: lines reach their stream, one failure ends all, and nothing is left behind."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from zcore.comm.launch.follow import run
from zcore.comm.launch.plan import Command
from zcore.comm.launch.screen import Screen
from zcore.core.errors import ConfigError

WAIT = "print('\\x1e0 here', flush=True); print('told', sys.stdin.readline().strip(), file=sys.stderr); sys.exit(9)"


@dataclass
class Shown:
    """What came of a run."""

    exitcode: int
    stdout: list[str]
    stderr: list[str]


def python(program: str, host: str | None = None) -> Command:
    return Command((sys.executable, "-c", f"import os, sys; {program}"), host=host)


def follow(commands: Sequence[Command], *, shutdown_s: float = 10, **options: bool) -> Shown:
    stdout, stderr = io.StringIO(), io.StringIO()
    exitcode = run(commands, Screen(stdout, stderr, **options), shutdown_s=shutdown_s)
    return Shown(exitcode, stdout.getvalue().splitlines(), stderr.getvalue().splitlines())


def test_lines_keep_their_stream_and_say_whose_they_are():
    program = "os.write(1, b'\\x1e0 out\\n\\x1e12 out\\nmotd\\n\\x1e0 last'); os.write(2, b'\\x1e1 err\\n')"
    shown = follow([python(program, "worker-1")])
    assert shown == Shown(0, ["[0] out", "[12] out", "[worker-1] motd", "[0] last"], ["[1] err"])


def test_prefixes_can_be_left_out():
    assert follow([python("os.write(1, b'\\x1e0 out\\n')")], has_prefix=False) == Shown(0, ["out"], [])


def test_a_terminal_shows_ranks_in_colours_of_their_own():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for has_colour in (True, False):
        terminal = Terminal()
        run([python("os.write(1, b'\\x1e0 a\\n\\x1e1 b\\n')")], Screen(terminal, terminal, has_colour=has_colour))
        plain = "[0] a\n[1] b\n"
        coloured = "\x1b[36m[0] \x1b[0ma\n\x1b[33m[1] \x1b[0mb\n"
        assert terminal.getvalue() == (coloured if has_colour else plain)


def test_a_failed_rank_ends_the_other_launchers_and_is_told_last():
    failing = (
        "os.write(2, b'\\x1e1 Traceback (most recent call last):\\n\\x1e1 ValueError: x\\n\\x1e1!3 n\\n'); sys.exit(1)"
    )
    shown = follow([python(WAIT, "a"), python(failing, "b")])
    assert shown.exitcode == 3
    assert "[a] told SIGTERM" in shown.stderr
    assert "[zcore run] ending the ranks of the other hosts, up to 10 s" in shown.stderr
    assert shown.stderr[-4].startswith("--- rank 1 on b failed first: exit code 3 ---")
    assert shown.stderr[-3:-1] == ["Traceback (most recent call last):", "ValueError: x"]


def test_the_cause_is_told_even_if_a_consequence_of_it_is_reported_before():
    consequence = (
        "os.write(2, b'\\x1e0 Traceback (most recent call last):\\n\\x1e0 RuntimeError: Connection closed by peer\\n');"
        "os.write(2, b'\\x1e0!1 a\\n'); sys.exit(1)"
    )
    shown = follow([python(consequence), python("os.write(2, b'\\x1e1!-9 b\\n'); sys.exit(1)")])
    assert shown.exitcode == 128 + 9
    assert any("rank 1 on b failed first: killed by SIGKILL" in line for line in shown.stderr)


def test_output_that_comes_after_the_news_of_a_failure_belongs_to_it():
    late = (
        "os.write(2, b'\\x1e1!3 n\\n\\x1e1 Traceback (most recent call last):\\n\\x1e1 ValueError: x\\n'); sys.exit(1)"
    )
    assert follow([python(late)]).stderr[-3:-1] == ["Traceback (most recent call last):", "ValueError: x"]


def test_what_a_rank_wrote_before_it_started_again_is_no_part_of_its_failure():
    raised = "\\x1e1 Traceback (most recent call last):\\n\\x1e1 ValueError: x\\n"
    shown = follow([python(f"os.write(2, b'{raised}\\x1e1*\\n\\x1e1 again\\n\\x1e1!4 n\\n'); sys.exit(1)")])
    assert shown.stderr[-3].startswith("--- rank 1 on n failed first: exit code 4 ---")
    assert shown.stderr[-2] == "again"


def test_only_ranks_that_left_before_the_failure_are_told():
    shown = follow([python("os.write(2, b'\\x1e4!0 n\\n\\x1e2!0 n\\n\\x1e1!3 n\\n\\x1e0!0 n\\n'); sys.exit(1)")])
    assert shown.exitcode == 3
    assert shown.stderr[-2] == "Ranks 2, 4 had ended by then, with exit code 0."
    assert follow([python("os.write(2, b'\\x1e1!0 n\\n')")]) == Shown(0, [], [])


def test_a_rank_that_had_ended_and_started_again_is_not_told_to_have_left():
    shown = follow([python("os.write(2, b'\\x1e0!0 n\\n\\x1e2!0 n\\n\\x1e0*\\n\\x1e1!3 n\\n'); sys.exit(1)")])
    assert shown.stderr[-2] == "Rank 2 had ended by then, with exit code 0."


def test_a_host_that_is_not_reached_ends_the_others_and_says_what_to_try():
    lost = Command(("sh", "-c", "echo 'ssh: connect to host b port 22: Connection refused' >&2; exit 255"), host="b")
    shown = follow([python(WAIT, "a"), lost])
    assert shown.exitcode == 255
    assert "[a] told SIGTERM" in shown.stderr
    assert "launcher on b failed: exit code 255" in shown.stderr[-4]
    assert shown.stderr[-3] == "ssh: connect to host b port 22: Connection refused"
    assert shown.stderr[-2].startswith("b was not reached, or was lost. Try by hand: sh -c true")


def test_a_command_that_is_not_there_is_named_and_the_others_end():
    with pytest.raises(ConfigError, match="nonesuch cannot be started"):
        follow([python(WAIT), Command(("nonesuch", "-x"))])


def test_a_command_that_does_not_listen_is_killed(monkeypatch):
    for name in ("PATIENCE_S", "KILL_S"):
        monkeypatch.setattr(f"zcore.comm.launch.follow.{name}", 0.2)
    deaf = "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); threading.Event().wait()"
    assert follow([python(deaf), python("sys.exit(7)")], shutdown_s=0).exitcode == 7


def test_output_that_a_stray_process_holds_open_does_not_keep_the_front():
    program = "import subprocess; child = subprocess.Popen(['sleep', '600']); os.write(1, b'\\x1e0 %d\\n' % child.pid)"
    shown = follow([python(program)])
    os.kill(int(shown.stdout[0].split()[1]), signal.SIGKILL)
    assert shown.exitcode == 0


def test_a_reader_that_leaves_ends_the_run():
    endless = (
        "import os, sys, threading; threading.Thread(target=lambda: [os.write(1, b'line\\n') for _ in iter(int, 1)], "
        "daemon=True).start(); sys.stdin.readline(); os._exit(0)"
    )
    program = (
        "import sys; from zcore.comm.launch.follow import run; from zcore.comm.launch.plan import Command; "
        "from zcore.comm.launch.screen import Screen; "
        f"sys.exit(run([Command((sys.executable, '-c', {endless!r}))], Screen(sys.stdout, sys.stderr)))"
    )
    front = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert front.stdout is not None
    assert front.stdout.readline() == b"[launcher] line\n"
    front.stdout.close()
    _, stderr = front.communicate(timeout=60)
    assert (front.returncode, b"Traceback" in stderr) == (128 + signal.SIGPIPE, False)
