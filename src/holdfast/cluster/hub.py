"""The process of the first machine that all other machines (nodes) speak with: it knows who is there, and passes on.

    gateway ──ipc──▶ hub ──tcp──▶ outpost ──ipc──▶ engine         and back

Where an engine of a node would listen, the hub does. A node has *joined* as long as its connection stands and its
beats come. Otherwise it is lost: nothing of it is passed on, and what is for its engines waits for the next who joins
with these replicas.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, replace

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from holdfast.cluster import curve
from holdfast.cluster.child import Control, run_child
from holdfast.cluster.orders import Line, Order
from holdfast.cluster.owner import difference, identity_of
from holdfast.core import lifecycle, nodes, wire
from holdfast.core.boot import RECONNECT_MS, Boot
from holdfast.core.errors import ConfigError
from holdfast.core.machines import MISSED_BEATS, Network

log = logging.getLogger(__name__)

RESERVED_SECONDS = 30.0
"""That replicas are kept for a node that was assigned them, until it joins."""
FAREWELL_SECONDS = 2.0
"""That nodes may take to say that they have heard of the end."""
_MOST_AT_ONCE = 100
"""Messages taken from one socket before the others are looked at."""


@dataclass(slots=True)
class _Node:
    """One that was assigned replicas. `route`: of its connection; None: it has not joined yet."""

    name: str
    session: str
    replicas: list[int]
    heard: float
    attempt: int = -1
    route: bytes | None = None


class Hub:
    """Of the replicas that are elsewhere."""

    def __init__(self, boot: Boot, network: Network, control: Control) -> None:
        """Raises `ConfigError` when nobody can listen at the address."""
        self._boot, self._network, self._control = boot, network, control
        self._identity = identity_of(boot.config, boot.model)
        context = control.context
        self._guard = curve.admit_nodes(context, network.key)
        self._nodes = context.socket(zmq.ROUTER)
        curve.listen(self._nodes, network.key)
        self._nodes.set_hwm(0)
        self._nodes.setsockopt(zmq.ROUTER_MANDATORY, 1)  # who is not there any more is noticed
        self._monitor = self._nodes.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._nodes.bind(network.hub)
        except zmq.ZMQError as error:
            self.close()
            flags = f"--data-parallel-address {network.address} --data-parallel-rpc-port {network.port}"
            raise ConfigError(f"{flags}: {error.strerror}") from error
        self._gateway = context.socket(zmq.PUSH)
        self._gateway.set_hwm(0)
        self._gateway.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._gateway.connect(boot.endpoints.gateway)
        self._poller = zmq.Poller()
        for socket in (control, self._nodes, self._monitor):
            self._poller.register(socket, zmq.POLLIN)
        self._engines: dict[int, zmq.Socket[bytes]] = {}
        for number in range(len(boot.plan.replicas)):
            if number not in boot.plan.here:
                self._engines[number] = context.socket(zmq.PULL)
                self._engines[number].set_hwm(0)
                self._engines[number].bind(boot.endpoints.engine(number))
        self._by_session: dict[str, _Node] = {}
        self._probe_until = 0.0
        self._looked = time.monotonic()
        self._decode = wire.decoder(nodes.ToHub).decode

    def run(self) -> None:
        """Until told to stop."""
        told = wire.decoder(lifecycle.ToChild).decode
        beat = 0.0
        while True:
            now = time.monotonic()
            soon = 0.01 if now < self._probe_until else min(self._network.heartbeat / 2, lifecycle.BEAT_SECONDS)
            readable = dict(self._poller.poll(int(1000 * soon)))
            if self._control in readable:
                message = told(self._control.recv())
                if isinstance(message, lifecycle.Stop):
                    return self._farewell()
                self._pass_down(message)
            if self._monitor in readable:
                recv_monitor_message(self._monitor)
                self._probe_until = time.monotonic() + 0.5
            if self._nodes in readable:
                self._hear()
            for node in list(self._joined):
                self._pass_on(node, readable)
            self._look()
            if time.monotonic() - beat >= lifecycle.BEAT_SECONDS:
                beat = time.monotonic()
                self._say(lifecycle.Beat())

    def close(self) -> None:
        """What was said last gets out."""
        self._nodes.disable_monitor()
        self._monitor.close()
        self._nodes.close(linger=1000)
        self._guard.stop()

    @property
    def _joined(self) -> list[_Node]:
        return [node for node in self._by_session.values() if node.route is not None]

    # --- from nodes ---

    def _hear(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(_MOST_AT_ONCE):
                route, data = self._nodes.recv_multipart(zmq.NOBLOCK)
                try:
                    message = self._decode(data)
                except msgspec.DecodeError as error:
                    log.warning("a node says what cannot be read: %s", error)
                    self._answer(route, nodes.Refused("it has another version of Holdfast", for_good=True))
                    continue
                self._take(route, message)

    def _take(self, route: bytes, message: nodes.ToHub) -> None:
        match message:
            case nodes.Ask():
                self._answer(route, self._assign(message))
                return
            case nodes.Join():
                self._answer(route, self._join(route, message))
                return
        node = next((each for each in self._joined if each.route == route), None)
        if node is None:
            self._answer(route, nodes.Unknown())
            return
        node.heard = time.monotonic()
        match message:
            case nodes.NodeBeat():
                self._answer(route, nodes.NodeBeat())
            case nodes.FromEngine(data):
                self._gateway.send(data)
            case nodes.FromSupervisor(lost):
                self._say(lifecycle.NodeSays(node.name, lost))
                if not lost.comes_back and lost.replica in node.replicas:
                    node.replicas.remove(lost.replica)
                    self._poller.unregister(self._engines[lost.replica])
            case nodes.Leave(reason, is_planned):
                self._lose(node, reason, "planned" if is_planned else "machine")

    def _assign(self, ask: nodes.Ask) -> nodes.Assigned | nodes.Refused:
        if found := difference(self._identity, ask.identity, self._boot.config.device.device):
            return nodes.Refused(f"its tokens would differ: {found}", for_good=True)
        if ask.count > len(self._engines):
            text = f"it has {ask.count} replicas, the service leaves {len(self._engines)} to other machines"
            return nodes.Refused(text, for_good=True)
        self._leave(ask.session)
        taken = {number for node in self._by_session.values() for number in node.replicas}
        free = sorted(self._engines.keys() - taken)
        if len(free) < ask.count:
            rest = f" but {len(free)}" if free else ""
            return nodes.Refused(f"other machines have all its replicas{rest}", for_good=False)
        node = _Node(ask.node, ask.session, free[: ask.count], time.monotonic())
        self._by_session[ask.session] = node
        log.info("%s is to have %s", node.name, _named(node.replicas))
        config = self._boot.config
        config = replace(config, server=replace(config.server, api_key=()))  # which is for the gateway alone
        boot = msgspec.structs.replace(self._boot, config=config, network=None, stamp=[])
        return nodes.Assigned(self._network.service, msgspec.json.encode(boot), node.replicas)

    def _join(self, route: bytes, join: nodes.Join) -> nodes.Joined | nodes.StartOver:
        if join.service != self._network.service:
            return nodes.StartOver("the service was started anew")
        node = self._by_session.get(join.session)
        if node is not None and node.route == route and node.attempt == join.attempt:
            return nodes.Joined()  # it has said so twice
        self._leave(join.session)
        taken = {number for each in self._by_session.values() for number in each.replicas}
        if taken & set(join.replicas) or not set(join.replicas) <= self._engines.keys() or not join.replicas:
            return nodes.StartOver("others have its replicas by now")
        node = _Node(join.node, join.session, join.replicas, time.monotonic(), join.attempt, route)
        self._by_session[join.session] = node
        log.info("%s has joined with %s", node.name, _named(node.replicas))
        for number in node.replicas:
            self._poller.register(self._engines[number], zmq.POLLIN)
        self._say(lifecycle.NodeJoined(node.name, node.replicas))
        return nodes.Joined()

    # --- to nodes ---

    def _pass_on(self, node: _Node, readable: dict[object, int]) -> None:
        """What the gateway says to its engines."""
        for number in node.replicas:
            if self._engines[number] not in readable:
                continue
            with contextlib.suppress(zmq.Again):
                for _ in range(_MOST_AT_ONCE):
                    if node.route is None:
                        return
                    data = self._engines[number].recv(zmq.NOBLOCK)
                    self._tell(node, nodes.ForEngine(number, data))

    def _pass_down(self, message: lifecycle.ToChild) -> None:
        """What the supervisor wants of nodes."""
        for node in self._joined:
            if isinstance(message, lifecycle.Distrust) or (
                isinstance(message, lifecycle.Replace) and message.replica in node.replicas
            ):
                self._tell(node, message)

    def _tell(self, node: _Node, message: nodes.ToNode) -> None:
        assert node.route is not None
        if not self._answer(node.route, message):
            self._lose(node, "its connection has ended", "machine")

    def _answer(self, route: bytes, message: nodes.ToNode) -> bool:
        """False: nobody is there any more."""
        try:
            self._nodes.send_multipart([route, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _say(self, message: lifecycle.ToSupervisor) -> None:
        with contextlib.suppress(zmq.Again):
            self._control.send(wire.encode(message), zmq.NOBLOCK)

    def _farewell(self) -> None:
        """Until all have heard it: what a node has not read when its connection ends is lost."""
        for node in self._joined:
            self._tell(node, nodes.Farewell())
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._joined and time.monotonic() < deadline:
            if self._nodes.poll(50):
                self._hear()

    # --- who is there ---

    def _look(self) -> None:
        """Who is not heard, or not connected any more; unless we were late ourselves."""
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now - before > self._network.heartbeat:
            for node in self._by_session.values():
                node.heard = now
        most = MISSED_BEATS * self._network.heartbeat
        for node in self._joined:
            if now < self._probe_until:
                self._tell(node, nodes.NodeBeat())
            if node.route is not None and now - node.heard > most:
                self._lose(node, f"it has not been heard for {most:g} s", "machine")
        for node in list(self._by_session.values()):
            if node.route is None and now - node.heard > max(RESERVED_SECONDS, most):
                self._leave(node.session)

    def _leave(self, session: str) -> None:
        """It begins anew, if it was there before, or does not come."""
        node = self._by_session.get(session)
        if node is not None and node.route is not None:
            self._lose(node, "it has lost its connection", "machine")
        self._by_session.pop(session, None)

    def _lose(self, node: _Node, reason: str, kind: lifecycle.LossKind) -> None:
        """Its replicas are free for others. If it comes back before one has them, it has them again."""
        level = logging.INFO if kind == "planned" else logging.ERROR
        log.log(level, "%s is lost, with %s: %s", node.name, _named(node.replicas), reason)
        del self._by_session[node.session]
        node.route = None
        for number in node.replicas:
            self._poller.unregister(self._engines[number])
        self._say(lifecycle.NodeLost(node.name, list(node.replicas), reason, kind, time.time()))


def _named(replicas: list[int]) -> str:
    return f"replica{'s' if len(replicas) > 1 else ''} {', '.join(map(str, replicas))}"


def run(boot: Boot, control: Control, order: Order, _: Line) -> None:
    assert boot.network is not None
    hub = Hub(boot, boot.network, control)
    try:
        control.send(wire.encode(lifecycle.Ready()))
        hub.run()
    finally:
        hub.close()


if __name__ == "__main__":
    run_child(run)
