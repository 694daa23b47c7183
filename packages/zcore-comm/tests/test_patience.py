"""A wait looks ever more rarely, tells its user once, and ends at its deadline."""

from zcore.comm.ranks.patience import Patience


def looks(deadline_s, *, until_s):
    """The seconds at which a wait looks and tells, on a clock that goes on by whole seconds."""
    now = [100.0]
    patience = Patience(deadline_s, clock=lambda: now[0])
    looked, told = [], []
    while now[0] < 100 + until_s:
        now[0] += 1.0
        if patience.looks_now():
            looked.append(patience.waited_s)
        if patience.tells_now():
            told.append(patience.waited_s)
    return looked, told, patience


def test_looks_are_ever_rarer_and_the_user_is_told_once():
    looked, told, patience = looks(100.0, until_s=50)
    assert looked == [1, 2, 4, 8, 16, 24, 32, 40, 48]
    assert told == [30]
    assert patience.pause_s == 6
    assert not patience.is_over


def test_from_the_deadline_on_a_look_is_always_due():
    looked, told, patience = looks(5.0, until_s=7)
    assert looked == [1, 2, 4, 5, 6, 7]
    assert told == []
    assert patience.pause_s == 0
    assert patience.is_over
