"""The one failure made of many records, without processes."""

from zcore.core.testing import RankFailed, RankFailure


def failure(rank, type_name="ValueError", message="bad", after_s=1.0, **rest):
    return RankFailure(rank, type_name, message, rest.pop("traceback", ""), None, after_s, **rest)


def report(*failures, returned=()):
    return RankFailed(failures, {}, last_collectives=dict(returned))


def test_first_is_by_time():
    assert report(failure(0, after_s=2.0), failure(1, after_s=1.0)).first.rank == 1


def test_a_lost_connection_is_never_first():
    lost = failure(0, "RuntimeError", "Connection closed by peer [127.0.0.1]:4711", after_s=1.0)
    died = failure(1, "Died", "killed by SIGKILL", after_s=1.001)
    assert report(lost, died).first is died
    assert report(lost).first is lost


def test_a_failure_goes_before_a_hang_and_the_hang_keeps_its_stacks():
    hung = failure(0, "Hung", "still running", after_s=3.0, traceback="in all_reduce", last_collective="all_reduce #7")
    text = str(report(hung, failure(1), returned={2: "all_gather #6"}))
    assert text.splitlines() == [
        "rank 1 of 3 failed first: ValueError: bad (1.00 s after the start)",
        "rank 0: Hung: still running (3.00 s after the start)",
        "  last collective: all_reduce #7",
        "  in all_reduce",
        "rank 2: returned after all_gather #6",
    ]


def test_a_message_of_many_lines_is_one_line_where_it_is_not_first():
    text = str(report(failure(0), failure(1, message="a\n" * 500, after_s=2.0)))
    assert len(text.splitlines()) == 2
    assert len(text.splitlines()[1]) < 250
