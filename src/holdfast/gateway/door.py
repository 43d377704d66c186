"""What happens to a request before its route: who sent it, is the service there, how large is it.

Pure ASGI, no framework in the way of a stream.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.core.errors import BodyTooLarge, RequestError, Unauthorized, Unavailable
from holdfast.gateway.replies import error_body, to_json

REQUEST_ID = "x-request-id"
_LONGEST_REQUEST_ID = 200

Result = TypeVar("Result")


class Door:
    """Gives every request an id and a time of arrival, checks the API key (but for /health), refuses while the
    service cannot serve (but for what operators watch it by), and counts the body's bytes as they come."""

    def __init__(
        self, app: ASGIApp, *, api_keys: tuple[str, ...], max_body_bytes: int, status: Callable[[], str]
    ) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get(REQUEST_ID, "")
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= _LONGEST_REQUEST_ID):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrived=time.monotonic())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            self._check(scope["path"], headers)
        except RequestError as error:
            await error_response(error)(scope, receive, send_with_id)
            return
        await self._app(scope, self._counted(receive), send_with_id)

    def _check(self, path: str, headers: Headers) -> None:
        if path == "/health":
            return
        self._check_key(headers)
        status = self._status()
        held = path.startswith("/v1/requests/") and status in {"recovering", "draining"}
        if not held and path not in ("/version", "/metrics", "/cluster") and status != "ready":
            raise Unavailable(f"the service is {status}", code=status, retry_after=1)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _check_key(self, headers: Headers) -> None:
        if not self._api_keys:
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(sent.encode(), key) for key in self._api_keys]  # all: no early way out
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized(
                "the API key is missing or wrong: send `Authorization: Bearer KEY`", code="invalid_api_key"
            )

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body_bytes:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self._max_body_bytes} bytes (--max-body-bytes)", code="body_too_large"
        )


def error_response(error: Exception) -> Response:
    """An error as the API shows it: its status, OpenAI's error object, and Retry-After where it has one."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestError) and error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    status = error.status if isinstance(error, RequestError) else 500
    return Response(to_json(error_body(error)), status, headers, "application/json")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`, or None if the client left first, which cancels it. The body has been read."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
