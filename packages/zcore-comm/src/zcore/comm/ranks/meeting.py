"""How the ranks of a new group get to know each other: each shows a card with where it lives and what it can share."""

import logging
import platform
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zcore.comm.memory.board import BOARD_BYTES, is_store_order_kept
from zcore.comm.memory.pages import own_pages
from zcore.comm.pairs.algorithms import Table, read_table
from zcore.comm.progress import advance_all
from zcore.comm.ranks.cards import cards_of_run
from zcore.comm.ranks.home import Home, own_home
from zcore.comm.ranks.patience import Patience
from zcore.core import compat
from zcore.core.device import choose_device
from zcore.core.errors import CollectiveError, ConfigError
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["NUM_BOARDS", "Introduction", "agree", "make_boards", "meet"]

logger = logging.getLogger(__name__)

NUM_BOARDS = 2  # for the first and the last step of calls on two levels
NAME_BYTES = 64
PASS = struct.Struct(f"<16s{NAME_BYTES}sQQQQQQ{NUM_BOARDS}QIQ")
NOTHING = (1 << 64) - 1
NAP_S = 1e-3
HEAD_START_S = 0.1  # before the backend's own words, which name nobody
NO_TABLE = 0


@dataclass(frozen=True, slots=True)
class Introduction:
    """What one rank shows the others. `boards` are places in its file, empty where it cannot share memory."""

    home: Home
    file: int
    file_bytes: int
    boards: tuple[int, ...]
    table: int  # digest of the table of algorithms; NO_TABLE if it cannot be read
    number: int  # of groups that this process has met over this process group

    def pack(self) -> bytes:
        """As bytes of one length."""
        home, boards = self.home, self.boards or (NOTHING,) * NUM_BOARDS
        name = home.name.encode()[:NAME_BYTES]
        place = home.host, name, home.process, home.began, home.global_rank, home.life
        return PASS.pack(*place, self.file, self.file_bytes, *boards, self.table, self.number)

    @classmethod
    def unpack(cls, packed: bytes) -> "Introduction":
        """What was packed."""
        host, name, process, began, global_rank, life, file, file_bytes, *boards, table, number = PASS.unpack(packed)
        home = Home(host, name.rstrip(b"\0").decode(errors="replace"), process, began, global_rank, life)
        return cls(home, file, file_bytes, () if NOTHING in boards else tuple(boards), table, number)


_numbers: "WeakKeyDictionary[dist.ProcessGroup, int]" = WeakKeyDictionary()


def meet(group: dist.ProcessGroup, *, name: str) -> list[Introduction]:
    """What all ranks show, by rank in `group`; every rank of it calls this.

    Raises ConfigError on every rank if one of them has a table of algorithms that cannot be read; CollectiveError if a
    rank does not come before the group's timeout.
    """
    boards, refusal = make_boards() if compat.backend_name(group) == "gloo" else ((), None)
    if refusal is not None:
        logger.warning("%s: ranks share no memory: %s. Data go through the loopback device.", name, refusal)
    file, file_bytes = (own_pages().file, own_pages().file_bytes) if boards else (0, 0)
    table, problem = _own_table()
    number = _numbers.get(group, 0)
    home = own_home(cards_of_run().life)
    own = Introduction(home, file, file_bytes, boards, table.digest() if table else NO_TABLE, number)
    shown = [Introduction.unpack(each) for each in _exchange(group, own.pack(), name=name)]
    _numbers[group] = max(each.number for each in shown) + 1
    broken = [each.home.global_rank for each in shown if each.table == NO_TABLE]
    if broken:
        raise ConfigError(problem or f"Rank {broken[0]} cannot read its table of algorithms; see its output.")
    return shown


def agree(group: dist.ProcessGroup, answer: bool, *, name: str) -> bool:
    """Whether every rank answers yes; every rank of `group` calls this."""
    return all(each == b"\1" for each in _exchange(group, b"\1" if answer else b"\0", name=name))


def _own_table() -> tuple[Table | None, str]:
    try:
        return read_table(), ""
    except ConfigError as error:  # told once the others know: they would wait for this rank
        return None, str(error)


def make_boards() -> tuple[tuple[int, ...], str | None]:
    """Places of boards in this process's pages; or none, and why this process cannot share memory."""
    if not is_store_order_kept():
        return (), f"{platform.machine()} does not keep the order of stores, as x86-64 does"
    try:
        pages = own_pages()
        regions = [pages.take(BOARD_BYTES) for _ in range(NUM_BOARDS)]
    except (OSError, AttributeError, MemoryError) as error:  # AttributeError: no memfd in this system
        return (), f"{type(error).__name__}: {error}"
    for region in regions:
        pages.tensor(region, BOARD_BYTES, torch.uint8).zero_()
    return tuple(region.offset for region in regions), None


def _exchange(group: dist.ProcessGroup, message: bytes, *, name: str) -> Sequence[bytes]:
    first = TorchCollectives(group, name=name)
    device = torch.device("cpu") if compat.backend_name(group) == "gloo" else choose_device()
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
    all_of_them = torch.empty(first.size * len(message), dtype=torch.uint8, device=device)
    label = f"the first meeting of {name}"
    pending = first.all_gather(all_of_them, own, label=label)
    _wait_for_all(
        group, pending.is_completed, f"{compat.name_of(group)} {name} {_numbers.get(group, 0)} {len(message)}"
    )
    pending.wait()
    return [bytes(each.tolist()) for each in all_of_them.view(first.size, -1)]


def _wait_for_all(group: dist.ProcessGroup, is_done: Callable[[], bool], occasion: str) -> None:
    """Return when a meeting is done or about to fail, having told who keeps the others waiting."""
    cards, deadline_s = cards_of_run(), compat.timeout_of(group).total_seconds()
    patience = Patience(deadline_s - HEAD_START_S)
    ranks = dist.get_process_group_ranks(group)
    cards.tell(f"{occasion} {dist.get_rank()}")
    while not is_done():
        time.sleep(NAP_S)
        advance_all()
        is_over = patience.is_over
        if is_over or patience.tells_now():
            here = cards.told(f"{occasion} {rank}" for rank in ranks)
            missing = ", ".join(str(rank) for rank in ranks if f"{occasion} {rank}" not in here) or "none"
            words = (
                f"The first use of a group waits for all its ranks since {patience.waited_s:.3g} s; missing: rank "
                f"{missing}. Every rank of a group comes to its first use (of zcore.comm, zero.shard or "
                "zero.initialize), in the same order: use each once, in one order on all ranks, where it is made."
            )
            if is_over:
                raise CollectiveError(words)
            logger.warning("%s", words)
