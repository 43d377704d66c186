"""What a process is there for, and the line on which it is told: a process outlives its orders.

    supervisor ──Order, with descriptors──▶ child        the line's end: the supervisor is gone, and the child ends

A new process has its first order as soon as it can read. A later one means: leave what you do, be this. The latest
counts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from holdfast.core.boot import Boot

_MOST_BYTES, _MOST_DESCRIPTORS = 4096, 8

What = Literal["boot", "replica", "weights", "store", "listener"]
"""A descriptor's: of the file that says what is served; of memory that a process shares with the rest of its
replica, for the weights with the same rank of other replicas, for the store with all workers; of the socket that the
service listens on."""


@dataclass(frozen=True, slots=True)
class Order:
    """Be `name`. `epoch`: how often its member was started before. Owns its descriptors."""

    name: str
    epoch: int
    descriptors: Mapping[What, int]

    def boot(self) -> Boot:
        file = self.descriptors["boot"]
        return msgspec.json.decode(os.pread(file, os.fstat(file).st_size, 0), type=Boot)

    def close(self) -> None:
        for number in self.descriptors.values():
            os.close(number)


def send(line: socket.socket, order: Order) -> None:
    """To whoever holds the other end; it has descriptors of its own then. Raises `OSError` when that cannot be."""
    text = msgspec.msgpack.encode((order.name, order.epoch, list(order.descriptors)))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone: its pidfd tells
        socket.send_fds(line, [text], list(order.descriptors.values()), socket.MSG_DONTWAIT)


class Relieved(Exception):
    """There is another order."""


class Line:
    """The child's end. A thread listens, so that the main one may be in the middle of anything; it calls `gone` when
    nobody is left to give orders."""

    def __init__(self, line: socket.socket, gone: Callable[[], None]) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        """Readable while there is another order."""
        self._changed = threading.Condition()
        self._next: Order | None = None
        self._let_go: Callable[[], None] = lambda: None
        threading.Thread(target=self._listen, args=(line, gone), daemon=True).start()

    def take(self) -> Order:
        """The latest order; waits for one."""
        with self._changed:
            while (order := self._next) is None:
                self._changed.wait()
            self._next = None
            os.eventfd_read(self.fd)
            return order

    def check(self) -> None:
        """Raises `Relieved`."""
        if self._next is not None:
            raise Relieved

    def when_relieved(self, let_go: Callable[[], None]) -> None:
        """Call this then, from the thread that listens: so that what the main one waits for ends."""
        with self._changed:
            self._let_go = let_go
            if self._next is not None:
                let_go()

    def _listen(self, line: socket.socket, gone: Callable[[], None]) -> None:
        decode = msgspec.msgpack.Decoder(tuple[str, int, list[What]]).decode
        while True:
            try:
                data, numbers, _, _ = socket.recv_fds(line, _MOST_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError:
                data = b""
            if not data:
                return gone()
            name, epoch, whats = decode(data)
            with self._changed:
                before, self._next = self._next, Order(name, epoch, dict(zip(whats, numbers, strict=True)))
                if before is None:
                    os.eventfd_write(self.fd, 1)  # `check` knows of it by now
                else:
                    before.close()
                self._let_go()
                self._changed.notify()
