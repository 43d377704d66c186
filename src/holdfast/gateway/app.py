"""The HTTP application: OpenAI's routes, and those that operators need."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from holdfast import __version__
from holdfast.core.config import ServeConfig
from holdfast.core.errors import HoldfastError, InvalidRequest, MachineError, NotFound, Unavailable
from holdfast.core.lifecycle import DiskTier, Replace
from holdfast.gateway import schema
from holdfast.gateway.calls import Call, Calls
from holdfast.gateway.checks import WeightChecks
from holdfast.gateway.door import Door, error_response, unless_disconnected
from holdfast.gateway.generation import Generation, Piece, positions
from holdfast.gateway.metrics import CONTENT_TYPE, Metrics
from holdfast.gateway.openai import Job, ServedModel, chat_job, chat_prompt, completion_job, encode_prompts, off_loop
from holdfast.gateway.protocol import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse_body,
)
from holdfast.gateway.replies import DONE, ChatReply, CompletionReply, Reply, error_body, event, to_json
from holdfast.gateway.router import Router, Status
from holdfast.gateway.tokenlog import Endpoint

logger = logging.getLogger(__name__)

_CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection; nobody reads it."""


@dataclass(slots=True)
class Service:
    """What the routes work with. `model` is there once the tokenizer is loaded and the engine ready."""

    router: Router
    calls: Calls
    metrics: Metrics
    config: ServeConfig
    tell: Callable[[Replace], Awaitable[None]]
    """The supervisor."""
    checks: WeightChecks
    model: ServedModel | None = None
    disk: DiskTier | None = None
    """Of the checkpoint store, as it was last heard of."""

    @property
    def status(self) -> Status:
        status = self.router.status
        return "starting" if status in {"ready", "recovering"} and self.model is None else status

    @property
    def served(self) -> ServedModel:
        """The model; the door lets nobody pass before it is there."""
        if self.model is None:
            raise Unavailable("the service is starting", retry_after=1)
        return self.model


def build_app(service: Service) -> ASGIApp:
    """The ASGI application, door included."""
    app = FastAPI(title="Holdfast", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(HoldfastError, _show_error)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(ClientDisconnect, _nobody_reads)
    app.add_exception_handler(Exception, _show_error)  # raised again afterwards: uvicorn logs the traceback
    _add_operator_routes(app, service)
    _add_model_routes(app, service)
    _add_generation_routes(app, service)
    schema.install(app)
    server = service.config.server
    return Door(app, api_keys=server.api_key, max_body_bytes=server.max_body_bytes, status=lambda: service.status)


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=schema.health_responses())
    async def health() -> Response:
        """The truth about the service: 200 when it can take requests."""
        status = service.status
        body: dict[str, Any] = {"status": status, "requests": service.router.num_live}
        if service.calls.log_failure is not None:
            body["token_log"] = service.calls.log_failure
        if service.disk is not None and service.disk.failure is not None:
            body["checkpoint_disk"] = service.disk.failure
        return _json(body, 200 if status == "ready" else 503, None if status == "ready" else {"Retry-After": "1"})

    @app.get("/cluster", responses=schema.responses(schema.Cluster, statuses=(401, 405, 500)))
    async def cluster() -> Response:
        """Replicas, and what was lost so far: which ranks, how many requests it hit, and when they went on."""
        router = service.router
        incidents = [msgspec.to_builtins(incident) for incident in router.incidents]
        return _json(
            {
                "status": service.status,
                "replicas": router.replicas(),
                "machines": [msgspec.to_builtins(machine) for machine in router.incidents.machines],
                "spare_workers": router.incidents.spare_workers,
                "incidents": incidents,
            }
        )

    @app.post("/cluster/replicas/{number}/restart", responses=schema.responses(schema.Replica))
    async def restart(number: str) -> Response:
        """Start a replica anew while the service goes on: its requests go on in others, or wait for it."""
        replica = next((each for each in service.router.replicas() if str(each["replica"]) == number), None)
        if replica is None:
            raise NotFound(f"there is no replica {number}", code="replica_not_found")
        if replica["status"] != "ready":
            raise Unavailable(f"replica {number} is {replica['status']}", retry_after=1)
        await service.tell(Replace(int(number), "an operator wants it"))
        return _json(replica)

    @app.post("/cluster/check", responses=schema.responses(schema.WeightsChecked, statuses=(400, 401, 405, 500, 503)))
    async def check() -> Response:
        """Compare the weights that every rank has in memory with what was loaded, while the service goes on. A
        replica whose weights have changed is started anew."""
        reports, lost = await service.checks.check()
        ranks = [
            {"rank": each.rank, "bytes": each.num_bytes, "seconds": each.seconds, "wrong": each.wrong}
            for each in reports
        ]
        return _json({"ranks": ranks, "wrong": [each.rank for each in reports if each.wrong], "lost": lost})

    @app.get("/version", responses=schema.responses(schema.Version))
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/metrics", responses=schema.text_responses(CONTENT_TYPE))
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


def _add_model_routes(app: FastAPI, service: Service) -> None:
    def card(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "holdfast",
            "max_model_len": model.max_model_len,
        }

    @app.get("/v1/models", responses=schema.responses(schema.ModelList))
    async def models() -> Response:
        return _json({"object": "list", "data": [card(service.served)]})

    @app.get("/v1/models/{model_id:path}", responses=schema.responses(schema.ModelCard))
    async def model(model_id: str) -> Response:
        service.served.check_name(model_id)
        return _json(card(service.served))

    @app.post("/tokenize", **schema.body(TokenizeRequest, schema.Tokens))
    async def tokenize(request: Request) -> Response:
        body = await _read(request, TokenizeRequest)
        model = service.served
        model.check_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("one of `prompt` and `messages` is needed", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            [prompt] = await encode_prompts([body.prompt], model, add_special_tokens=special)
        else:
            prompt = await chat_prompt(body, body.messages or [], model)
        token_ids = prompt.token_ids
        reply: dict[str, Any] = {"count": len(token_ids), "max_model_len": model.max_model_len, "tokens": token_ids}
        if body.return_token_strs:
            reply["token_strs"] = [model.tokenizer.token_text(token_id) for token_id in token_ids]
        return _json(reply)

    @app.post("/detokenize", **schema.body(DetokenizeRequest, schema.Text))
    async def detokenize(request: Request) -> Response:
        body = await _read(request, DetokenizeRequest)
        model = service.served
        model.check_name(body.model)
        token_ids = body.tokens
        model.check_tokens(token_ids, "tokens")
        decode = partial(model.tokenizer.decode, token_ids, skip_special_tokens=False)
        return _json({"prompt": await off_loop(len(token_ids), decode)})


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", **schema.body(CompletionRequest, schema.Completion))
    async def completions(request: Request) -> Response:
        body = await _read(request, CompletionRequest)
        job = await completion_job(body, service.served, _request_id(request, body, CompletionReply))
        return await _accept(request, service, job, "completions")

    @app.post("/v1/chat/completions", **schema.body(ChatCompletionRequest, schema.ChatCompletion))
    async def chat_completions(request: Request) -> Response:
        body = await _read(request, ChatCompletionRequest)
        job = await chat_job(body, service.served, _request_id(request, body, ChatReply))
        return await _accept(request, service, job, "chat/completions")

    @app.get("/v1/requests/{request_id:path}/stream", **schema.stream())
    async def rest_of(request: Request, request_id: str, after: str | None = None) -> Response:
        """The events of a request after that with the id `after` (or Last-Event-ID); all of them without one."""
        call = service.calls.find(request_id)
        asked = request.headers.get("last-event-id") if after is None else after
        return EventStream(service, call, _positions(asked) if asked else None, with_ids=True)

    @app.get("/v1/requests/{request_id:path}", responses=schema.responses(schema.AnyReply))
    async def reply_of(request: Request, request_id: str) -> Response:
        """The whole reply of a request that was accepted before, once it is there."""
        return await _answer(request, service, service.calls.find(request_id))


async def _accept(request: Request, service: Service, job: Job, endpoint: Endpoint) -> Response:
    """Submit the job; the whole reply, or the stream of it."""
    body, arrived = await request.body(), request.state.arrived
    call = service.calls.accept(job, endpoint, body, int(time.time()), arrived)
    if not job.request.stream:
        return await _answer(request, service, call)
    return EventStream(service, call, None, with_ids=bool(job.stream_options.resumable))


async def _answer(request: Request, service: Service, call: Call) -> Response:
    """The whole reply. Whatever happens, the engine is left clean."""
    calls, model = service.calls, service.served
    generation = calls.read(call, model.tokenizer)
    try:
        body = await unless_disconnected(request.receive, _collect(generation, calls.reply(call, model)))
    finally:
        calls.leave(call, generation, model.tokenizer)
    return Response(status_code=_CLIENT_LEFT) if body is None else _json(body)


async def _collect(generation: Generation, reply: Reply) -> dict[str, Any]:
    whole = [Piece(choice.index) for choice in generation.choices]
    async for pieces in generation.pieces():
        for piece in pieces:
            whole[piece.index].extend(piece)
    return reply.whole(generation, whole)


class EventStream(Response):
    """Server-sent events of one call. An error after the start is an event of its own, and the last.

    The id of an event is the position that each choice has come to with it, see `tokenlog.LogEntry`.
    """

    def __init__(self, service: Service, call: Call, after: list[int] | None, *, with_ids: bool) -> None:
        """Raises `InvalidRequest` for positions `after` that there are not."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._calls, self._call, self._tokenizer = service.calls, call, service.served.tokenizer
        self._with_ids = with_ids
        self._told = after or [0] * len(call.entries)
        self._generation = service.calls.read(call, self._tokenizer, after)
        try:
            self._reply = service.calls.reply(call, service.served)
        except BaseException:
            self._calls.leave(call, self._generation, self._tokenizer)
            raise
        self._reply.skip({index for index, at in enumerate(self._told) if at})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(send))
        finally:
            self._calls.leave(self._call, self._generation, self._tokenizer)

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for events in self._events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        generation, reply = self._generation, self._reply
        try:
            async for pieces in generation.pieces():
                events = [each for piece in pieces for each in self._of_piece(piece)]
                if events:
                    yield b"".join(events)
        except HoldfastError as error:
            logger.warning("request %s: %s", generation.job.request_id, error)
            yield event(error_body(error))
            return
        yield (event(reply.usage_chunk(generation)) if generation.job.stream_options.include_usage else b"") + DONE

    def _of_piece(self, piece: Piece) -> list[bytes]:
        chunks = self._reply.chunks(self._generation, piece)
        if not self._with_ids:
            return list(map(event, chunks))
        at, ends = self._generation.choices[piece.index].num_tokens, piece.finish_reason is not None
        events = []
        for left, chunk in reversed(list(enumerate(reversed(chunks)))):
            if left <= ends:  # the last one, and, of two at the end, the one before
                self._told[piece.index] = at + (ends and not left)
                events.append(event(chunk, positions(self._told)))
            else:
                events.append(event(chunk))
        return events


def _positions(text: str) -> list[int]:
    """An event's id, parsed. Raises `InvalidRequest`."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise InvalidRequest(f"after {text[:50]!r}: must be the id of an event, as in 12 or 12,7", param="after")
    return list(map(int, parts))


async def _read(request: Request, kind: type[Body]) -> Body:
    """The body, validated. Raises `RequestError`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise InvalidRequest(f"Content-Type {content_type!r}: must be application/json")
    return parse_body(kind, await request.body())


def _request_id(request: Request, body: GenerationRequest, shape: type[Reply]) -> str:
    """What the reply is called: as the body asks, or after the X-Request-Id."""
    return shape.id_prefix + (body.request_id or request.state.request_id)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, "application/json")


async def _show_error(_: Request, error: Exception) -> Response:
    if isinstance(error, MachineError):
        logger.error("%s", error)
    return error_response(error)


async def _show_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = {"error": {"message": error.detail, "type": kind, "param": None, "code": None}}
    return _json(body, error.status_code, dict(error.headers or {}))


async def _nobody_reads(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)
