"""The children of one `holdfast serve`: started, heard, watched, killed. Whatever happens comes through one poll.

A name may be given again, to a new process or to one that had another name: each time is an epoch of its own, and
what was said in an earlier one is not heard.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import zmq

from holdfast.cluster.orders import Order
from holdfast.cluster.process import Child
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Endpoints
from holdfast.core.errors import ConfigError

log = logging.getLogger(__name__)

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
STOP_SECONDS = 5.0
"""How long a child may take to leave after Stop before it is killed."""
LAST_WORD_SECONDS = 0.5
"""That a child's last word may take once it has ended with status 1."""


class Said(NamedTuple):
    """A child said something."""

    child: str
    message: lifecycle.Progress | lifecycle.Ready | lifecycle.Failed | lifecycle.Beat


class Ended(NamedTuple):
    """A child ended that nobody here has ended."""

    child: str


class Signalled(NamedTuple):
    """The user wants us to stop."""

    number: int


class TimedOut(NamedTuple):
    """The deadline passed."""


Event = Said | Ended | Signalled | TimedOut


class Children:
    """`with Children(...) as children:` no child outlives the with block, and this process's signals are events.
    Raises `ConfigError` when no sockets can be made in the run's folder."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.by_name: dict[str, Child] = {}
        self._endpoints = endpoints
        self._happened: deque[Event] = deque()
        self._watched: dict[int, Child] = {}
        """By pidfd."""
        self._failed: set[str] = set()
        """Identities of those that have said why they cannot go on."""
        self._poller = zmq.Poller()
        self._decode = wire.decoder(lifecycle.ToSupervisor).decode

    def __enter__(self) -> Children:
        longest = self._endpoints.worker("00.00.00", 100_000).removeprefix("ipc://")
        if len(longest.encode()) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(f"TMPDIR {tempfile.gettempdir()}: too long for a socket's path ({longest})")
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        try:
            self._control.bind(self._endpoints.supervisor)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"TMPDIR {tempfile.gettempdir()}: no sockets can be made there: {error}") from error
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno())
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._poller.register(self._control, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._wake_read.close()
        self._wake_write.close()
        self._context.destroy(linger=0)

    # --- lives ---

    def start(self, module: str, order: Order, child: Child | None = None) -> None:
        """Give an order to `child`, which was released, or, without one, to a new process. Who had the name before is
        dead or released. Raises `OSError`."""
        if child is None:
            child = Child.start(module, order.name, self._endpoints.folder)
            self._watched[child.pidfd] = child
            self._poller.register(child.pidfd, zmq.POLLIN)
        self._drop(order.name)
        self.by_name[order.name] = child
        child.order(order)

    def release(self, name: str) -> Child:
        """It lives, and is to get another order at once: nothing is heard of this one any more."""
        self._drop(name)
        return self.by_name.pop(name)

    def kill(self, names: Iterable[str]) -> None:
        """SIGKILL those that live; nothing is heard of it, nor of them."""
        self.end([self.by_name[name] for name in names])

    def end(self, children: Iterable[Child]) -> None:
        """The same, of those that may have been released."""
        children = list(children)
        for child in children:
            self._drop(child.name)
        killed = [child for child in children if self._forget(child)]
        for child in killed:
            child.process.kill()
        for child in killed:
            child.process.wait()
            child.close()

    def _drop(self, name: str) -> None:
        """What has happened to it and nobody was told."""
        self._happened = deque(
            event for event in self._happened if not (isinstance(event, Said | Ended) and event.child == name)
        )

    def _forget(self, child: Child) -> bool:
        """Stop watching; whether it was watched."""
        if self._watched.get(child.pidfd) is not child:  # its number may be another's by now
            return False
        del self._watched[child.pidfd]
        self._poller.unregister(child.pidfd)
        return True

    def _stop(self) -> None:
        """Stop, wait, kill: in the end every child is reaped. One that is not ready yet may not hear us."""
        self.kill([name for name, child in self.by_name.items() if not child.ready])
        living = list(self._watched.values())
        for child in living:
            self.send(child.name, lifecycle.Stop())
        deadline = time.monotonic() + STOP_SECONDS
        for child in living:
            if not child.wait(deadline):
                log.warning("%s did not stop within %g s: killed", child.name, STOP_SECONDS)
        self.kill([child.name for child in living])

    def is_alive(self, name: str) -> bool:
        return self.by_name[name].process.poll() is None

    # --- what happens ---

    def events(self, deadline: float | None = None) -> Iterator[Event]:
        """Everything that happens, for ever; `TimedOut` from the deadline on (`time.monotonic()`)."""
        while True:
            yield self.next_event(deadline)

    def next_event(self, deadline: float | None = None) -> Event:
        """The next thing that happens, in order of arrival."""
        while not self._happened:
            left = None if deadline is None else max(int((deadline - time.monotonic()) * 1000), 0)
            readable = dict(self._poller.poll(left))
            if not readable:
                return TimedOut()
            if self._control in readable:  # before the ends: a child's last word explains its end
                self._hear()
            if self._wake_read.fileno() in readable:
                numbers = self._wake_read.recv(64)
                self._happened += [Signalled(number) for number in numbers if number in STOP_SIGNALS]
            for child in [self._watched[pidfd] for pidfd in readable.keys() & self._watched.keys()]:
                self._forget(child)
                child.process.wait()
                self._hear_last_word(child)
                child.close()
                self._happened.append(Ended(child.name))
        return self._happened.popleft()

    def _hear(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                identity, data = self._control.recv_multipart(zmq.NOBLOCK)
                name, _, epoch = identity.decode().rpartition("@")
                if name in self.by_name and (child := self.by_name[name]).epoch == int(epoch):
                    child.answers = child.was_heard = True
                    message = self._decode(data)
                    self._happened.append(Said(name, message))
                    if isinstance(message, lifecycle.Failed):
                        self._failed.add(child.identity)

    def _hear_last_word(self, child: Child) -> None:
        """Who fails says why; where processors are busy that may still be on its way when its end is known."""
        self._hear()
        deadline = time.monotonic() + LAST_WORD_SECONDS
        while child.process.returncode == 1 and child.identity not in self._failed and time.monotonic() < deadline:
            self._control.poll(10)
            self._hear()

    def send(self, name: str, message: lifecycle.ToChild) -> None:
        if name not in self.by_name:
            return
        with contextlib.suppress(zmq.ZMQError):  # it never connected, or is gone: then its pidfd tells
            self._control.send_multipart([self.by_name[name].identity.encode(), wire.encode(message)])
