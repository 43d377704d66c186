"""The parent of all processes of one `holdfast serve`: starts them, watches them, stops them.

    starting ──all ready──▶ serving ──signal──▶ draining ──gateway gone──▶ stopped
        └──────failure or signal──────────────────┴──▶ stopped

It holds no device and serves no request. A member (a replica, the gateway) that loses a process is killed whole and
started again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import setproctitle

from holdfast.cache.store import StoreLayout
from holdfast.cluster.children import STOP_SECONDS, Children, Ended, Event, Said, Signalled, TimedOut
from holdfast.cluster.listener import listen, url_of
from holdfast.cluster.members import GATEWAY, Member, members
from holdfast.cluster.plans import check_balancing, check_memory, impact_of, plan_of, with_checkpoint_memory
from holdfast.core import lifecycle
from holdfast.core.boot import Boot, Endpoints
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
    config = with_checkpoint_memory(config, info)
    folder = tempfile.mkdtemp(prefix="holdfast-")
    try:
        with contextlib.closing(listen(config.server)) as listener, Children(Endpoints(folder)) as children:
            return Supervisor(children, Endpoints(folder), config, plan, info, listener).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_TICK_SECONDS = 0.5
"""Between two looks at who is late."""


class Supervisor:
    """The life of one service; `run` is all of it."""

    def __init__(  # noqa: PLR0917
        self,
        children: Children,
        endpoints: Endpoints,
        config: ServeConfig,
        plan: Plan,
        model: ModelInfo,
        listener: socket.socket,
    ) -> None:
        self.children = children
        self.endpoints = endpoints
        self.config = config
        self.plan = plan
        self.model = model
        self.listener = listener
        self._store: int | None = None
        """Descriptor of the checkpoint store's memory: as long as we live nothing in it is lost."""
        if config.cache.checkpoint_memory_bytes:
            self._store = create(StoreLayout.of(config, model).num_bytes, "holdfast-store")
        self.members = members(plan, has_store=self._store is not None)
        self.replicas = [member for member in self.members if member.number is not None]
        self.gateway = self.members[-1]
        self._of = {process: member for member in self.members for process in member.processes}
        self._started = time.monotonic()
        self._shown: dict[str, float] = {}
        self._weights: dict[str, int] = {}
        """Descriptors of the memory of weights that replicas hold together, by the name of a place; open as long
        as we live, for replicas that come back."""
        self._untold: lifecycle.Replaces | None = None
        """What a new gateway is told once it is heard."""
        self._drain_until: float | None = None

    def run(self) -> int:
        """Start, serve, drain."""
        self._write_boot_file()
        if self.plan.shard_weights:
            for place in places(self.plan.replicas[0]):
                self._weights[place.name] = create(HEADER + packed_room(self.model.spec, place))
        for member in self.members:
            self._start(member)
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
            msgspec.json.encode(Boot(self.config, self.model, self.endpoints, self.plan, stamp_of(self.model)))
        )

    def _start(self, member: Member) -> None:
        """All its processes; those of a replica with new memory between them."""
        names = list(member.processes)
        self._shown = {key: shown for key, shown in self._shown.items() if key.partition("@")[0] not in names}
        if member is self.gateway:
            self._start_all(member, {"listener": self.listener.fileno()})
        elif member.number is None:
            self._start_all(member, {})
        else:
            layout = layout_of(self.plan.replicas[member.number], self.model.spec, self.config.scheduler)
            descriptor = create(layout.num_bytes)
            try:
                self._start_all(member, {"replica": descriptor})
            finally:
                os.close(descriptor)  # it lives as long as a child has it
        member.become("starting")

    def _start_all(self, member: Member, descriptors: dict[str, int]) -> None:
        for name, module in member.processes.items():
            found = {"weights": self._weights.get(name.partition(".")[2]), "store": self._store}
            more = {
                what: number for what, number in found.items() if number is not None and member is not self.gateway
            }
            self.children.start(name, module, str(self._boot_file), descriptors | more)

    def _wait_until_ready(self) -> bool:
        """False: a signal came first. Raises the error of the child that could not start."""
        deadline = self._started + self.config.server.startup_timeout
        for event in self.children.events(deadline):
            match event:
                case Said(name, lifecycle.Progress() as progress):
                    self._show(name, progress)
                case Said(name, lifecycle.Ready()):
                    self.children.by_name[name].ready = True
                    if all(child.ready for child in self.children.by_name.values()):
                        for member in self.members:
                            member.become("serving")
                        self._welcome(url_of(self.config.server, self.listener))
                        return True
                case Said(name, lifecycle.Failed() as failed):
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

    def _show(self, name: str, progress: lifecycle.Progress) -> None:
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
        """Until a signal comes (True). Raises `ProcessDied` when the gateway or the last replica is lost for good."""
        for event in self._events():
            match event:
                case Signalled(number):
                    log.info("%s: draining", signal.Signals(number).name)
                    return True
                case _:
                    self._take(event)
        raise AssertionError("events never end")

    def _events(self, deadline: float | None = None) -> Iterator[Event]:
        """Everything that happens; `TimedOut` at the deadline. Members that are late, to start or to give a sign of
        life, are lost by then."""
        looked = time.monotonic()
        while True:
            event = self.children.next_event(min(looked + _TICK_SECONDS, deadline or math.inf))
            now, before = time.monotonic(), looked
            looked = now
            if now - before > 2 * _TICK_SECONDS:  # we stood still ourselves: perhaps everything did
                for member in self.members:
                    member.heard = now
            if not isinstance(event, TimedOut):
                yield event
                continue
            for member in self.members:
                if member.state != "lost" and now >= member.due(self.config.server.startup_timeout):
                    self._lose_late(member)
            if deadline is not None and now >= deadline:
                yield event

    def _lose_late(self, member: Member) -> None:
        if member.state == "starting":
            late = next((name for name in member.processes if not self.children.by_name[name].ready), member.speaker)
            self._lose(member, late, f"{late} was not ready in time")
        else:
            reason = f"{member.speaker} has not been heard for {member.most_silent:g} s"
            self._lose(member, member.speaker, reason, hangs=True)

    def _take(self, event: Event) -> None:
        """What a child of a running service says, or its end."""
        if not isinstance(event, Said | Ended):
            return
        member = self._of[event.child]
        if member.state == "lost":
            return  # the rest of it
        if member is self.gateway and isinstance(event, Said) and self._untold is not None:
            self._tell_gateway(self._untold)
        match event:
            case Said(name, lifecycle.Progress() as progress):
                self._show(name, progress)
            case Said(_, lifecycle.Beat()):
                member.heard = time.monotonic()
            case Said(name, lifecycle.Ready()):
                self._welcome_back(member, name)
            case Said(
                name, lifecycle.Failed() as failed
            ):  # others of its member fail because of it, perhaps before it
                log.error("%s failed: %s", name, failed.traceback)
                if not failed.follows:
                    member.failure = member.failure or (name, failed)
            case Ended(name):
                self._lose(member, name, f"{name} died ({self._how_it_ended(name)})")

    def _tell_gateway(self, replaces: lifecycle.Replaces) -> None:
        """What a new one has to know, now that it hears us."""
        self._untold = None
        self.children.send(GATEWAY, replaces)
        for replica in self.replicas:
            if replica.state != "serving":
                assert replica.number is not None
                comes_back = replica.state == "starting"
                epoch = self.children.by_name[replica.speaker].epoch - comes_back
                self.children.send(GATEWAY, lifecycle.ReplicaLost(replica.number, "it is gone", epoch, comes_back))
        if self._drain_until is not None:
            self.children.send(GATEWAY, lifecycle.Drain(max(0.0, self._drain_until - time.monotonic())))

    def _welcome_back(self, member: Member, name: str) -> None:
        self.children.by_name[name].ready = True
        if all(self.children.by_name[other].ready for other in member.processes):
            log.warning("%s serves again, after %.1f s", member.name, time.monotonic() - member.since)
            member.become("serving")
            if member.number is None and member is not self.gateway:
                self.children.send(GATEWAY, lifecycle.StoreBack())

    def _lose(self, member: Member, process: str, reason: str, *, hangs: bool = False) -> None:
        """A process of it has ended that should not. The rest is killed: nobody waits for the dead. It starts again,
        unless it has died too often. The requests of a replica go on in the others, or wait for it: the gateway is
        told. Those of the gateway are in its log; the store's loss hits none. Raises `ProcessDied` when there is
        nobody left to serve."""
        detected: float = time.time()
        kind: lifecycle.LossKind = "hang" if hangs else "death"
        if member.failure is not None:  # the first to fail is the cause, whoever was the first to end
            process, failed = member.failure
            reason, kind = f"{process} died ({failed.error})", "hang" if failed.hangs else "error"
        loss = impact_of(self.plan, process, kind, detected)
        epoch = self.children.by_name[member.speaker].epoch
        self.children.kill(member.processes)
        deaths, most = member.count_death(), self.config.server.max_restarts
        comes_back = deaths <= most
        others = [other for other in self.replicas if other is not member]
        if not comes_back and (member is self.gateway or all(other.state == "lost" for other in others)):
            raise ProcessDied(reason)
        serving = sum(other.state == "serving" for other in others)
        log.error(
            "%s: %s is lost, %d replica%s serve%s%s",
            reason,
            member.name,
            serving,
            "s" if serving != 1 else "",
            "s" if serving == 1 else "",
            f"; it is started again ({deaths} of --max-restarts {most})" if comes_back else "",
        )
        if member is self.gateway:
            self._untold = lifecycle.Replaces(reason, loss)
        elif member.number is None:
            self.children.send(GATEWAY, lifecycle.StoreLost(reason, loss))
        else:
            self.children.send(GATEWAY, lifecycle.ReplicaLost(member.number, reason, epoch, comes_back, loss))
        member.become("lost")
        if comes_back:
            try:
                self._start(member)
            except OSError as error:  # no process, no memory, no descriptor to be had
                self._give_up(member, f"{member.name} cannot be started again: {error}")

    def _give_up(self, member: Member, reason: str) -> None:
        """It does not come back after all."""
        self.children.kill(member.processes)
        if member is self.gateway or all(other.state == "lost" for other in self.replicas):
            raise ProcessDied(reason)
        log.error("%s", reason)
        if member.number is not None:
            self.children.send(GATEWAY, lifecycle.ReplicaLost(member.number, reason))

    def _how_it_ended(self, name: str) -> str:
        return self.children.by_name[name].how_it_ended()

    def _drain(self) -> None:
        """Let the gateway finish its live requests; a second signal ends the wait."""
        timeout = self.config.server.shutdown_timeout
        self._drain_until = time.monotonic() + timeout
        self.children.send(GATEWAY, lifecycle.Drain(timeout))
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
            for number in range(len(self.replicas)):
                self.children.send(GATEWAY, lifecycle.ReplicaLost(number, reason))
            self.children.send(GATEWAY, lifecycle.Drain(0.0))
            self.children.by_name[GATEWAY].wait(time.monotonic() + STOP_SECONDS)


def _startup_error(name: str, failed: lifecycle.Failed) -> HoldfastError:
    """The child's own error, as one the command line shows: the user's in a sentence, the machine's in full."""
    if failed.user_error:
        return ConfigError(failed.error)
    return StartupError(f"{name} could not start: {failed.error}\n{failed.traceback}")
