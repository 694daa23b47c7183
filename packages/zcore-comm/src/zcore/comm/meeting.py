"""How the ranks of a new group get to know each other: each shows a card with where it lives and what it can share."""

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zcore.comm.algorithms import read_table
from zcore.comm.board import BOARD_BYTES, is_store_order_kept
from zcore.comm.home import Home, own_home
from zcore.comm.pages import own_pages
from zcore.core import compat
from zcore.core.device import choose_device
from zcore.core.torch_collectives import TorchCollectives

__all__ = ["NUM_BOARDS", "Card", "agree", "meet"]

logger = logging.getLogger(__name__)

NUM_BOARDS = 2  # for the first and the last step of calls on two levels
NAME_BYTES = 64
CARD = struct.Struct(f"<16s{NAME_BYTES}sQQQQQ{NUM_BOARDS}QI")
NOTHING = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Card:
    """What one rank tells the others. `boards` are places in its file, empty where it cannot share memory."""

    home: Home
    file: int
    file_bytes: int
    boards: tuple[int, ...]
    table: int  # digest of the table of algorithms

    def pack(self) -> bytes:
        """As bytes of one length."""
        home, boards = self.home, self.boards or (NOTHING,) * NUM_BOARDS
        name = home.name.encode()[:NAME_BYTES]
        return CARD.pack(
            home.host, name, home.process, home.began, home.global_rank, self.file, self.file_bytes, *boards, self.table
        )

    @classmethod
    def unpack(cls, packed: bytes) -> "Card":
        """The card that was packed."""
        host, name, process, began, global_rank, file, file_bytes, *boards, table = CARD.unpack(packed)
        home = Home(host, name.rstrip(b"\0").decode(errors="replace"), process, began, global_rank)
        return cls(home, file, file_bytes, () if NOTHING in boards else tuple(boards), table)


def meet(group: dist.ProcessGroup, *, name: str) -> list[Card]:
    """The cards of all ranks, by rank in `group`; every rank of it calls this."""
    boards = _make_boards(name) if compat.backend_name(group) == "gloo" else ()
    file, file_bytes = (own_pages().file, own_pages().file_bytes) if boards else (0, 0)
    own = Card(own_home(), file, file_bytes, boards, read_table().digest())
    return [Card.unpack(each) for each in _exchange(group, own.pack())]


def agree(group: dist.ProcessGroup, answer: bool) -> bool:
    """Whether every rank answers yes; every rank of `group` calls this."""
    return all(each == b"\1" for each in _exchange(group, b"\1" if answer else b"\0"))


def _make_boards(name: str) -> tuple[int, ...]:
    if not is_store_order_kept():
        logger.info("%s: shared memory needs a processor that keeps the order of stores, as x86-64 does.", name)
        return ()
    try:
        pages = own_pages()
        regions = [pages.take(BOARD_BYTES) for _ in range(NUM_BOARDS)]
    except (OSError, AttributeError, MemoryError) as error:  # AttributeError: no memfd in this system
        logger.warning("%s: no memory to share between ranks (%s); data go through the loopback device.", name, error)
        return ()
    for region in regions:
        pages.tensor(region, BOARD_BYTES, torch.uint8).zero_()
    return tuple(region.offset for region in regions)


def _exchange(group: dist.ProcessGroup, message: bytes) -> Sequence[bytes]:
    first = TorchCollectives(group, name="meeting")
    device = torch.device("cpu") if compat.backend_name(group) == "gloo" else choose_device()
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
    all_of_them = torch.empty(first.size * len(message), dtype=torch.uint8, device=device)
    first.all_gather(all_of_them, own, label="cards").wait()
    return [bytes(each.tolist()) for each in all_of_them.view(first.size, -1)]
