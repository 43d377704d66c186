"""`holdfast serve --headless`: this machine's part in a service whose first machine is another.

asking ──assigned──▶ starting ──▶ serving ──the service was stopped, or a signal──▶ stopped
   └◀──────────── the service was started anew ────────┘
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass, fields, replace

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from holdfast.cluster import curve
from holdfast.cluster.children import STOP_SIGNALS
from holdfast.cluster.owner import identity_of
from holdfast.core import nodes, wire
from holdfast.core.boot import Boot, Endpoints
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError
from holdfast.core.machines import MachinesConfig, Network
from holdfast.core.plan import Plan
from holdfast.core.spec import ModelInfo

log = logging.getLogger(__name__)

ASK_SECONDS = 1.0
"""Between two times that a place in the service is asked for."""
SILENT_SECONDS = 10.0
"""Without an answer, after which the user is told."""

OWN = {
    "model": {"revision"},
    "device": {"cpu_threads", "pin_cpu_threads", "allow_shared_gpu"},
    "cache": {
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "checkpoint_memory_bytes",
        "checkpoint_disk",
        "checkpoint_disk_bytes",
    },
    "scheduler": set[str](),
    "server": {"startup_timeout", "spare_workers", "log_level"},
    "machines": {field.name for field in fields(MachinesConfig)} - {"heartbeat_interval"},
}
"""By section: what a node is told by its own flags; all else is the service's."""


def check_own(config: ServeConfig) -> None:
    """Refuse flags that would not be heeded. Raises `ConfigError`."""
    for section, own in OWN.items():
        given = getattr(config, section)
        for field in fields(given):
            if field.name not in own and getattr(given, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(f"{flag}: with --headless this is what the service says")


def first_network(machines: MachinesConfig) -> Network:
    """Of the first machine of a service. Raises `ConfigError` when there is no secret to be read, or nobody knows the
    address."""
    key, address = curve.read_key(machines.node_key_file or ""), machines.data_parallel_address or ""
    try:
        address = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])  # none is bound by name
    except OSError as error:
        raise ConfigError(f"--data-parallel-address {address}: {error.strerror}") from error
    port, interval = machines.data_parallel_rpc_port, machines.heartbeat_interval
    return Network(address, port, key, True, interval, uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Node:
    """This machine, as the first one knows it."""

    config: ServeConfig
    model: ModelInfo
    name: str
    session: str
    key: bytes

    @classmethod
    def of(cls, config: ServeConfig, model: ModelInfo) -> Node:
        """Raises `ConfigError` when there is no secret to be read."""
        key = curve.read_key(config.machines.node_key_file or "")
        return cls(config, model, f"{socket.gethostname()}:{os.getpid()}", uuid.uuid4().hex, key)

    def network(self, service: str = "", heartbeat: float = ASK_SECONDS) -> Network:
        machines = self.config.machines
        address, port = machines.data_parallel_address or "", machines.data_parallel_rpc_port
        return Network(address, port, self.key, False, heartbeat, service, self.name, self.session)

    def boot(self, assigned: nodes.Assigned, endpoints: Endpoints) -> Boot:
        """What this machine's processes are told: of the service, but for what is its own."""
        told = msgspec.json.decode(assigned.boot, type=Boot)
        sections = {
            section: replace(
                getattr(told.config, section), **{name: getattr(getattr(self.config, section), name) for name in own}
            )
            for section, own in OWN.items()
        }
        model = msgspec.structs.replace(told.model, path=self.model.path)
        plan = _plan_here(told.plan, assigned.replicas)
        network = self.network(assigned.service, told.config.machines.heartbeat_interval)
        return Boot(ServeConfig(**sections), model, endpoints, plan, network=network)

    def ask(self) -> nodes.Assigned | None:
        """Replicas to serve, as soon as there is a service that has some left; None: a signal came first. Raises
        `ConfigError` when it will never have."""
        network, count = self.network(), self.config.machines.data_parallel_size_local or 1
        question = nodes.Ask(self.name, self.session, count, identity_of(self.config, self.model))
        log.info("asking the service at %s for %d of its replicas", network.hub, count)
        with _signals() as stopped, zmq.Context() as context, _reaching(context, network) as (hub, refusals):
            poller = zmq.Poller()
            for each in (hub, refusals, stopped):
                poller.register(each, zmq.POLLIN)
            heard, asked, said = time.monotonic(), 0.0, ""
            while True:
                if time.monotonic() - asked >= ASK_SECONDS:
                    with contextlib.suppress(zmq.Again):  # not connected yet
                        hub.send(wire.encode(question), zmq.NOBLOCK)
                        asked = time.monotonic()
                readable = dict(poller.poll(100))
                if stopped.fileno() in readable:
                    return None
                now = f"{network.hub} does not answer" if time.monotonic() - heard > SILENT_SECONDS else said
                while refusals.poll(0):
                    recv_monitor_message(refusals)
                    heard = time.monotonic()
                    now = f"{network.hub} ends the connection; is its --node-key-file another one?"
                if hub in readable:
                    heard = time.monotonic()
                    answer = wire.decoder(nodes.ToNode).decode(hub.recv())
                    if isinstance(answer, nodes.Assigned):
                        return answer
                    assert isinstance(answer, nodes.Refused), answer
                    if answer.for_good:
                        raise ConfigError(f"the service at {network.hub} cannot have this machine: {answer.reason}")
                    now = answer.reason
                if now != said:
                    said = now
                    log.info("waiting: %s", now)


@contextlib.contextmanager
def _reaching(
    context: zmq.Context[zmq.Socket[bytes]], network: Network
) -> Generator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]], None, None]:
    """A way to the hub, and what is readable when it ends the connection at once: it has another secret, or is just
    ending. Raises `ConfigError`."""
    hub = context.socket(zmq.DEALER)
    curve.reach(hub, network.key)
    hub.setsockopt(zmq.LINGER, 0)
    hub.setsockopt(zmq.IMMEDIATE, 1)
    failures = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    refusals = hub.get_monitor_socket(failures | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    try:
        hub.connect(network.hub)
        yield hub, refusals
    except zmq.ZMQError as error:
        raise ConfigError(f"--data-parallel-address {network.address}: {error.strerror}") from error
    finally:
        hub.disable_monitor()
        refusals.close()
        hub.close()


def _plan_here(plan: Plan, replicas: list[int]) -> Plan:
    """With devices for these replicas alone, from this machine's first on."""
    devices: list[tuple[int, ...]] = [() for _ in plan.replicas]
    first = 0
    for number in replicas:
        count = plan.replicas[number].num_ranks
        devices[number] = tuple(range(first, first + count))
        first += count
    return msgspec.structs.replace(plan, devices=tuple(devices))


@contextlib.contextmanager
def _signals() -> Generator[socket.socket, None, None]:
    """Readable when the user wants us to stop."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
