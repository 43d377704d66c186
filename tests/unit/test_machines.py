"""Several machines: who is let in, what is passed on, who is lost; over real sockets, with the other side played."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from holdfast.cluster import curve
from holdfast.cluster.headless import Node, check_own, first_network
from holdfast.cluster.hub import Hub
from holdfast.cluster.nodes import Nodes
from holdfast.cluster.outpost import Outpost
from holdfast.cluster.owner import difference, identity_of
from holdfast.cluster.plans import shared_out
from holdfast.core import lifecycle, nodes, wire
from holdfast.core.boot import Boot, Endpoints
from holdfast.core.config import CacheConfig, DeviceConfig, SchedulerConfig, ServeConfig, ServerConfig
from holdfast.core.errors import ConfigError
from holdfast.core.machines import MachinesConfig, Network
from holdfast.core.request import SamplingParams
from holdfast.models.inspect import fingerprint_of, inspect_model
from holdfast.parallel.cuts import make_plan
from support.service import free_ports
from support.tiny import tiny_model

DEADLINE = 10.0
ABORT = wire.encode(wire.Abort(["x"]))
STATS = wire.EngineStats(0, 0, 10, 0, 0, 0, 0)
BEAT = 0.2
KEY = b"sixteen bytes or more"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_model(tmp_path_factory.mktemp("model")))


def boot_of(model: Path, folder: Path, *, is_first: bool) -> Boot:
    info = inspect_model(str(model))
    config = ServeConfig(device=DeviceConfig(device="cpu"), server=ServerConfig(api_key=("secret",)))
    plan = make_plan(info.spec, data=3)
    devices = ((0,), (), ()) if is_first else ((), (0,), (1,))
    network = Network("127.0.0.1", free_ports(), KEY, is_first, BEAT, "this service", "node", "session")
    return Boot(config, info, Endpoints(str(folder)), msgspec.structs.replace(plan, devices=devices), network=network)


class Around:
    """What is around a hub, or an outpost, that runs in a thread: the supervisor, and the other machine."""

    def __init__(self, boot: Boot) -> None:
        assert boot.network is not None
        self.boot, self.network = boot, boot.network
        self.context = zmq.Context()
        self.context.setsockopt(zmq.LINGER, 0)
        self._sockets: list[zmq.Socket[bytes]] = []
        self.supervisor = self.socket(zmq.ROUTER)
        self.supervisor.bind(boot.endpoints.supervisor)

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """It lives as long as this."""
        self._sockets.append(self.context.socket(kind))
        return self._sockets[-1]

    def run(self, make: Callable[[zmq.Socket[bytes]], Hub | Outpost]) -> None:
        """In a thread, with a context of its own, as in a process."""

        def body() -> None:
            context = zmq.Context()
            context.setsockopt(zmq.LINGER, 0)
            control = context.socket(zmq.DEALER)
            control.setsockopt(zmq.IDENTITY, b"it@0")
            control.connect(self.boot.endpoints.supervisor)
            one = make(control)
            control.send(wire.encode(lifecycle.Ready()))
            try:
                one.run()
            finally:
                one.close()
                context.destroy()

        self.thread = threading.Thread(target=body)
        self.thread.start()
        assert isinstance(self.told(), lifecycle.Ready)

    def told(self, *, but: type[Any] = lifecycle.Beat) -> Any:
        """What the supervisor hears next, without the signs of life."""
        while True:
            assert self.supervisor.poll(1000 * DEADLINE), "nothing is said"
            message = wire.decoder(lifecycle.ToSupervisor).decode(self.supervisor.recv_multipart()[1])
            if not isinstance(message, but):
                return message

    def tell(self, message: lifecycle.ToChild) -> None:
        self.supervisor.send_multipart([b"it@0", wire.encode(message)])

    def end(self) -> None:
        self.tell(lifecycle.Stop())
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        self.context.destroy()


# --- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Around, None, None]:
    monkeypatch.setattr("holdfast.cluster.hub.FAREWELL_SECONDS", 0.05)  # nobody answers
    around = Around(boot_of(model, tmp_path, is_first=True))
    around.run(lambda control: Hub(around.boot, around.network, control))
    yield around
    around.end()


class Played:
    """A node, as the hub hears it."""

    def __init__(self, around: Around, key: bytes = KEY) -> None:
        self.socket = around.socket(zmq.DEALER)
        curve.reach(self.socket, key)
        self.socket.connect(around.network.hub)

    def say(self, message: nodes.ToHub) -> None:
        self.socket.send(wire.encode(message))

    def hear(self) -> nodes.ToNode:
        """The next, without the signs of life."""
        while True:
            assert self.socket.poll(1000 * DEADLINE), "nothing is said"
            message: nodes.ToNode = wire.decoder(nodes.ToNode).decode(self.socket.recv())
            if not isinstance(message, nodes.NodeBeat):
                return message

    def asks(self, around: Around, count: int = 1, session: str = "one", **others: str) -> nodes.ToNode:
        identity = identity_of(around.boot.config, around.boot.model) | others
        self.say(nodes.Ask("host", session, count, identity))
        return self.hear()

    def joins(self, *replicas: int, session: str = "one", attempt: int = 0, service: str = "this service") -> Any:
        self.say(nodes.Join("host", session, attempt, service, list(replicas)))
        return self.hear()


def test_a_node_is_assigned_replicas_and_joins(hub: Around) -> None:
    node = Played(hub)
    assigned = node.asks(hub, count=2)
    assert isinstance(assigned, nodes.Assigned)
    assert assigned.replicas == [1, 2]
    told = msgspec.json.decode(assigned.boot, type=Boot)
    assert told.config.server.api_key == ()  # none of its business
    assert told.network is None
    assert node.joins(1, 2) == nodes.Joined()
    assert hub.told() == lifecycle.NodeJoined("host", [1, 2])
    assert node.joins(1, 2) == nodes.Joined()  # said twice: nothing is lost
    node.say(nodes.FromSupervisor(lifecycle.ReplicaLost(2, "died", comes_back=True)))
    assert hub.told() == lifecycle.NodeSays("host", lifecycle.ReplicaLost(2, "died", comes_back=True))


def test_what_is_said_is_passed_on_between_gateway_and_engines(hub: Around) -> None:
    gateway = hub.socket(zmq.PULL)
    gateway.bind(hub.boot.endpoints.gateway)
    engine = hub.socket(zmq.PUSH)
    engine.connect(hub.boot.endpoints.engine(1))
    engine.send(b"hello")  # before anybody is there
    node = Played(hub)
    assert node.joins(1) == nodes.Joined()
    assert node.hear() == nodes.ForEngine(1, b"hello")
    node.say(nodes.FromEngine(b"ready"))
    assert gateway.poll(1000 * DEADLINE)
    assert gateway.recv() == b"ready"


def test_who_has_not_joined_is_not_heard(hub: Around) -> None:
    gateway = hub.socket(zmq.PULL)
    gateway.bind(hub.boot.endpoints.gateway)
    node = Played(hub)
    node.say(nodes.FromEngine(b"of an earlier life"))
    assert node.hear() == nodes.Unknown()
    node.joins(1)
    node.say(nodes.FromEngine(b"of this one"))
    assert gateway.poll(1000 * DEADLINE)
    assert gateway.recv() == b"of this one"


def test_a_node_that_is_silent_is_lost_and_what_is_for_it_waits(hub: Around) -> None:
    engine = hub.socket(zmq.PUSH)
    engine.connect(hub.boot.endpoints.engine(1))
    node = Played(hub)
    node.joins(1)
    begun = time.monotonic()
    assert isinstance(hub.told(), lifecycle.NodeJoined)
    lost = hub.told()
    assert isinstance(lost, lifecycle.NodeLost)
    assert (lost.node, lost.replicas, lost.kind) == ("host", [1], "machine")
    assert 2 * BEAT < time.monotonic() - begun < DEADLINE
    engine.send(b"for the next")
    node.say(nodes.FromEngine(b"I was only asleep"))
    assert node.hear() == nodes.Unknown()
    assert node.joins(1, attempt=1) == nodes.Joined()
    assert node.hear() == nodes.ForEngine(1, b"for the next")


def test_beats_keep_a_node(hub: Around) -> None:
    node = Played(hub)
    node.joins(1)
    assert isinstance(hub.told(), lifecycle.NodeJoined)
    until = time.monotonic() + 6 * BEAT
    while time.monotonic() < until:
        node.say(nodes.NodeBeat())
        assert not hub.supervisor.poll(1000 * BEAT / 2) or isinstance(
            wire.decoder(lifecycle.ToSupervisor).decode(hub.supervisor.recv_multipart()[1]), lifecycle.Beat
        )


def test_a_connection_that_ends_is_noticed_at_once(model: Path, tmp_path: Path) -> None:
    boot = boot_of(model, tmp_path, is_first=True)
    assert boot.network is not None
    around = Around(msgspec.structs.replace(boot, network=msgspec.structs.replace(boot.network, heartbeat=60.0)))
    around.run(lambda control: Hub(around.boot, around.network, control))
    try:
        node = Played(around)
        node.joins(1)
        assert isinstance(around.told(), lifecycle.NodeJoined)
        node.socket.close(linger=0)
        lost = around.told()  # no beat could have been missed
        assert isinstance(lost, lifecycle.NodeLost)
        assert "connection" in lost.reason
    finally:
        around.end()


def test_a_node_that_has_lost_the_hub_is_lost(hub: Around) -> None:
    """It says so by a higher attempt: what was under way is gone."""
    node = Played(hub)
    node.joins(1)
    assert node.joins(1, attempt=1) == nodes.Joined()
    kinds = [type(hub.told()) for _ in range(3)]
    assert kinds == [lifecycle.NodeJoined, lifecycle.NodeLost, lifecycle.NodeJoined]


def test_the_same_node_over_another_connection_takes_its_place(hub: Around) -> None:
    one, other = Played(hub), Played(hub)
    one.joins(1)
    assert other.joins(1, attempt=5) == nodes.Joined()
    kinds = [type(hub.told()) for _ in range(3)]
    assert kinds == [lifecycle.NodeJoined, lifecycle.NodeLost, lifecycle.NodeJoined]
    one.say(nodes.NodeBeat())
    assert one.hear() == nodes.Unknown()


def test_a_node_that_leaves_says_whether_it_was_asked_to(hub: Around) -> None:
    for number, kind in enumerate(("planned", "machine")):
        node = Played(hub)
        session = str(number)
        assert isinstance(node.asks(hub, session=session), nodes.Assigned)
        node.joins(1, session=session)
        assert isinstance(hub.told(), lifecycle.NodeJoined)
        node.say(nodes.Leave("bye", is_planned=kind == "planned"))
        lost = hub.told()
        assert (lost.reason, lost.kind) == ("bye", kind)


def test_replicas_are_given_once(hub: Around) -> None:
    assert isinstance(Played(hub).asks(hub, count=1, session="a"), nodes.Assigned)
    second = Played(hub).asks(hub, count=2, session="b")
    assert isinstance(second, nodes.Refused)
    assert not second.for_good
    assert isinstance(Played(hub).asks(hub, count=1, session="b"), nodes.Assigned)
    third = Played(hub)
    assert isinstance(third.asks(hub, session="c"), nodes.Refused)
    assert isinstance(third.joins(1, session="c"), nodes.StartOver)
    assert isinstance(third.joins(0, session="c"), nodes.StartOver)  # the first machine's
    assert isinstance(third.joins(session="c"), nodes.StartOver)


@pytest.mark.parametrize("name", ["torch", "checkpoint", "CPU instructions", "Holdfast"])
def test_a_node_with_other_tokens_is_refused_by_name(hub: Around, name: str) -> None:
    refused = Played(hub).asks(hub, **{name: "another"})
    assert isinstance(refused, nodes.Refused)
    assert refused.for_good
    assert f"{name}: another there" in refused.reason


def test_a_node_with_more_than_there_is_to_have_is_refused(hub: Around) -> None:
    refused = Played(hub).asks(hub, count=3)
    assert isinstance(refused, nodes.Refused)
    assert refused.for_good
    assert "3 replicas" in refused.reason


def test_a_node_of_an_earlier_service_starts_over(hub: Around) -> None:
    assert isinstance(Played(hub).joins(1, service="an earlier one"), nodes.StartOver)


def test_what_cannot_be_read_is_refused_and_others_are_heard(hub: Around) -> None:
    node = Played(hub)
    node.socket.send(b"\xff\xffnot a message")
    assert isinstance(node.hear(), nodes.Refused)
    assert Played(hub).joins(1) == nodes.Joined()


def test_another_secret_is_not_let_in(hub: Around) -> None:
    stranger = Played(hub, key=b"another one of 16 bytes")
    stranger.say(nodes.Join("host", "s", 0, "this service", [1]))
    assert Played(hub).joins(2) == nodes.Joined()
    assert not stranger.socket.poll(500)


def test_orders_for_a_replica_reach_its_node(hub: Around) -> None:
    one, other = Played(hub), Played(hub)
    one.joins(1, session="a")
    other.joins(2, session="b")
    hub.tell(lifecycle.Replace(2, "somebody wants it"))
    assert other.hear() == lifecycle.Replace(2, "somebody wants it")
    hub.tell(lifecycle.Distrust())
    assert one.hear() == other.hear() == lifecycle.Distrust()


def test_the_end_is_told(model: Path, tmp_path: Path) -> None:
    around = Around(boot_of(model, tmp_path, is_first=True))
    around.run(lambda control: Hub(around.boot, around.network, control))
    node = Played(around)
    node.joins(1)
    around.tell(lifecycle.Stop())
    assert node.hear() == nodes.Farewell()
    assert around.thread.is_alive()  # it waits until that was heard
    node.say(nodes.Leave("so be it", is_planned=True))
    around.thread.join(1.0)
    assert not around.thread.is_alive()
    around.context.destroy()


def test_an_address_that_is_taken_is_named(hub: Around, model: Path) -> None:
    complaint = pytest.raises(ConfigError, match=f"--data-parallel-rpc-port {hub.network.port}")
    with zmq.Context() as context, context.socket(zmq.DEALER) as control, complaint:
        Hub(hub.boot, hub.network, control)


# --- the outpost -----------------------------------------------------------------------------------


class PlayedHub:
    def __init__(self, around: Around) -> None:
        self.guard = curve.admit_nodes(around.context, KEY)
        self.socket = around.socket(zmq.ROUTER)
        curve.listen(self.socket, KEY)
        self.socket.bind(around.network.hub)
        self.route = b""

    def hear(self, kind: type[Any]) -> Any:
        """The next message of this kind; beats are answered."""
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            if self.socket.poll(100):
                self.route, data = self.socket.recv_multipart()
                message = wire.decoder(nodes.ToHub).decode(data)
                if isinstance(message, nodes.NodeBeat):
                    self.say(message)
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} is said")

    def say(self, message: nodes.ToNode) -> None:
        self.socket.send_multipart([self.route, wire.encode(message)])


@pytest.fixture
def outpost(model: Path, tmp_path: Path) -> Generator[tuple[Around, PlayedHub], None, None]:
    around = Around(boot_of(model, tmp_path, is_first=False))
    hub = PlayedHub(around)
    around.run(lambda control: Outpost(around.boot, around.network, control, attempt=7))
    yield around, hub
    hub.guard.stop()
    around.end()


def test_an_outpost_joins_and_passes_on(outpost: tuple[Around, PlayedHub]) -> None:
    around, hub = outpost
    join = hub.hear(nodes.Join)
    assert join == nodes.Join("node", "session", 7, "this service", [1, 2])
    engine, other = around.socket(zmq.PULL), around.socket(zmq.PUSH)
    engine.bind(around.boot.endpoints.engine(2))
    other.connect(around.boot.endpoints.gateway)
    hub.say(nodes.ForEngine(2, ABORT))
    hub.say(nodes.Joined())
    hub.say(nodes.ForEngine(2, wire.encode(wire.Hello(0))))
    assert engine.poll(1000 * DEADLINE)
    assert engine.recv() == wire.encode(wire.Hello(0))
    hub.hear(nodes.NodeBeat)
    hub.say(nodes.ForEngine(1, wire.encode(wire.Hello(0))))
    hub.say(nodes.ForEngine(2, ABORT))
    assert engine.poll(1000 * DEADLINE)
    assert engine.recv() == ABORT
    other.send(b"a token")  # all are greeted: nobody looks into it
    assert hub.hear(nodes.FromEngine) == nodes.FromEngine(b"a token")


def test_what_an_engine_says_before_it_is_greeted_anew_is_dropped(outpost: tuple[Around, PlayedHub]) -> None:
    """The connection ends for a moment, and the gateway does not know yet: what follows upon what was lost then would
    be a gap."""
    around, hub = outpost
    engine, other = around.socket(zmq.PULL), around.socket(zmq.PUSH)
    engine.bind(around.boot.endpoints.engine(1))
    other.connect(around.boot.endpoints.gateway)
    stale, other_stale, fresh = (
        wire.encode(wire.Outputs(replica, 0, [wire.TokenOutput("x", start, [start])], STATS))
        for replica, start in ((1, 5), (2, 5), (1, 9))
    )
    hub.hear(nodes.Join)
    hub.say(nodes.Joined())
    hub.hear(nodes.NodeBeat)
    other.send(stale)
    other.send(other_stale)
    hub.hear(nodes.NodeBeat)
    hub.hear(nodes.NodeBeat)
    hub.say(nodes.ForEngine(1, wire.encode(wire.Submit("y", [1], SamplingParams(max_tokens=1, seed=1)))))
    hub.say(nodes.ForEngine(1, wire.encode(wire.Hello(0, serial=1))))
    for _ in range(2):
        assert engine.poll(1000 * DEADLINE)
        engine.recv()
    other.send(other_stale)
    other.send(fresh)
    assert hub.hear(nodes.FromEngine) == nodes.FromEngine(fresh)


def test_an_outpost_that_is_unknown_joins_anew(outpost: tuple[Around, PlayedHub]) -> None:
    _, hub = outpost
    hub.hear(nodes.Join)
    hub.say(nodes.Joined())
    hub.hear(nodes.NodeBeat)
    hub.say(nodes.Unknown())
    assert hub.hear(nodes.Join).attempt == 8


def test_an_outpost_that_hears_nothing_joins_anew(outpost: tuple[Around, PlayedHub]) -> None:
    _, hub = outpost
    hub.hear(nodes.Join)
    hub.say(nodes.Joined())
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:  # beats are not answered
        assert hub.socket.poll(1000 * DEADLINE)
        message = wire.decoder(nodes.ToHub).decode(hub.socket.recv_multipart()[1])
        if isinstance(message, nodes.Join):
            break
    assert isinstance(message, nodes.Join)
    assert message.attempt == 8


def test_what_a_lost_engine_had_not_read_goes_with_it(outpost: tuple[Around, PlayedHub]) -> None:
    around, hub = outpost
    hub.hear(nodes.Join)
    hub.say(nodes.Joined())
    hub.hear(nodes.NodeBeat)
    hub.say(nodes.ForEngine(1, ABORT))
    lost = lifecycle.ReplicaLost(1, "died", comes_back=True)
    other = around.socket(zmq.PULL)
    other.bind(around.boot.endpoints.engine(2))
    hub.say(nodes.ForEngine(2, ABORT))
    assert other.poll(1000 * DEADLINE)  # so the word before this one has been taken, too
    around.tell(lost)
    assert hub.hear(nodes.FromSupervisor) == nodes.FromSupervisor(lost)
    hub.say(nodes.ForEngine(1, wire.encode(wire.Hello(3))))
    engine = around.socket(zmq.PULL)
    engine.bind(around.boot.endpoints.engine(1))
    assert engine.poll(1000 * DEADLINE)
    assert engine.recv() == wire.encode(wire.Hello(3))


def test_a_replica_that_is_lost_for_good_is_not_offered_again(outpost: tuple[Around, PlayedHub]) -> None:
    around, hub = outpost
    hub.hear(nodes.Join)
    hub.say(nodes.Joined())
    hub.hear(nodes.NodeBeat)
    around.tell(lifecycle.ReplicaLost(1, "died too often"))
    hub.hear(nodes.FromSupervisor)
    hub.say(nodes.Unknown())
    assert hub.hear(nodes.Join).replicas == [2]


@pytest.mark.parametrize(
    ("word", "again"),
    [(nodes.Farewell(), False), (nodes.StartOver("anew"), True), (nodes.Refused("no", for_good=True), True)],
)
def test_the_supervisor_of_a_node_is_told_of_the_end(
    outpost: tuple[Around, PlayedHub], word: nodes.ToNode, again: bool
) -> None:
    around, hub = outpost
    hub.hear(nodes.Join)
    hub.say(word)
    over = around.told()
    assert isinstance(over, lifecycle.Over)
    assert over.again == again


def test_a_node_that_is_stopped_says_so(model: Path, tmp_path: Path) -> None:
    around = Around(boot_of(model, tmp_path, is_first=False))
    hub = PlayedHub(around)
    around.run(lambda control: Outpost(around.boot, around.network, control, attempt=0))
    hub.hear(nodes.Join)
    hub.say(nodes.Joined())
    hub.hear(nodes.NodeBeat)
    around.tell(lifecycle.Drain(5.0))
    assert hub.hear(nodes.Leave).is_planned
    around.thread.join(DEADLINE)
    assert not around.thread.is_alive()
    hub.guard.stop()
    around.context.destroy()


# --- what the first machine's supervisor makes of it ----------------------------------------------


def test_the_gateway_is_told_of_nodes(model: Path) -> None:
    said: list[lifecycle.ToChild] = []
    plan = msgspec.structs.replace(make_plan(inspect_model(str(model)).spec, data=3), devices=((0,), (), ()))
    book = Nodes(plan, said.append)
    assert (0 in book, 1 in book, 3 in book) == (False, True, False)
    assert book.missing == ["replica 1", "replica 2"]
    book.take(lifecycle.NodeJoined("a", [1]))
    book.take(lifecycle.NodeJoined("b", [2]))
    assert book.num_replicas == 2
    said.clear()
    book.take(lifecycle.NodeLost("a", [1], "silent", "machine", 5.0))
    lost, machines = said
    assert isinstance(lost, lifecycle.ReplicaLost)
    assert (lost.replica, lost.comes_back, lost.epoch) == (1, True, -1)
    assert lost.loss == lifecycle.Loss("node a", "machine", None, ["worker 1.0.0"], [], 5.0)
    assert machines == lifecycle.Machines([lifecycle.Machine("a", [1], "lost"), lifecycle.Machine("b", [2], "ready")])
    said.clear()
    book.retell()
    assert said[0] == lifecycle.ReplicaLost(1, "it is gone", comes_back=True)
    book.take(lifecycle.NodeJoined("c", [1]))
    there = [lifecycle.Machine("b", [2], "ready"), lifecycle.Machine("c", [1], "ready")]
    assert said[-2:] == [lifecycle.Machines(there), lifecycle.NodeJoined("c", [1])]
    said.clear()
    book.hub_lost("hub died", "death")
    assert sorted(each.replica for each in said if isinstance(each, lifecycle.ReplicaLost)) == [1, 2]
    assert book.num_replicas == 0


def test_a_replica_that_a_node_gives_up_may_come_from_another(model: Path) -> None:
    said: list[lifecycle.ToChild] = []
    plan = msgspec.structs.replace(make_plan(inspect_model(str(model)).spec, data=2), devices=((0,), ()))
    book = Nodes(plan, said.append)
    book.take(lifecycle.NodeJoined("a", [1]))
    book.take(lifecycle.NodeSays("a", lifecycle.ReplicaLost(1, "died too often", 3)))
    assert said[-1] == lifecycle.ReplicaLost(1, "died too often", 3, comes_back=True)
    assert book.num_replicas == 0


# --- flags, plans, identities ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "size", "complaint"),
    [
        (dict(headless=True), 1, "--headless: needs --data-parallel-address"),
        (dict(headless=True, data_parallel_address="a"), 1, "--headless: needs --node-key-file"),
        (dict(data_parallel_size_local=1), 2, "--data-parallel-size-local 1: needs --data-parallel-address"),
        (dict(data_parallel_size_local=3), 2, "more than --data-parallel-size 2"),
        (dict(data_parallel_size_local=0), 2, "at least 1"),
        (dict(data_parallel_address="a"), 2, "--data-parallel-address: works with"),
        (dict(node_key_file="a"), 2, "--node-key-file: works with"),
        (dict(data_parallel_rpc_port=65535), 1, "65534"),
        (dict(heartbeat_interval=0.0), 1, "--heartbeat-interval"),
    ],
)
def test_flags_that_do_not_work_together(given: dict[str, Any], size: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        MachinesConfig(**given).check(size)


def test_a_node_takes_only_what_is_its_own() -> None:
    machines = MachinesConfig(headless=True)
    check_own(ServeConfig(machines=machines, cache=CacheConfig(checkpoint_memory_bytes=5)))
    for config, flag in (
        (ServeConfig(scheduler=SchedulerConfig(max_num_seqs=3)), "--max-num-seqs"),
        (ServeConfig(server=ServerConfig(port=9)), "--port"),
        (ServeConfig(machines=MachinesConfig(heartbeat_interval=2.0)), "--heartbeat-interval"),
    ):
        with pytest.raises(ConfigError, match=flag):
            check_own(config)


def test_a_node_has_the_service_but_for_what_is_its_own(model: Path, tmp_path: Path) -> None:
    first = boot_of(model, tmp_path, is_first=True)
    first = msgspec.structs.replace(
        first,
        config=replace(first.config, scheduler=SchedulerConfig(max_num_seqs=7), cache=CacheConfig(block_size=8)),
    )
    own = ServeConfig(
        cache=CacheConfig(checkpoint_memory_bytes=123), machines=MachinesConfig(data_parallel_address="host")
    )
    node = Node(own, inspect_model(str(model)), "me", "mine", KEY)
    boot = node.boot(nodes.Assigned("svc", msgspec.json.encode(first), [1, 2]), Endpoints("/elsewhere"))
    assert (boot.config.scheduler.max_num_seqs, boot.config.cache.block_size) == (7, 8)
    assert boot.config.cache.checkpoint_memory_bytes == 123
    assert boot.plan.devices == ((), (0,), (1,))
    assert (boot.plan.here, boot.is_first) == ([1, 2], False)
    assert boot.network is not None
    assert (boot.network.service, boot.network.heartbeat) == ("svc", 1.0)


def test_replicas_are_shared_out(model: Path) -> None:
    plan = make_plan(inspect_model(str(model)).spec, data=3, tensor=2)
    plan = msgspec.structs.replace(plan, devices=plan.devices_in_order)
    here = shared_out(ServeConfig(machines=MachinesConfig(data_parallel_size_local=1)), plan)
    assert (here.here, here.devices) == ([0], ((0, 1), (), ()))
    assert shared_out(ServeConfig(), plan).here == [0, 1, 2]
    with pytest.raises(ConfigError, match="the plan has 3"):
        shared_out(ServeConfig(machines=MachinesConfig(data_parallel_size_local=4)), plan)
    with pytest.raises(ConfigError, match="--shard-weights"):
        shared_out(
            ServeConfig(machines=MachinesConfig(data_parallel_size_local=1)),
            msgspec.structs.replace(plan, shard_weights=True),
        )


def test_a_checkpoint_is_known_by_what_is_in_it(model: Path, tmp_path: Path) -> None:
    one = inspect_model(str(model))
    [file] = model.glob("*.safetensors")
    copy = tmp_path / "copy"
    copy.mkdir()
    for each in model.iterdir():
        (copy / each.name).write_bytes(each.read_bytes())
    assert fingerprint_of(inspect_model(str(copy))) == fingerprint_of(one)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # a number of the last tensor
    (copy / file.name).write_bytes(data)
    assert fingerprint_of(inspect_model(str(copy))) != fingerprint_of(one)


def test_differences_are_named_both_ways() -> None:
    assert difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, "cpu") == ""
    assert difference({"a": "1"}, {"a": "2"}, "cpu") == "a: 2 there, 1 here"
    assert difference({"GPUs": "H100"}, {"GPUs": "none"}, "cpu") == ""
    assert difference({"GPUs": "H100"}, {"GPUs": "none"}, "auto") == "GPUs: none there, H100 here"


def test_the_first_machine_knows_its_address(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    given = dict(node_key_file=str(tmp_path / "key"))
    assert first_network(MachinesConfig(data_parallel_address="localhost", **given)).address in {"127.0.0.1", "::1"}
    assert first_network(MachinesConfig(data_parallel_address="::1", **given)).hub == "tcp://[::1]:29550"
    with pytest.raises(ConfigError, match="--data-parallel-address no-such-host: "):
        first_network(MachinesConfig(data_parallel_address="no-such-host", **given))


def test_a_secret_must_be_one(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        curve.read_key(str(file))
    file.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="has 5 bytes"):
        curve.read_key(str(file))
    file.write_bytes(KEY + b"\r\n")
    assert curve.read_key(str(file)) == KEY


def test_what_a_lost_node_had_is_for_the_next_or_for_it_again(hub: Around) -> None:
    one, other = Played(hub), Played(hub)
    one.joins(1, session="a")
    assert isinstance(hub.told(), lifecycle.NodeJoined)
    assert isinstance(hub.told(), lifecycle.NodeLost)  # silent
    assert one.joins(1, session="a", attempt=1) == nodes.Joined()
    assert isinstance(hub.told(), lifecycle.NodeJoined)
    assert isinstance(hub.told(), lifecycle.NodeLost)
    assert isinstance(other.asks(hub, count=2, session="b"), nodes.Assigned)
    assert isinstance(one.joins(1, session="a", attempt=2), nodes.StartOver)
