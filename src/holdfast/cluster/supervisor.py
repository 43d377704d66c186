"""The parent of all processes of one `holdfast serve`: starts them, watches them, stops them.

    starting ──all ready──▶ serving ──signal──▶ draining ──gateway gone──▶ stopped
        └──────failure or signal──────────────────┴──▶ stopped

It holds no device and serves no request. A replica that loses a process is killed whole and started again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import setproctitle

from holdfast.cluster.children import STOP_SECONDS, Children, Ended, Event, Said, Signalled, TimedOut
from holdfast.cluster.plans import check_balancing, check_memory, impact_of, plan_of
from holdfast.core import wire
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError, HoldfastError, ProcessDied, StartupError
from holdfast.core.logs import setup_logging
from holdfast.core.plan import Plan, places
from holdfast.core.spec import ModelInfo
from holdfast.models.hub import resolve_model
from holdfast.models.inspect import inspect_model, stamp_of
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
        with Children(wire.Endpoints(folder)) as children:
            return Supervisor(children, wire.Endpoints(folder), config, plan, info).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


HEARTBEAT_LOSS_SECONDS = 3.0
"""An engine that has not been heard for so long stands still: three beats."""
_TICK_SECONDS = 0.5
"""Between two looks at who is late."""
STEADY_SECONDS = 60.0
"""A replica that has served for so long starts with a clean record when it dies."""


@dataclass(slots=True)
class Replica:
    """What has become of a replica."""

    number: int
    state: Literal["starting", "serving", "lost"] = "starting"
    since: float = field(default_factory=time.monotonic)
    """Of the state."""
    deaths: int = 0
    """In a row."""
    heard: float = field(default_factory=time.monotonic)
    """Its engine's last sign of life, once it serves."""
    failure: tuple[str, wire.Failed] | None = None
    """Its first process to fail by itself, this time, and what it said."""

    def become(self, state: Literal["starting", "serving", "lost"]) -> None:
        self.state, self.since = state, time.monotonic()
        self.heard = self.since


class Supervisor:
    """The life of one service; `run` is all of it."""

    def __init__(
        self, children: Children, endpoints: wire.Endpoints, config: ServeConfig, plan: Plan, model: ModelInfo
    ) -> None:
        self.children = children
        self.endpoints = endpoints
        self.config = config
        self.plan = plan
        self.model = model
        self.modules = modules(plan)
        self.replicas = [Replica(number) for number in range(len(plan.replicas))]
        self._started = time.monotonic()
        self._shown: dict[str, float] = {}
        self._weights: dict[str, int] = {}
        """Descriptors of the memory of weights that replicas hold together, by the name of a place; open as long
        as we live, for replicas that come back."""

    def run(self) -> int:
        """Start, serve, drain."""
        self._write_boot_file()
        if self.plan.shard_weights:
            for place in places(self.plan.replicas[0]):
                self._weights[place.name] = create(HEADER + packed_room(self.model.spec, place))
        for replica in self.replicas:  # the slowest first
            self._start(replica)
        self.children.start(GATEWAY, self.modules[GATEWAY], str(self._boot_file), {})
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

    @property
    def _boot_file(self) -> Path:
        return Path(self.endpoints.folder) / "boot.json"

    def _write_boot_file(self) -> None:
        self._boot_file.touch(mode=0o600)
        self._boot_file.write_bytes(
            msgspec.json.encode(wire.Boot(self.config, self.model, self.endpoints, self.plan, stamp_of(self.model)))
        )

    def _names(self, replica: Replica) -> list[str]:
        """Of its processes."""
        return [name for name in self.modules if replica_of(name) == replica.number]

    def _start(self, replica: Replica) -> None:
        """All processes of a replica, with new memory between them."""
        layout = layout_of(self.plan.replicas[replica.number], self.model.spec, self.config.scheduler)
        names = self._names(replica)
        self._shown = {key: shown for key, shown in self._shown.items() if key.partition("@")[0] not in names}
        descriptor = create(layout.num_bytes)
        try:
            for name in names:
                weights = self._weights.get(name.partition(".")[2])
                memory = {"replica": descriptor} | ({} if weights is None else {"weights": weights})
                self.children.start(name, self.modules[name], str(self._boot_file), memory)
        finally:
            os.close(descriptor)  # it lives as long as a child has it
        replica.become("starting")

    def _wait_until_ready(self) -> bool:
        """False: a signal came first. Raises the error of the child that could not start."""
        deadline, url = self._started + self.config.server.startup_timeout, ""
        for event in self.children.events(deadline):
            match event:
                case Said(name, wire.Progress() as progress):
                    self._show(name, progress)
                case Said(name, wire.Ready(text)):
                    self.children.by_name[name].ready = True
                    url = text or url
                    if all(child.ready for child in self.children.by_name.values()):
                        for replica in self.replicas:
                            replica.become("serving")
                        self._welcome(url)
                        return True
                case Said(name, wire.Failed() as failed):
                    raise _startup_error(name, failed)
                case Ended(name):
                    raise StartupError(f"{name} ended while starting ({self._how_it_ended(name)})")
                case TimedOut():
                    late = [child.name for child in self.children.by_name.values() if not child.ready]
                    raise StartupError(
                        f"not ready after --startup-timeout {self.config.server.startup_timeout} s: {', '.join(late)}"
                    )
                case Signalled():
                    return False
        raise AssertionError("events never end")

    def _show(self, name: str, progress: wire.Progress) -> None:
        """Of loading, a line for every quarter."""
        fraction, key = progress.fraction, f"{self.children.by_name[name].identity} {progress.text}"
        if fraction is None or fraction >= self._shown.get(key, 0.0):
            self._shown[key] = (fraction or 0.0) + 0.25
            log.info("%s: %s%s", name, progress.text, "" if fraction is None else f" {fraction:.0%}")

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
        """Until a signal comes (True). Raises `ProcessDied` when the gateway ends, or the last replica for good."""
        for event in self._events():
            match event:
                case Signalled(number):
                    log.info("%s: draining", signal.Signals(number).name)
                    return True
                case _:
                    self._take(event)
        raise AssertionError("events never end")

    def _events(self, deadline: float | None = None) -> Iterator[Event]:
        """Everything that happens; `TimedOut` at the deadline. Replicas that are late, to start or to give a sign of
        life, are lost by then."""
        looked = time.monotonic()
        while True:
            event = self.children.next_event(min(looked + _TICK_SECONDS, deadline or math.inf))
            now, before = time.monotonic(), looked
            looked = now
            if now - before > 2 * _TICK_SECONDS:  # we stood still ourselves: perhaps everything did
                for replica in self.replicas:
                    replica.heard = now
            if not isinstance(event, TimedOut):
                yield event
                continue
            for replica in self.replicas:
                if replica.state != "lost" and now >= self._due(replica):
                    self._lose_late(replica)
            if deadline is not None and now >= deadline:
                yield event

    def _due(self, replica: Replica) -> float:
        """By when it must have said something."""
        if replica.state == "starting":
            return replica.since + self.config.server.startup_timeout
        return replica.heard + HEARTBEAT_LOSS_SECONDS

    def _lose_late(self, replica: Replica) -> None:
        if replica.state == "starting":
            late = next(name for name in self._names(replica) if not self.children.by_name[name].ready)
            self._lose(replica, late, f"{late} was not ready in time")
        else:
            engine = f"engine {replica.number}"
            self._lose(replica, engine, f"{engine} has not been heard for {HEARTBEAT_LOSS_SECONDS:g} s", hangs=True)

    def _take(self, event: Event) -> None:
        """What a child of a running service says, or its end."""
        number = replica_of(event.child) if isinstance(event, Said | Ended) else None
        if number is not None and self.replicas[number].state == "lost":
            return  # the rest of it
        match event:
            case Said(name, wire.Progress() as progress):
                self._show(name, progress)
            case Said(_, wire.Beat()) if number is not None:
                self.replicas[number].heard = time.monotonic()
            case Said(name, wire.Ready()):
                self._welcome_back(name)
            case Said(name, wire.Failed() as failed):
                self._note_failure(name, failed)
            case Ended(name):
                reason = f"{name} died ({self._how_it_ended(name)})"
                if number is None:
                    raise ProcessDied(reason)
                self._lose(self.replicas[number], name, reason)

    def _welcome_back(self, name: str) -> None:
        self.children.by_name[name].ready = True
        number = replica_of(name)
        assert number is not None, name
        replica = self.replicas[number]
        if all(self.children.by_name[other].ready for other in self._names(replica)):
            log.warning("replica %d serves again, after %.1f s", number, time.monotonic() - replica.since)
            replica.become("serving")

    def _note_failure(self, name: str, failed: wire.Failed) -> None:
        """The others of its replica fail because of it, and may end before it."""
        log.error("%s failed: %s", name, failed.traceback)
        number = replica_of(name)
        if number is not None and not failed.follows:
            self.replicas[number].failure = self.replicas[number].failure or (name, failed)

    def _lose(self, replica: Replica, process: str, reason: str, *, hangs: bool = False) -> None:
        """A process of it has ended that should not. The rest is killed: nobody waits for the dead. It starts again,
        unless it has died too often; the gateway has its requests go on in the others, or wait for it. The last one's
        end is that of the service: raises `ProcessDied`."""
        detected: float = time.time()
        kind: wire.LossKind = "hang" if hangs else "death"
        if replica.failure is not None:  # the first to fail is the cause, whoever was the first to end
            process, failed = replica.failure
            reason, kind = f"{process} died ({failed.error})", "hang" if failed.hangs else "error"
        loss = impact_of(self.plan, process, kind, detected)
        epoch = self.children.by_name[f"engine {replica.number}"].epoch
        self.children.kill(self._names(replica))
        if replica.state == "serving" and time.monotonic() - replica.since > STEADY_SECONDS:
            replica.deaths = 0
        replica.deaths += 1
        replica.failure = None
        comes_back = replica.deaths <= self.config.server.max_restarts
        if not comes_back and all(other.state == "lost" for other in self.replicas if other is not replica):
            raise ProcessDied(reason)
        serving = sum(other.state == "serving" for other in self.replicas if other is not replica)
        log.error(
            "%s: replica %d is lost, %d %s on%s",
            reason,
            replica.number,
            serving,
            "go" if serving != 1 else "goes",
            f"; it is started again ({replica.deaths} of --max-restarts {self.config.server.max_restarts})"
            if comes_back
            else "",
        )
        self.children.send(GATEWAY, wire.ReplicaLost(replica.number, reason, epoch, comes_back, loss))
        replica.become("lost")
        if comes_back:
            try:
                self._start(replica)
            except OSError as error:  # no process, no memory, no descriptor to be had
                self._give_up(replica, f"replica {replica.number} cannot be started again: {error}")

    def _give_up(self, replica: Replica, reason: str) -> None:
        """It does not come back after all."""
        self.children.kill(self._names(replica))
        if all(other.state == "lost" for other in self.replicas):
            raise ProcessDied(reason)
        log.error("%s", reason)
        self.children.send(GATEWAY, wire.ReplicaLost(replica.number, reason))

    def _how_it_ended(self, name: str) -> str:
        return self.children.by_name[name].how_it_ended()

    def _drain(self) -> None:
        """Let the gateway finish its live requests; a second signal ends the wait."""
        timeout = self.config.server.shutdown_timeout
        self.children.send(GATEWAY, wire.Drain(timeout))
        for event in self._events(time.monotonic() + timeout + STOP_SECONDS):
            match event:
                case Ended(name) if name == GATEWAY and self.children.by_name[name].process.returncode == 0:
                    return
                case Signalled() | TimedOut():
                    log.warning("not waiting for live requests any longer")
                    self._end_requests("the service was stopped")
                    return
                case _:
                    self._take(event)

    def _end_requests(self, reason: str) -> None:
        """Give every live request its definite error, then let the gateway go."""
        if self.children.is_alive(GATEWAY):
            for replica in self.replicas:
                self.children.send(GATEWAY, wire.ReplicaLost(replica.number, reason))
            self.children.send(GATEWAY, wire.Drain(0.0))
            self.children.by_name[GATEWAY].wait(time.monotonic() + STOP_SECONDS)


def _startup_error(name: str, failed: wire.Failed) -> HoldfastError:
    """The child's own error, as one the command line shows: the user's in a sentence, the machine's in full."""
    if failed.user_error:
        return ConfigError(failed.error)
    return StartupError(f"{name} could not start: {failed.error}\n{failed.traceback}")
