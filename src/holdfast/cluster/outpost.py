"""The process of a node that stands where the gateway would: passes on what its engines say, and what they are told.

    hub ──tcp──▶ outpost ──ipc──▶ engine         and back

It joins, again whenever it has not heard the hub or its connection has ended. What an engine says is passed on once
it has been greeted since: by then the gateway knows that something was lost, and the engine begins anew.
"""

from __future__ import annotations

import contextlib
import logging
import time

import setproctitle
import zmq
from zmq.utils.monitor import recv_monitor_message

from holdfast.cluster import curve
from holdfast.cluster.child import Control, run_child
from holdfast.cluster.orders import Line, Order
from holdfast.core import lifecycle, nodes, wire
from holdfast.core.boot import RECONNECT_MS, Boot
from holdfast.core.logs import setup_logging
from holdfast.core.machines import MISSED_BEATS, Network

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 100
"""Messages taken from one socket before the others are looked at."""


class Outpost:
    """Of the replicas that this node was assigned. `attempt`: no earlier outpost of the node has had one as high."""

    def __init__(self, boot: Boot, network: Network, control: Control, attempt: int) -> None:
        self._boot, self._network, self._control, self._attempt = boot, network, control, attempt
        self._hub = control.context.socket(zmq.DEALER)
        curve.reach(self._hub, network.key)
        self._hub.set_hwm(0)
        self._hub.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued while there is no connection
        self._hub.setsockopt(zmq.RECONNECT_IVL, 100)
        self._monitor = self._hub.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._hub.connect(network.hub)
        self._incoming = control.context.socket(zmq.PULL)
        self._incoming.set_hwm(0)
        self._incoming.bind(boot.endpoints.gateway)
        self._engines = {number: self._reach(number) for number in boot.plan.here}
        """Of replicas that are not lost for good."""
        self._ungreeted: set[int] = set()
        """Of them, since it has joined: what they say may follow upon something that was lost."""
        self._is_joined = self._is_over = False
        self._heard = self._looked = time.monotonic()
        self._decode = wire.decoder(nodes.ToNode).decode
        self._decode_request = wire.decoder(wire.ToEngine).decode
        self._decode_output = wire.decoder(wire.ToGateway).decode

    def run(self) -> None:
        """Until told to stop."""
        told = wire.decoder(lifecycle.ToChild).decode
        poller = zmq.Poller()
        for socket in (self._control, self._hub, self._monitor, self._incoming):
            poller.register(socket, zmq.POLLIN)
        beat = 0.0
        while True:
            readable = dict(poller.poll(int(1000 * min(self._network.heartbeat / 2, lifecycle.BEAT_SECONDS))))
            if self._control in readable:
                message = told(self._control.recv())
                if isinstance(message, lifecycle.Stop | lifecycle.Drain):
                    return self._leave()
                self._pass_up(message)
            if self._monitor in readable:
                self._notice(recv_monitor_message(self._monitor)["event"])
            if self._hub in readable:
                self._hear()
            if self._incoming in readable:
                self._pass_on()
            self._look()
            if time.monotonic() - beat >= lifecycle.BEAT_SECONDS:
                beat = time.monotonic()
                self._say(lifecycle.Beat())

    def close(self) -> None:
        """What was said last gets out."""
        self._hub.disable_monitor()
        self._monitor.close()
        self._hub.close(linger=1000)

    # --- from this machine ---

    def _pass_up(self, message: lifecycle.ToChild) -> None:
        """What the supervisor tells the gateway. What is told while nobody hears it is made up for by greetings."""
        if not isinstance(message, lifecycle.ReplicaLost):
            return
        if message.replica in self._engines:
            self._engines.pop(message.replica).close(linger=0)  # with what the lost engine had not read yet
            if message.comes_back:
                self._engines[message.replica] = self._reach(message.replica)
        if self._is_joined:
            self._tell(nodes.FromSupervisor(message))

    def _pass_on(self) -> None:
        """What engines say."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_MOST_AT_ONCE):
                data = self._incoming.recv(zmq.NOBLOCK)
                if self._is_joined and not (self._ungreeted and self._decode_output(data).replica in self._ungreeted):
                    self._tell(nodes.FromEngine(data))

    def _leave(self) -> None:
        if self._is_joined:
            self._tell(nodes.Leave("it was stopped", is_planned=True))

    def _reach(self, number: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._control.context.socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.connect(self._boot.endpoints.engine(number))
        return socket

    def _say(self, message: lifecycle.ToSupervisor) -> None:
        with contextlib.suppress(zmq.Again):
            self._control.send(wire.encode(message), zmq.NOBLOCK)

    # --- the hub ---

    def _hear(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_MOST_AT_ONCE):
                message = self._decode(self._hub.recv(zmq.NOBLOCK))
                self._heard = time.monotonic()
                self._take(message)

    def _take(self, message: nodes.ToNode) -> None:
        match message:
            case nodes.ForEngine(number, data):
                if self._is_joined and number in self._engines:
                    if number in self._ungreeted and isinstance(self._decode_request(data), wire.Hello):
                        self._ungreeted.remove(number)
                    self._engines[number].send(data)
            case nodes.Joined():
                if not self._is_joined:
                    log.info("joined the service at %s", self._network.hub)
                    self._ungreeted = set(self._engines)
                self._is_joined = True
            case nodes.Unknown():
                if self._is_joined:
                    self._lose("it takes us for lost")
                self._join()
            case lifecycle.Replace() | lifecycle.Distrust():
                self._say(message)
            case nodes.StartOver(reason):
                self._end(reason, again=True)
            case nodes.Refused(reason):
                self._end(reason, again=True)
            case nodes.Farewell():
                self._tell(nodes.Leave("the service was stopped", is_planned=True))
                self._end("the service was stopped", again=False)

    def _notice(self, event: int) -> None:
        """Of the connection."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._join()
        elif self._is_joined:
            self._lose("the connection has ended")

    def _look(self) -> None:
        """Give a sign of life, and see whether the hub does; unless we were late ourselves."""
        now, before = time.monotonic(), self._looked
        interval = self._network.heartbeat
        if now - before < interval / 2:
            return
        self._looked = now
        if now - before > MISSED_BEATS * interval:
            self._heard = now
        if self._is_joined and now - self._heard > MISSED_BEATS * interval:
            self._lose(f"it has not been heard for {MISSED_BEATS * interval:g} s")
        if self._is_joined:
            self._tell(nodes.NodeBeat())
        else:
            self._join()

    def _lose(self, reason: str) -> None:
        log.error("the service at %s is lost: %s", self._network.hub, reason)
        self._is_joined = False
        self._attempt += 1

    def _join(self) -> None:
        if not self._is_over and self._engines:
            session, name = self._network.session, self._network.node
            self._tell(nodes.Join(name, session, self._attempt, self._network.service, sorted(self._engines)))

    def _end(self, reason: str, *, again: bool) -> None:
        if not self._is_over:
            self._is_over, self._is_joined = True, False
            self._say(lifecycle.Over(reason, again))

    def _tell(self, message: nodes.ToHub) -> None:
        with contextlib.suppress(zmq.Again):
            self._hub.send(wire.encode(message), zmq.NOBLOCK)


def run(boot: Boot, control: Control, order: Order, _: Line) -> None:
    assert boot.network is not None
    setproctitle.setproctitle("holdfast outpost")
    setup_logging("outpost", boot.config.server.log_level)
    outpost = Outpost(boot, boot.network, control, order.epoch << 32)
    try:
        control.send(wire.encode(lifecycle.Ready()))
        outpost.run()
    finally:
        outpost.close()


if __name__ == "__main__":
    run_child(run)
