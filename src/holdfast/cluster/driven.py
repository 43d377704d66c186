"""A replica without supervisor, store and gateway around it: its engine and its workers, the very processes that
serve, driven by who measures how long their steps take."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import zmq

from holdfast.cluster.children import Children, Ended, Event, Said, Signalled, TimedOut
from holdfast.cluster.members import members
from holdfast.cluster.starter import Starter
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot, Endpoints
from holdfast.core.config import ServeConfig
from holdfast.core.errors import ConfigError, StartupError
from holdfast.core.plan import Plan
from holdfast.core.request import SamplingParams
from holdfast.core.spec import ModelInfo

PATIENCE = 120
"""Seconds until the replica must be ready, and within which it must say something while it has work."""
LOOK_MS = 200
"""Of silence, after which it is seen whether all processes live."""


class DrivenReplica:
    """`with DrivenReplica(...) as replica:` no process of it outlives the with block. Of the main thread, as signals
    are its affair meanwhile.

    Raises `StartupError` when a process cannot start, ends, or says nothing; `ConfigError` for more than one replica.
    """

    def __init__(self, model: ModelInfo, plan: Plan, config: ServeConfig) -> None:
        if len(plan.replicas) != 1:
            raise ConfigError(f"a plan of {len(plan.replicas)} replicas: one can be driven")
        quiet = replace(config, server=replace(config.server, log_level="error"))
        self._config = replace(quiet, cache=replace(quiet.cache, checkpoint_memory_bytes=0))
        self._model, self._plan, self._submitted = model, plan, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> DrivenReplica:
        with contextlib.ExitStack() as stack:
            folder = tempfile.mkdtemp(prefix="holdfast-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            endpoints = Endpoints(folder)
            context = stack.enter_context(zmq.Context())
            self._outputs, self._requests = context.socket(zmq.PULL), context.socket(zmq.PUSH)
            for ours in (self._outputs, self._requests):
                ours.setsockopt(zmq.LINGER, 0)
                stack.callback(ours.close)
            self._outputs.bind(endpoints.gateway)
            self._requests.connect(endpoints.engine(0))
            self._children = stack.enter_context(Children(endpoints))
            unused = stack.enter_context(socket.socket())  # what a gateway would listen on
            boot = Boot(self._config, self._model, endpoints, self._plan)
            Starter(self._children, boot, unused).start(members(self._plan, has_store=False)[0])
            self._wait_until_ready()
            self._requests.send(wire.encode(wire.Hello(0)))
            self._decode = wire.decoder(wire.ToGateway).decode
            assert isinstance(self._receive(), wire.EngineReady)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait_until_ready(self) -> None:
        for event in self._children.events(time.monotonic() + PATIENCE):
            if isinstance(event, TimedOut):
                raise StartupError(f"the replica is not ready after {PATIENCE} s")
            self._take(event)
            if all(child.ready for child in self._children.by_name.values()):
                return

    def _take(self, event: Event) -> None:
        """Raises `StartupError` for a process that fails or ends, `KeyboardInterrupt` when the user wants us to."""
        match event:
            case Said(name, lifecycle.Ready()):
                self._children.by_name[name].ready = True
            case Said(name, lifecycle.Failed() as failed):
                raise StartupError(f"{name} failed: {failed.error}\n{failed.traceback}")
            case Ended(name):
                raise StartupError(f"{name} ended: {self._children.by_name[name].how_it_ended()}")
            case Signalled():
                raise KeyboardInterrupt

    def _look(self) -> None:
        """At what has happened to the processes, and to us, meanwhile."""
        while not isinstance(event := self._children.next_event(time.monotonic()), TimedOut):
            self._take(event)

    def _receive(self) -> wire.Outputs | wire.EngineReady:
        """What the engine says next."""
        deadline = time.monotonic() + PATIENCE
        while not self._outputs.poll(LOOK_MS):
            self._look()
            if time.monotonic() > deadline:
                raise StartupError(f"the replica has said nothing for {PATIENCE} s")
        said: wire.Outputs | wire.EngineReady = self._decode(self._outputs.recv())
        return said

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[float]]:
        """When each request, of these tokens, had each of its `num_tokens` tokens: seconds since they were asked
        for, all at once. What is not served raises `StartupError`."""
        self._look()
        params = SamplingParams(seed=0, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        names = [f"r{self._submitted + index}" for index in range(len(prompts))]
        self._submitted += len(prompts)
        messages = [
            wire.encode(wire.Submit(name, prompt, params)) for name, prompt in zip(names, prompts, strict=True)
        ]
        came: dict[str, list[float]] = {name: [] for name in names}
        begun = time.perf_counter()
        for message in messages:
            self._requests.send(message)
        left = len(names)
        while left:
            data = self._receive()
            now = time.perf_counter() - begun
            for output in data.outputs if isinstance(data, wire.Outputs) else ():
                if output.error is not None:
                    raise StartupError(f"a request failed: {output.error}")
                came[output.request_id] += [now] * len(output.token_ids)
                left -= output.finish is not None
        return list(came.values())
