"""The gateway's process: listens at once, answers once the model can, leaves when told to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import resource
import socket
import time
from collections.abc import Generator

import uvicorn
import zmq.asyncio
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from holdfast.core.config import ServerConfig
from holdfast.core.errors import ConfigError
from holdfast.core.wire import Boot, Drain, Ready, ReplicaLost, Stop, ToChild, decoder, encode
from holdfast.gateway.app import Service, build_app
from holdfast.gateway.chat import ChatTemplate, template_source
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


async def run(boot: Boot, control: zmq.asyncio.Socket) -> None:
    """Serve HTTP until the supervisor says `Stop`, or a `Drain` is done.

    `control` is connected to the supervisor. Raises `ConfigError` when the port cannot be bound, the chat template
    cannot be read or a sampling default is out of range, `ModelError` when the tokenizer cannot be loaded.
    """
    config = boot.config
    name = config.model.served_model_name
    assert name is not None, "the supervisor names the model"
    metrics = Metrics(name)
    with contextlib.closing(_listen(config.server)) as listener:
        replicas = len(boot.plan.replicas)
        max_live = config.scheduler.max_num_seqs * replicas + config.scheduler.max_queued_seqs
        _raise_descriptor_limit(max_live)
        router = Router(
            boot.endpoints,
            TokenLog(),
            metrics,
            max_live=max_live,
            num_replicas=replicas,
            per_replica=config.scheduler.max_num_seqs,
        )
        service = Service(router, metrics, config)
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
            asyncio.create_task(_announce(boot, name, service, control, _url(config.server, listener))),
            asyncio.create_task(_obey(control, router)),
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
            router.close()


async def _until_told(tasks: list[asyncio.Task[None]]) -> None:
    """Until `_obey` returns; what any other task raises is raised."""
    pending, obey = set(tasks), tasks[-1]
    while obey in pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _obey(control: zmq.asyncio.Socket, router: Router) -> None:
    """Do as the supervisor says; return when it is time to leave. A later `Drain` replaces an earlier one."""
    decode = decoder(ToChild).decode
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
                case ReplicaLost(replica, reason, epoch, comes_back, loss):
                    router.replica_lost(replica, reason, epoch=epoch, comes_back=comes_back, loss=loss)
                case Drain(deadline):
                    if draining is not None:
                        draining.cancel()
                    draining = asyncio.create_task(router.drain(deadline))
            receiving = asyncio.ensure_future(control.recv())
    finally:
        receiving.cancel()
        if draining is not None:
            draining.cancel()


async def _announce(boot: Boot, name: str, service: Service, control: zmq.asyncio.Socket, url: str) -> None:
    """Load the tokenizer while the engine loads the model; when both are there, tell the supervisor."""
    config = boot.config.model
    defaults = boot.model.sampling_defaults
    check_sampling_defaults(defaults, overrides=config.sampling_overrides(), folder=boot.model.path)
    tokenizer, template = await asyncio.to_thread(_load_text, boot)
    max_model_len = await service.router.wait_ready()
    service.model = ServedModel(
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
    await control.send(encode(Ready(url)))


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


def _listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises `ConfigError` when the address is unknown or the port is taken."""
    is_v6 = ":" in config.host
    family, both = (socket.AF_INET6, socket.has_dualstack_ipv6()) if is_v6 else (socket.AF_INET, False)
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"--host {config.host} --port {config.port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _url(config: ServerConfig, listener: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{listener.getsockname()[1]}"
