"""A call that differs is told with the line in which the other rank made it, which its next card brings."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from zcore.comm.ranks.cards import Cards
from zcore.comm.ranks.home import own_home
from zcore.comm.ranks.journal import LOOK_S, Journal
from zcore.core import compat
from zcore.core.errors import MismatchError

NO_BEAT = 10_000  # ranks of a run so large that its cards' own beat comes after 20 s, not in a test


class Two:
    """The cards of two ranks, both of this process, and the journal of the first."""

    def __init__(self, world_size):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.mine, self.theirs = (Cards(compat.another_client_of(self.store), world_size=world_size) for _ in range(2))
        homes = [own_home(cards.life) for cards in (self.mine, self.theirs)]
        self.journal = Journal(self.mine, "dp", homes, rank=0, deadline_s=60, family=("dp", "dp"), connected="dp")
        self.theirs.write()

    def count(self):
        """Of the first rank's cards, as the other one reads them."""
        told = self.theirs.read([self.mine.life]).get(self.mine.life)
        return -1 if told is None else told.count

    def end(self):
        for cards in (self.mine, self.theirs):
            cards.end()


@pytest.fixture
def meet(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)  # there is no process group
    made = []
    yield lambda world_size=NO_BEAT: made.append(Two(world_size)) or made[-1]
    for each in made:
        each.end()


def tell_them_apart(two):
    """The error, with the line told of the other rank; cards written meanwhile name this function."""
    error = two.journal.mismatch(0, mine="all_reduce a", theirs="all_reduce b", rank=1)
    assert isinstance(error, MismatchError)
    return str(error)


def test_the_line_of_a_rank_is_that_of_its_next_card_which_is_awaited_after_leaving_word(meet):
    two, seen = meet(), []
    before = two.count()

    def answer():
        """What the other rank does: it leaves word itself once it has read this one's."""
        end_s = time.monotonic() + 10
        while two.count() == before and time.monotonic() < end_s:
            time.sleep(LOOK_S)
        seen.append(two.count())
        two.theirs.write()

    other = threading.Thread(target=answer)
    other.start()
    message = tell_them_apart(two)
    other.join()
    assert seen == [before + 1]
    assert "last seen at test_journal.py" in message
    assert "in tell_them_apart" in message.partition("last seen")[2]


def test_a_rank_that_has_ended_is_not_waited_for(meet):
    two = meet()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    two.journal.homes = [two.journal.homes[0], replace(two.journal.homes[1], process=process.pid)]
    began_s = time.monotonic()
    message = tell_them_apart(two)
    assert time.monotonic() - began_s < two.mine.interval_s
    assert "in tell_them_apart" not in message.partition("last seen")[2]


def test_a_rank_that_writes_no_card_is_waited_for_two_beats(meet):
    two = meet(2)
    two.mine.interval_s = 0.1
    two.theirs.end()
    began_s = time.monotonic()
    message = tell_them_apart(two)
    assert 2 * two.mine.interval_s <= time.monotonic() - began_s < 10
    assert "in tell_them_apart" not in message.partition("last seen")[2]


def test_cards_that_were_read_before_the_store_fell_silent_are_no_measure_of_silence(meet):
    two = meet()
    two.journal.homes = [two.journal.homes[0], replace(two.journal.homes[1], host=b"elsewhere")]
    assert two.journal.counts_elsewhere() == {1: two.mine.read([two.theirs.life])[two.theirs.life].count}
    two.mine.answers = False
    two.mine.end()  # the thread that asks the store
    assert two.journal.counts_elsewhere() == {}
    assert two.journal.silent_since({1: 0}) == frozenset()
