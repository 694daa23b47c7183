"""What messages between two ranks of one host allow: as many bytes through a TCP connection of their own, and no more.

gloo's messages go through such a connection, too. Each rank sends and receives at once, in its own thread, by as much
as the system takes. No collective: what arrives is thrown away.
"""

import select
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

__all__ = ["Wire"]


class Wire:
    """The connection between ranks 0 and 1 of `group`; both call this."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank = dist.get_rank(group)
        listener = socket.create_server(("127.0.0.1", 0))
        port = torch.tensor([listener.getsockname()[1]])
        dist.broadcast(port, group=group, group_src=0)
        self._socket = listener.accept()[0] if self._rank == 0 else socket.create_connection(("127.0.0.1", int(port)))
        listener.close()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)

    def prepare(self, num_bytes: int, *, is_one_way: bool) -> Callable[[], object]:
        """What carries `num_bytes` in each direction, or from rank 0 only."""
        sent = bytearray(b"\1" * (0 if is_one_way and self._rank else num_bytes))  # not zeros: those have no pages
        received = bytearray(b"\1" * (0 if is_one_way and not self._rank else num_bytes))
        return lambda: self._carry(memoryview(sent), memoryview(received))

    def _carry(self, to_send: memoryview, to_receive: memoryview) -> None:
        while to_send or to_receive:
            can_receive, can_send, _ = select.select(
                [self._socket] if to_receive else [], [self._socket] if to_send else [], []
            )
            if can_send:
                to_send = to_send[self._socket.send(to_send) :]
            if can_receive:
                to_receive = to_receive[self._socket.recv_into(to_receive) :]
