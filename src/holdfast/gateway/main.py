"""The gateway's process: listens at once, answers once the model can, leaves when told to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import resource
import socket
import time
from collections.abc import Generator
from pathlib import Path

import uvicorn
import zmq.asyncio
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from holdfast.cluster.orders import Order
from holdfast.core.boot import Boot, Endpoints
from holdfast.core.config import ServerConfig
from holdfast.core.lifecycle import (
    BEAT_SECONDS,
    Beat,
    CopiesKept,
    DiskTier,
    Drain,
    Machines,
    NodeJoined,
    Ready,
    Replace,
    Replaces,
    ReplicaLost,
    Spares,
    Stop,
    StoreBack,
    StoreLost,
    ToChild,
)
from holdfast.core.message import decoder, encode
from holdfast.gateway.app import Service, build_app
from holdfast.gateway.calls import Calls
from holdfast.gateway.chat import ChatTemplate, template_source
from holdfast.gateway.checks import WeightChecks
from holdfast.gateway.logfile import LogFile
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.openai import ServedModel, check_sampling_defaults
from holdfast.gateway.router import Router
from holdfast.gateway.tokenizer import Tokenizer, load_tokenizer
from holdfast.gateway.tokenlog import TokenLog

logger = logging.getLogger(__name__)

_MOST_HEAD_BYTES = 64_000

_FLUSH_SECONDS = 2
"""How long connections get to take the last bytes of their replies."""


class _BoundedHeads(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with an end to request heads: they come before any key is checked."""

    _head_bytes: int | None = 0
    """Bytes since the head began; None while a body or a reply is under way."""

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes - len(data) > _MOST_HEAD_BYTES:  # this read may hold the body already
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def run(boot: Boot, control: zmq.asyncio.Socket, order: Order) -> None:
    """Serve HTTP until the supervisor says `Stop`, or a `Drain` is done.

    `control` is connected to the supervisor. Raises `ConfigError` when the chat template cannot be read, a sampling
    default is out of range or the token log cannot be had, `ModelError` when the tokenizer cannot be loaded.
    """
    config = boot.config
    name = config.model.served_model_name
    assert name is not None, "the supervisor names the model"
    metrics = Metrics(name)
    file = LogFile(log_path(config.server, boot.endpoints), config.server.token_log_sync)
    with (
        socket.socket(fileno=order.descriptors["listener"]) as listener,
        contextlib.closing(TokenLog(file, owner_of(boot))) as log,
    ):
        replicas = len(boot.plan.replicas)
        max_live = config.scheduler.max_num_seqs * replicas + config.scheduler.max_queued_seqs
        _raise_descriptor_limit(max_live)
        router = Router(
            boot.endpoints,
            log,
            metrics,
            max_live=max_live,
            num_replicas=replicas,
            per_replica=config.scheduler.max_num_seqs,
            epoch=order.epoch,
        )
        calls = Calls(log, router, config.server.resume_window)

        async def tell(message: Replace) -> None:
            await control.send(encode(message))

        checks = WeightChecks(router, metrics, tell, shared=boot.plan.shard_weights)
        service = Service(router, calls, metrics, config, tell, checks)
        server = _Server(
            uvicorn.Config(
                build_app(service),
                lifespan="off",
                log_config=None,
                log_level="error",  # its warnings are one line per malformed request, before any key is checked
                access_log=False,
                http=_BoundedHeads,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )
        tasks = [
            asyncio.create_task(server.serve([listener])),
            asyncio.create_task(router.run()),
            asyncio.create_task(_announce(boot, name, service, control)),
            asyncio.create_task(calls.sweep()),
            asyncio.create_task(_beat(control)),
            asyncio.create_task(checks.run(config.server.check_weights_interval)),
            asyncio.create_task(_obey(control, service)),
        ]
        try:
            await _until_told(tasks)
        finally:
            router.end_all("the service was stopped")
            server.should_exit = True
            await tasks[0]
            for task in tasks[1:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            calls.close()
            router.close()


async def _beat(control: zmq.asyncio.Socket) -> None:
    """Give a sign of life, for ever."""
    while True:
        await control.send(encode(Beat()))
        await asyncio.sleep(BEAT_SECONDS)


async def _until_told(tasks: list[asyncio.Task[None]]) -> None:
    """Until `_obey` returns; what any other task raises is raised."""
    pending, obey = set(tasks), tasks[-1]
    while obey in pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _obey(control: zmq.asyncio.Socket, service: Service) -> None:
    """Do as the supervisor says; return when it is time to leave. A later `Drain` replaces an earlier one."""
    decode, router = decoder(ToChild).decode, service.router
    draining: asyncio.Task[None] | None = None
    receiving = asyncio.ensure_future(control.recv())
    try:
        while True:
            waiting = {receiving} | ({draining} if draining else set())
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if draining is not None and draining.done():
                return draining.result()
            match decode(receiving.result()):
                case Stop():
                    return None
                case NodeJoined(_, replicas):
                    router.greet(replicas)
                case Replaces(reason, loss):
                    router.stands_in(reason, loss)
                case ReplicaLost() as lost:
                    router.replica_lost(lost)
                case Drain(deadline):
                    if draining is not None:
                        draining.cancel()
                    draining = asyncio.create_task(router.drain(deadline))
                case message:
                    _learn(service, message)
            receiving = asyncio.ensure_future(control.recv())
    finally:
        receiving.cancel()
        if draining is not None:
            draining.cancel()


def _learn(service: Service, news: object) -> None:
    """What is told of the store and of spare workers."""
    match news:
        case Spares(ready):
            service.router.incidents.spare_workers = ready
        case StoreLost(reason, loss):
            service.router.incidents.begin("store", reason, loss, "none")
        case CopiesKept() as copies:
            service.metrics.copies(copies)
        case Machines(machines):
            service.router.incidents.machines = machines
            service.metrics.machines.set(sum(machine.status == "ready" for machine in machines))
        case StoreBack():
            service.router.incidents.came_back("store")
        case DiskTier() as state:
            service.disk = state
            service.metrics.disk_tier(state)


async def _announce(boot: Boot, name: str, service: Service, control: zmq.asyncio.Socket) -> None:
    """Load the tokenizer while the engine loads the model; when both are there, take up what an earlier gateway left,
    and tell the supervisor."""
    config = boot.config.model
    defaults = boot.model.sampling_defaults
    check_sampling_defaults(defaults, overrides=config.sampling_overrides(), folder=boot.model.path)
    tokenizer, template = await asyncio.to_thread(_load_text, boot)
    max_model_len = await service.router.wait_ready()
    model = ServedModel(
        name=name,
        tokenizer=tokenizer,
        chat_template=template,
        max_model_len=max_model_len,
        vocab_size=boot.model.spec.vocab_size,
        sampling_defaults=defaults,
        max_logprobs=config.max_logprobs,
        max_sequences=service.router.max_live,
        seeds=random.Random(config.seed),
        created=int(time.time()),
    )
    await service.calls.resume(model)
    service.model = model
    await control.send(encode(Ready()))


def log_path(config: ServerConfig, endpoints: Endpoints) -> Path:
    """Where the token log lies: where the user wants it, or where it goes with the service."""
    return Path(config.token_log_dir or endpoints.folder) / "tokens.log"


def owner_of(boot: Boot) -> str:
    """Whose tokens a log holds: the checkpoint, and what else they depend on."""
    model, device = boot.config.model, boot.config.device
    matters = (
        boot.stamp,
        model.dtype,
        model.quantized_activations,
        device.device,
        device.exactness,
        device.attention_backend,
    )
    return f"{boot.model.path}, {hashlib.blake2b(repr(matters).encode(), digest_size=8).hexdigest()}"


def _raise_descriptor_limit(max_live: int) -> None:
    """A live request takes a socket; many systems start processes with room for 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < max_live + 64:
        logger.warning("only %d files may be open (ulimit -n), fewer than --max-num-seqs + --max-queued-seqs", hard)


def _load_text(boot: Boot) -> tuple[Tokenizer, ChatTemplate]:
    config = boot.config.model
    tokenizer = load_tokenizer(config.tokenizer or boot.model.path)
    source = template_source(config.chat_template, tokenizer.chat_template)
    return tokenizer, ChatTemplate(source, tokenizer.special_tokens)
