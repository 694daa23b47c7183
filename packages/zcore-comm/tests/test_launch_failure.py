"""Of all that failed, the one the others follow from is told, with its traceback last."""

import itertools
import signal

import pytest

from zcore.comm.launch.failure import Failure, choose_first, collapse_frames, describe_exit, draw, find_traceback

RAISED = ("loading", "Traceback (most recent call last):", '  File "t.py", line 3, in <module>', "ValueError: empty")
LOST = ("Traceback (most recent call last):", "  ...", "RuntimeError: [gloo] Connection closed by peer [10.0.0.1]:3")

raised = Failure(1, "a", 1, RAISED, seen_s=2.0)
raised_later = Failure(4, "b", 1, RAISED, seen_s=2.5)
lost = Failure(0, "a", 1, LOST, seen_s=1.0)
killed = Failure(3, "b", -9, ("loading",), seen_s=3.0)
ended = Failure(2, "a", -15, (), seen_s=0.5)
launcher = Failure(None, "a", 1, ("No module named zcore",), seen_s=0.1)


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([raised, raised_later, lost, ended], raised),
        ([killed, lost, ended], killed),
        ([lost, ended], ended),  # by whoever else sent SIGTERM: ranks that a launcher ends are not told of
        ([lost, ended, killed], killed),
        ([launcher, raised], raised),
        ([launcher, lost], lost),
        ([launcher, ended], ended),
    ],
)
def test_the_first_is_by_time_among_those_that_do_not_follow_from_another(failures, first):
    for order in itertools.permutations(failures):
        assert choose_first(order) is first


def test_a_traceback_is_told_with_those_it_came_from():
    chain = ["During handling of the above exception, another exception occurred:", ""]
    lines = [
        "old",
        RAISED[1],
        "  ...",
        "KeyError: 1",
        "unrelated",
        *RAISED[1:],
        "",
        *chain,
        RAISED[1],
        "  x",
        "TypeError: 2",
    ]
    assert find_traceback(lines) == lines[5:]


def test_what_torch_and_a_progress_bar_put_before_a_traceback_is_taken_off():
    lines = ["[rank1]: noise", f"[rank1]: 80%{RAISED[1]}", "[rank1]:   File ...", "[rank1]: ValueError: empty"]
    assert find_traceback(lines) == [RAISED[1], "  File ...", "ValueError: empty"]


def test_without_a_traceback_the_last_lines_are_told():
    assert find_traceback([str(line) for line in range(30)]) == [str(line) for line in range(10, 30)]


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (3, "exit code 3"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-signal.SIGKILL, "SIGKILL"),
        (-63, "signal 63"),
    ],
)
def test_exit_codes_are_told_in_words(exitcode, words):
    assert words in describe_exit(exitcode)


def test_of_a_rank_that_was_killed_the_last_lines_are_told_not_an_error_it_had_handled():
    assert Failure(1, "a", -9, (*RAISED, "step 7"), seen_s=0.0).last_words == [*RAISED, "step 7"]
    assert raised.last_words == list(RAISED[1:])


def test_the_block_names_rank_and_host_and_ends_with_the_error():
    lines = draw(raised).splitlines()
    assert lines[0].startswith("--- rank 1 on a failed first: exit code 1 ---")
    assert lines[-2] == "ValueError: empty"
    assert set(lines[-1]) == {"-"}
    assert "launcher on a failed: exit code 1" in draw(launcher)
    assert "It wrote nothing to stderr." in draw(ended)
    assert draw(killed).splitlines()[0].startswith("--- rank 3 on b failed first: killed by SIGKILL ---")
    assert "\nThe kernel kills so when memory runs out; dmesg then tells of it.\n" in draw(killed)


def frame(path, *source):
    return [f'  File "{path}", line 5, in f', *source]


def test_zcores_own_frames_are_one_line_and_those_of_the_program_stay():
    own = frame("/env/site-packages/zcore/comm/calls/flat.py", "    work.wait()", "    ^^^^^^^^^^^")
    mine = frame("/home/me/zcore/train.py", "    step()")
    repeated = [*own, "  [Previous line repeated 3 more times]"]
    lines = [RAISED[1], *mine, *own, *repeated, *mine, *own, "CollectiveError: late"]
    assert collapse_frames(lines) == [
        RAISED[1],
        *mine,
        "  ... 2 frames of zcore",
        *mine,
        "  ... 1 frame of zcore",
        "CollectiveError: late",
    ]
    assert collapse_frames(own) == ["  ... 1 frame of zcore"]
    assert draw(Failure(0, "a", 1, tuple(lines), seen_s=0.0)).count("flat.py") == 0


def test_ranks_that_had_left_are_told_after_the_error():
    assert draw(raised, ended_before=[0]).splitlines()[-3:-1] == [
        "ValueError: empty",
        "Rank 0 had ended by then, with exit code 0.",
    ]
    assert "Ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more had ended by then" in draw(raised, ended_before=range(10))
