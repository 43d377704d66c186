"""The parent of all processes of one `holdfast serve`: starts them, watches them, stops them.

    starting ──all ready──▶ serving ──signal──▶ draining ──gateway gone──▶ stopped
        └──────failure or signal──────────────────┴──▶ stopped

It holds no device and serves no request. Children report over one ROUTER socket; that a child has ended, its
pidfd says. Everything it waits for comes through one poll.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import setproctitle
import zmq

from holdfast.cluster.plans import check_balancing, check_memory, plan_of
from holdfast.cluster.process import Child
from holdfast.core import wire
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError, HoldfastError, ProcessDied, StartupError
from holdfast.core.logs import setup_logging
from holdfast.core.plan import Plan, places
from holdfast.core.spec import ModelInfo
from holdfast.models.hub import resolve_model
from holdfast.models.inspect import inspect_model
from holdfast.models.parameters import packed_room
from holdfast.parallel.segment import create, layout_of
from holdfast.parallel.weights import HEADER

log = logging.getLogger(__name__)

GATEWAY = "gateway"


def modules(plan: Plan) -> dict[str, str]:
    """Name → module of every child; the slowest to start come first."""
    replicas = range(len(plan.replicas))
    return {
        **{
            f"worker {replica}.{place.name}": "holdfast.cluster.rank"
            for replica in replicas
            for place in places(plan.replicas[replica])
        },
        GATEWAY: "holdfast.gateway",
        **{f"engine {replica}": "holdfast.cluster.engine" for replica in replicas},
    }


def replica_of(child: str) -> int | None:
    """None: it serves all of them."""
    return None if child == GATEWAY else int(child.split(" ")[1].partition(".")[0])


STOP_SECONDS = 5.0
"""How long a child may take to leave after Stop before it is killed."""


class Said(NamedTuple):
    """A child said something."""

    child: str
    message: wire.Progress | wire.Ready | wire.Failed


class Ended(NamedTuple):
    """A child ended."""

    child: str


class Signalled(NamedTuple):
    """The user wants us to stop."""

    number: int


class TimedOut(NamedTuple):
    """The deadline passed."""


Event = Said | Ended | Signalled | TimedOut


def serve(model: str, config: ServeConfig) -> int:
    """Serve `model` until SIGINT or SIGTERM; the exit status for the shell.

    0: stopped as asked. 1: the machine failed. `UserError`s (bad flags, a bad checkpoint) are raised.
    """
    setup_logging("supervisor", config.server.log_level)
    setproctitle.setproctitle("holdfast supervisor")
    info = inspect_model(resolve_model(model, config.model.revision))
    log.info("%s: %s, %d layers", info.path, info.spec.family, info.spec.num_layers)
    defaults = info.sampling_defaults | config.model.sampling_overrides()
    info = msgspec.structs.replace(info, sampling_defaults=defaults)
    name = config.model.served_model_name or Path(model).absolute().name.removesuffix(".gguf")
    config = replace(config, model=replace(config.model, served_model_name=name))
    plan = plan_of(config, info)
    check_balancing(config, info, plan)
    check_memory(config, info, plan)
    folder = tempfile.mkdtemp(prefix="holdfast-")
    try:
        with Supervisor(folder, config, plan) as supervisor:
            return supervisor.run(info)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Supervisor:
    """`with Supervisor(...) as s: s.run(...)`: no child outlives the with block."""

    def __init__(self, folder: str, config: ServeConfig, plan: Plan) -> None:
        self.config = config
        self.plan = plan
        self.endpoints = wire.Endpoints(folder)
        self.children: dict[str, Child] = {}
        self._started = time.monotonic()
        self._ended: set[str] = set()
        self._failures: dict[int, str] = {}
        """Replica → what its first process to fail by itself said."""
        self._replicas = set(range(len(plan.replicas)))
        """Those that are alive."""
        self._decode = wire.decoder(wire.ToSupervisor).decode

    def __enter__(self) -> Supervisor:
        longest = self.endpoints.worker("00.00.00").removeprefix("ipc://")
        if len(longest.encode()) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(f"TMPDIR {tempfile.gettempdir()}: too long for a socket's path ({longest})")
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        try:
            self._control.bind(self.endpoints.supervisor)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"TMPDIR {tempfile.gettempdir()}: no sockets can be made there: {error}") from error
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno())
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_children()
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._wake_read.close()
        self._wake_write.close()
        self._context.destroy(linger=0)

    def run(self, model: ModelInfo) -> int:
        """Start, serve, drain."""
        self._start_children(model)
        try:
            if not self._wait_until_ready():
                return 0
            if self._watch():
                self._drain()
        except ProcessDied as error:
            log.error("%s", error)  # noqa: TRY400 - the traceback is ours, the death is theirs
            self._end_requests(str(error))
            return 1
        return 0

    # --- the stages of a life ---

    def _start_children(self, model: ModelInfo) -> None:
        boot_file = Path(self.endpoints.folder) / "boot.json"
        boot_file.touch(mode=0o600)
        boot_file.write_bytes(msgspec.json.encode(wire.Boot(self.config, model, self.endpoints, self.plan)))
        memory = self._share_memory(model)
        for name, module in modules(self.plan).items():
            self.children[name] = Child.start(module, name, str(boot_file), memory[name])
        for descriptor in {descriptor for shared in memory.values() for descriptor in shared.values()}:
            os.close(descriptor)  # it lives as long as a child has it

    def _share_memory(self, model: ModelInfo) -> dict[str, dict[str, int]]:
        """Every child's descriptors of memory that it has in common with others."""
        shared: dict[str, dict[str, int]] = {name: {} for name in modules(self.plan)}
        for number, replica in enumerate(self.plan.replicas):
            if replica.num_ranks > 1:
                descriptor = create(layout_of(replica, model.spec, self.config.scheduler).num_bytes)
                for name, its in shared.items():
                    if replica_of(name) == number:
                        its["replica"] = descriptor
        if self.plan.shard_weights:
            for place in places(self.plan.replicas[0]):
                descriptor = create(HEADER + packed_room(model.spec, place))
                for number in range(len(self.plan.replicas)):
                    shared[f"worker {number}.{place.name}"]["weights"] = descriptor
        return shared

    def _wait_until_ready(self) -> bool:
        """False: a signal came first. Raises the error of the child that could not start."""
        deadline = self._started + self.config.server.startup_timeout
        shown: dict[str, float] = {}
        url = ""
        for event in self._events(deadline):
            match event:
                case Said(name, wire.Progress(text, fraction)):
                    if fraction is None or fraction >= shown.get(name + text, 0.0):
                        shown[name + text] = (fraction or 0.0) + 0.25
                        log.info("%s: %s%s", name, text, "" if fraction is None else f" {fraction:.0%}")
                case Said(name, wire.Ready(text)):
                    self.children[name].ready = True
                    url = text or url
                    if all(child.ready for child in self.children.values()):
                        self._welcome(url)
                        return True
                case Said(name, wire.Failed() as failed):
                    raise _startup_error(name, failed)
                case Ended(name):
                    raise StartupError(f"{name} ended while starting ({self.children[name].how_it_ended()})")
                case TimedOut():
                    late = [child.name for child in self.children.values() if not child.ready]
                    raise StartupError(
                        f"not ready after --startup-timeout {self.config.server.startup_timeout} s: {', '.join(late)}"
                    )
                case Signalled():
                    return False
        raise AssertionError("events never end")

    def _welcome(self, url: str) -> None:
        model = self.config.model.served_model_name
        message = {
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        log.info(
            "ready after %.1f s: serving %s at %s; stop with Ctrl-C. Try:\n\n"
            "curl %s/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '%s'\n",
            time.monotonic() - self._started,
            model,
            url,
            url,
            json.dumps(message),
        )

    def _watch(self) -> bool:
        """Until a signal comes (True). Raises `ProcessDied` when a child ends that should not."""
        for event in self._events():
            match event:
                case Signalled(number):
                    log.info("%s: draining", signal.Signals(number).name)
                    return True
                case Said(name, wire.Failed() as failed):
                    self._note_failure(name, failed)
                case Ended(name):
                    self._lose(name)
        raise AssertionError("events never end")

    def _note_failure(self, name: str, failed: wire.Failed) -> None:
        """The others of its replica fail because of it, and may end before it."""
        log.error("%s failed: %s", name, failed.traceback)
        replica = replica_of(name)
        if replica is not None and not failed.follows:
            self._failures.setdefault(replica, f"{name} died ({failed.error})")

    def _lose(self, name: str) -> None:
        """A child has ended that should not. The rest of its replica is killed, and the gateway has its requests go
        on in the others; the last one's end, like the gateway's, is that of the service: raises `ProcessDied`."""
        replica, reason = replica_of(name), f"{name} died ({self.children[name].how_it_ended()})"
        if replica is None:
            raise ProcessDied(reason)
        if replica not in self._replicas:
            return  # one of those that were killed because of the first
        reason = self._failures.get(replica, reason)
        if self._replicas == {replica}:
            self._kill_replica(replica)  # its other ranks may wait for the dead one, and hear nothing
            raise ProcessDied(reason)
        self._replicas.remove(replica)
        left = len(self._replicas)
        log.error("%s: replica %d is lost, %d %s on", reason, replica, left, "go" if left > 1 else "goes")
        self._send(GATEWAY, wire.ReplicaLost(replica, reason))
        self._kill_replica(replica)

    def _kill_replica(self, replica: int) -> None:
        for child in self.children.values():
            if replica_of(child.name) == replica:
                child.kill()

    def _drain(self) -> None:
        """Let the gateway finish its live requests; a second signal ends the wait."""
        timeout = self.config.server.shutdown_timeout
        self._send(GATEWAY, wire.Drain(timeout))
        for event in self._events(time.monotonic() + timeout + STOP_SECONDS):
            match event:
                case Said(name, wire.Failed() as failed):
                    log.error("%s failed: %s", name, failed.traceback)
                case Ended(name) if name == GATEWAY and self.children[name].process.returncode == 0:
                    return
                case Ended(name):
                    self._lose(name)
                case Signalled() | TimedOut():
                    log.warning("not waiting for live requests any longer")
                    self._end_requests("the service was stopped")
                    return

    def _end_requests(self, reason: str) -> None:
        """Give every live request its definite error, then let the gateway go."""
        gateway = self.children[GATEWAY]
        if gateway.process.poll() is None:
            for replica in self._replicas:
                self._send(GATEWAY, wire.ReplicaLost(replica, reason))
            self._send(GATEWAY, wire.Drain(0.0))
            gateway.wait(time.monotonic() + STOP_SECONDS)

    def _stop_children(self) -> None:
        """Stop, wait, kill: in the end every child is reaped. One that is not ready yet may not hear us."""
        for child in self.children.values():
            if not child.ready:
                child.kill()
            elif child.process.poll() is None:
                self._send(child.name, wire.Stop())
        deadline = time.monotonic() + STOP_SECONDS
        for child in self.children.values():
            if not child.wait(deadline):
                log.warning("%s did not stop within %g s: killed", child.name, STOP_SECONDS)
                child.kill()
            child.close()

    # --- what happens ---

    def _events(self, deadline: float | None = None) -> Iterator[Event]:
        """Everything that happens, in order of arrival; `TimedOut` at the deadline (`time.monotonic()`)."""
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        watched = {child.pidfd: name for name, child in self.children.items() if name not in self._ended}
        for pidfd in watched:
            poller.register(pidfd, zmq.POLLIN)
        while True:
            left = None if deadline is None else max(int((deadline - time.monotonic()) * 1000), 0)
            readable = dict(poller.poll(left))
            if not readable:
                yield TimedOut()
            if self._control in readable:  # before the ends: a child's last word explains its end
                yield from self._heard()
            if self._wake_read.fileno() in readable:
                yield from (Signalled(number) for number in self._wake_read.recv(64) if number in STOP_SIGNALS)
            for pidfd in readable.keys() & watched.keys():
                poller.unregister(pidfd)
                yield from self._heard()
                child = self.children[watched[pidfd]]
                child.process.wait()
                self._ended.add(child.name)
                yield Ended(child.name)

    def _heard(self) -> Iterator[Said]:
        while True:
            try:
                name, data = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield Said(name.decode(), self._decode(data))

    def _send(self, child: str, message: wire.ToChild) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it never connected, or is gone: then its pidfd tells
            self._control.send_multipart([child.encode(), wire.encode(message)])


STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def _startup_error(name: str, failed: wire.Failed) -> HoldfastError:
    """The child's own error, as one the command line shows: the user's in a sentence, the machine's in full."""
    if failed.user_error:
        return ConfigError(failed.error)
    return StartupError(f"{name} could not start: {failed.error}\n{failed.traceback}")
