"""What ranks leave word of is read by others, and a store that does not answer keeps nobody waiting."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import TCPStore

from zcore.comm.ranks.cards import CallWord, Cards, GaveUp, GroupWord
from zcore.core import compat

HOLD_A_STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


WORD = GroupWord(
    started=3,
    calls=(CallWord(2, 17, 18, "all_reduce grads"),),
    given_up=GaveUp("CollectiveError", "lost", index=2),
)


class Source:
    key = "dp"

    def word(self):
        return WORD

    def look_after(self):
        """There is nothing to look after."""


@pytest.fixture
def holder():
    process = subprocess.Popen([sys.executable, "-c", HOLD_A_STORE], stdin=-1, stdout=-1, text=True)
    yield process
    os.kill(process.pid, signal.SIGCONT)
    process.communicate()


def test_cards_are_read_until_the_store_stops_and_then_nobody_waits_for_long(holder):
    store = TCPStore("127.0.0.1", int(holder.stdout.readline()), is_master=False)
    cards, others = (Cards(compat.another_client_of(store), world_size=2) for _ in range(2))
    source = Source()
    others.add(source)
    others.write()
    assert cards.read([others.life])[others.life].groups == {"dp": WORD}
    assert "test_cards.py" in cards.read([others.life])[others.life].line
    cards.tell("here")
    assert cards.told(["here", "there"]) == {"here"}
    assert cards.answers
    os.kill(holder.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)  # all of its threads have stopped
    began = time.monotonic()
    known = cards.read([others.life])
    assert not cards.answers
    assert known[others.life].groups == {"dp": WORD}
    assert cards.told(["here"]) == set()
    assert time.monotonic() - began < 10  # not for ever
    os.kill(holder.pid, signal.SIGCONT)
    for each in (cards, others):
        each.end()


class Faulty(Source):
    """Its word and its looks fail a few times."""

    key = "faulty"

    def __init__(self):
        self.words, self.looks, self.is_well = 0, 0, threading.Event()

    def word(self):
        self.words += 1
        if self.words <= 2:
            raise RuntimeError("no word")
        return WORD

    def look_after(self):
        self.looks += 1
        if self.looks <= 2:
            raise RuntimeError("no look")
        self.is_well.set()


def test_a_fault_in_the_watch_is_told_once_and_does_not_end_it(caplog):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cards, source = Cards(compat.another_client_of(store), world_size=2), Faulty()
    cards.add(source)
    assert source.is_well.wait(20)
    cards.end()
    told = [record.getMessage().partition(" failed")[0] for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(told) == sorted({*told, "Looking after the calls of faulty"})
    assert cards.answers
    others = Cards(compat.another_client_of(store), world_size=2)
    assert others.read([cards.life])[cards.life].groups == {"faulty": WORD}
    others.end()
