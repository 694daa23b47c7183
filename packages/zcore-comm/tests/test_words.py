"""Who is missing is said so that it stays readable with a thousand ranks."""

from zcore.comm.ranks.words import Missing, about_missing

LAST = "its last call was all_reduce a (4 x float32) (call 7); last seen at train.py:9 in step"
OTHER = "it made no call; last seen at train.py:2 in load"


def absent(*ranks, did=LAST):
    return [Missing(rank, f"process {1000 + rank} on h is alive", did) for rank in ranks]


def test_ranks_that_did_the_same_are_told_of_once():
    words = about_missing([*absent(2), *absent(0, did=OTHER), *absent(3)], [1])
    assert words == (
        f"Missing: rank 2 (process 1002 on h is alive), {LAST}, and so did rank 3 (process 1003 on h is alive); "
        f"rank 0 (process 1000 on h is alive), {OTHER}. Arrived: 1, this one."
    )


def test_of_many_the_first_are_told_by_process_and_all_by_number():
    words = about_missing(absent(*range(100, 612), 700, 702, 703), range(100))
    assert words.count("process") == 8
    assert words.count(LAST) == 1
    assert words.endswith(", ranks 108 to 611, 700, 702, 703. Arrived: 0 to 99, this one.")


def test_nobody_missing_and_nobody_there():
    assert about_missing([], []) == "Missing: none. Arrived: this one."
