"""The parent of all processes of one `holdfast serve`: starts them, watches them, stops them.

    starting ──all ready──▶ serving ──signal──▶ draining ──gateway gone──▶ stopped
        └──────failure or signal──────────────────┴──▶ stopped

It holds no device and serves no request. A member (a replica, the gateway) that loses a process is started again:
`cluster.recovery`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import setproctitle

from holdfast.cluster.children import STOP_SECONDS, Children, Ended, Event, Said, Signalled, TimedOut
from holdfast.cluster.headless import Node, check_own, first_network
from holdfast.cluster.listener import listen, url_of
from holdfast.cluster.members import GATEWAY, members
from holdfast.cluster.plans import check_flags, check_memory, plan_of, shared_out, with_checkpoint_memory
from holdfast.cluster.recovery import Recovery
from holdfast.cluster.starter import Starter
from holdfast.core import lifecycle
from holdfast.core.boot import Boot, Endpoints
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError, Dismissed, HoldfastError, ProcessDied, StartupError
from holdfast.core.logs import setup_logging
from holdfast.core.spec import ModelInfo
from holdfast.models.hub import resolve_model
from holdfast.models.inspect import inspect_model

log = logging.getLogger(__name__)


def serve(model: str, config: ServeConfig) -> int:
    """Serve `model` until SIGINT or SIGTERM; the exit status for the shell.

    0: stopped as asked. 1: the machine failed. `UserError`s (bad flags, a bad checkpoint) are raised.
    """
    setup_logging("supervisor", config.server.log_level)
    setproctitle.setproctitle("holdfast supervisor")
    if config.machines.headless:
        check_own(config)
    info = inspect_model(resolve_model(model, config.model.revision))
    log.info("%s: %s, %d layers", info.path, info.spec.family, info.spec.num_layers)
    if config.machines.headless:
        return _lend(config, info)
    defaults = info.sampling_defaults | config.model.sampling_overrides()
    info = msgspec.structs.replace(info, sampling_defaults=defaults)
    name = config.model.served_model_name or Path(model).absolute().name.removesuffix(".gguf")
    config = replace(config, model=replace(config.model, served_model_name=name))
    plan = shared_out(config, plan_of(config, info))
    check_flags(config, info, plan)
    network = first_network(config.machines) if len(plan.here) < len(plan.replicas) else None
    return _run(lambda endpoints: Boot(config, info, endpoints, plan, network=network))


def _lend(config: ServeConfig, info: ModelInfo) -> int:
    """Be part of another machine's service, and of the next one there."""
    node = Node.of(config, info)
    while (assigned := node.ask()) is not None:
        try:
            return _run(partial(node.boot, assigned))
        except Dismissed as error:
            log.warning("%s", error)
    return 0


def _run(make_boot: Callable[[Endpoints], Boot]) -> int:
    """All that this machine has of a service, from its start to its end."""
    folder = tempfile.mkdtemp(prefix="holdfast-")
    boot = make_boot(Endpoints(folder))
    try:
        check_memory(boot.config, boot.model, boot.plan)
        boot = msgspec.structs.replace(boot, config=with_checkpoint_memory(boot.config, boot.model))
        with contextlib.ExitStack() as stack:
            listener = None
            if boot.is_first:
                listener = stack.enter_context(contextlib.closing(listen(boot.config.server)))
            children = stack.enter_context(Children(boot.endpoints))
            return Supervisor(children, boot, listener).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_TICK_SECONDS = 0.5
"""Between two looks at who is late."""


class Supervisor:
    """The life of one service; `run` is all of it."""

    def __init__(self, children: Children, boot: Boot, listener: socket.socket | None) -> None:
        self.children = children
        self.boot, self.config = boot, boot.config
        self.listener = listener
        self.starter = Starter(children, boot, listener)
        has_store = bool(boot.config.cache.checkpoint_memory_bytes)
        self.members = members(boot.plan, has_store=has_store, network=boot.network)
        self.recovery = Recovery(self.starter, self.members)
        self._started = time.monotonic()
        self._shown: dict[str, float] = {}

    def run(self) -> int:
        """Start, serve, drain."""
        for member in self.members:
            self.starter.start(member)
        try:
            if not self._wait_until_ready():
                return 0
            if self._watch():
                self._drain()
        except ProcessDied as error:
            log.error("%s", error)  # noqa: TRY400 - the traceback is ours, the death is theirs
            self._end_requests(str(error))
            return 1
        except Dismissed as error:
            if error.again:
                raise
            log.info("%s", error)
        return 0

    # --- the stages of a life ---

    def _wait_until_ready(self) -> bool:
        """False: a signal came first. Raises the error of the child that could not start."""
        deadline = self._started + self.config.server.startup_timeout
        for event in self.children.events(deadline):
            match event:
                case Said(name, lifecycle.Progress() as progress):
                    self._show(name, progress)
                case Said(name, lifecycle.Ready() as ready):
                    self.recovery.is_ready(name, ready)
                    if all(child.ready for child in self.children.by_name.values()):
                        for member in self.members:
                            member.become("serving")
                        self._welcome()
                        return True
                case Said(name, lifecycle.Failed() as failed):
                    raise _startup_error(name, failed)
                case Ended(name):
                    raise StartupError(f"{name} ended while starting ({self.children.by_name[name].how_it_ended()})")
                case TimedOut():
                    late = [child.name for child in self.children.by_name.values() if not child.ready]
                    late += self.recovery.nodes.missing
                    raise StartupError(
                        f"not ready after --startup-timeout {self.config.server.startup_timeout} s: {', '.join(late)}"
                    )
                case Signalled():
                    return False
                case _:
                    self._take(event)
        raise AssertionError("events never end")

    def _show(self, name: str, progress: lifecycle.Progress) -> None:
        """Of loading, a line for every quarter."""
        fraction, key = progress.fraction, f"{self.children.by_name[name].identity} {progress.text}"
        if fraction is None or fraction >= self._shown.get(key, 0.0):
            self._shown[key] = (fraction or 0.0) + 0.25
            log.info("%s: %s%s", name, progress.text, "" if fraction is None else f" {fraction:.0%}")

    def _welcome(self) -> None:
        model, took = self.config.model.served_model_name, time.monotonic() - self._started
        if self.listener is None:
            assert self.boot.network is not None
            numbers = ", ".join(map(str, self.boot.plan.here))
            log.info("ready after %.1f s: replica %s of %s at %s", took, numbers, model, self.boot.network.hub)
            return
        url = url_of(self.config.server, self.listener)
        message = {
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        log.info(
            "ready after %.1f s: serving %s at %s; stop with Ctrl-C. Try:\n\n"
            "curl %s/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '%s'\n",
            took,
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
        looked = awake = time.monotonic()
        while True:
            event = self.children.next_event(min(looked + _TICK_SECONDS, deadline or math.inf))
            now, before = time.monotonic(), awake
            awake = now
            if now - before > 2 * _TICK_SECONDS:
                self.recovery.stood_still(now)
            if not isinstance(event, TimedOut):
                yield event
            if now - looked >= _TICK_SECONDS:  # however much happens
                looked = now
                self.recovery.look(now)
            if deadline is not None and now >= deadline:
                yield TimedOut()

    def _take(self, event: Event) -> None:
        """What a child of a running service says, or its end."""
        match event:
            case Said(name, lifecycle.Progress() as progress):
                self._show(name, progress)
            case Said(_, lifecycle.Over(reason, again)):
                raise Dismissed(reason, again=again)
            case Said() | Ended():
                self.recovery.take(event)

    def _drain(self) -> None:
        """Let the gateway finish its live requests; a second signal ends the wait."""
        timeout = self.config.server.shutdown_timeout
        self.recovery.drain_until = time.monotonic() + timeout
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
            for number in range(len(self.boot.plan.replicas)):
                self.children.send(GATEWAY, lifecycle.ReplicaLost(number, reason))
            self.children.send(GATEWAY, lifecycle.Drain(0.0))
            self.children.by_name[GATEWAY].wait(time.monotonic() + STOP_SECONDS)


def _startup_error(name: str, failed: lifecycle.Failed) -> HoldfastError:
    """The child's own error, as one the command line shows: the user's in a sentence, the machine's in full."""
    if failed.user_error:
        return ConfigError(failed.error)
    return StartupError(f"{name} could not start: {failed.error}\n{failed.traceback}")
