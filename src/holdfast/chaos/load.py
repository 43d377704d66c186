"""Requests of all kinds, asked over and over while things die; every reply is held against an undisturbed one."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import httpx
import msgspec

Body = dict[str, Any]
Choices = dict[int, dict[str, Any]]
"""By index: text, tokens and logprobs of a reply's choices, and why each ended; streamed or not, the same."""

_KINDS: tuple[Body, ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "logprobs": 1},
    {"temperature": 1.0, "top_p": 0.8, "n": 2},
    {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.9, "top_k": 40, "stop": []},
    {"temperature": 0, "logprobs": 0, "ignore_eos": True},
)
_AT_THE_DOOR = {"recovering", "starting", "queue_full"}
"""Codes of refusals; any other 503 is the end of a request that was accepted."""
SENTENCE = "The harbour lay quiet that morning, and the boats came in one by one. "


def bodies(model: str, count: int, max_tokens: int, seed: int) -> list[Body]:
    """Short and long prompts; some share their beginning; every second one is streamed. In four rounds each kind is
    of each length, streamed and not. Where there is a list of stop strings, it wants some that occur."""
    return [
        {
            "model": model,
            "prompt": SENTENCE * (1 + 5 * ((index + index // len(_KINDS)) % 3)) + f"Number {index} of them",
            "max_tokens": max_tokens,
            "seed": seed * 10_000 + index,
            "stream": (index + index // len(_KINDS)) % 2 == 1,
            **_KINDS[index % len(_KINDS)],
        }
        for index in range(count)
    ]


def with_stops(asked: list[Body], calm: list[Choices]) -> list[Body]:
    """The same, where each that wants stop strings has one from the middle of its undisturbed reply, and one that
    does not occur."""
    found = []
    for body, choices in zip(asked, calm, strict=True):
        text = choices[0]["text"]
        middle = len(text) // 2
        found.append(body | {"stop": [text[middle : middle + 3] or "zq", "zqzq"]} if "stop" in body else body)
    return found


class Unknown(Exception):
    """The service does not know the request."""


class Refused(Exception):
    """Not accepted: the service is recovering, or full."""


class Unheard(Exception):
    """The connection broke before anything came, and the service does not know the request: it was not accepted."""


class Visit:
    """One request to its end, however many connections that takes."""

    def __init__(self, client: httpx.AsyncClient, body: Body) -> None:
        self.num_returns = 0
        """Connections that broke, for which it came back."""
        self.is_accepted = False
        """Known of a streamed request only."""
        self._client = client
        self._id = uuid.uuid4().hex
        self._streams = body["stream"]
        self.body = body | {"request_id": self._id}
        """As it is sent."""
        if self._streams:
            self.body["stream_options"] = {"resumable": True}
        self._choices: Choices = {}
        self._last_id: str | None = None

    async def reply(self) -> Choices:
        """Raises `Refused` or `Unheard`, or `httpx.HTTPError` or `ValueError` when the request was lost."""
        try:
            return await self._over("POST", "/v1/completions", json=self.body)
        except httpx.TransportError:
            self.num_returns += 1
        return await self.rest()

    async def rest(self) -> Choices:
        """The same, of a request that was sent before."""
        while True:
            try:
                return await self._come_back()
            except (Refused, httpx.ConnectError):  # nobody is there yet
                await asyncio.sleep(0.05)
            except httpx.TransportError:
                self.num_returns += 1

    async def _come_back(self) -> Choices:
        path = f"/v1/requests/cmpl-{self._id}"
        try:
            if not self._streams:
                return await self._over("GET", path)
            headers = {} if self._last_id is None else {"Last-Event-ID": self._last_id}
            return await self._over("GET", f"{path}/stream", headers=headers)
        except Unknown as error:
            if self.is_accepted:
                raise ValueError(f"a request that was accepted is not known any more: {error}") from error
            raise Unheard from error

    async def _over(self, method: str, path: str, **more: Any) -> Choices:
        """All that comes over one connection, added to what came before."""
        if not self._streams:
            reply = await self._client.request(method, path, **more)
            _check(reply.status_code, reply.text)
            return {choice["index"]: _part(choice) for choice in reply.json()["choices"]}
        async with self._client.stream(method, path, **more) as reply:
            if reply.status_code != 200:
                _check(reply.status_code, (await reply.aread()).decode())
            self.is_accepted = True
            coming = None
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return self._choices
                if line.startswith("id: "):
                    coming = line[4:]
                elif line.startswith("data: "):
                    event = msgspec.json.decode(line[6:])
                    if "error" in event:
                        raise ValueError(event["error"]["message"])
                    for choice in event["choices"]:
                        _extend(self._choices, choice)
                    self._last_id = coming or self._last_id
        raise ValueError("the stream ended without [DONE]")


def _check(status: int, text: str) -> None:
    if status in {429, 503} and _code_of(text) in _AT_THE_DOOR:
        raise Refused(text)
    if status == 404 and _code_of(text) == "request_not_found":
        raise Unknown(text)
    if status != 200:
        raise ValueError(f"HTTP {status}: {text}")


def _code_of(text: str) -> object:
    """Of an error in OpenAI's shape."""
    try:
        return msgspec.json.decode(text)["error"]["code"]
    except (msgspec.DecodeError, LookupError, TypeError):
        return None


def _part(choice: dict[str, Any]) -> dict[str, Any]:
    logprobs = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
    return {
        "text": choice["text"],
        "tokens": logprobs["tokens"],
        "logprobs": logprobs["token_logprobs"],
        "finish_reason": choice["finish_reason"],
    }


def _extend(choices: Choices, choice: dict[str, Any]) -> None:
    part, so_far = _part(choice), choices.get(choice["index"])
    if so_far is None:
        choices[choice["index"]] = part
        return
    for name in ("text", "tokens", "logprobs"):
        so_far[name] += part[name]
    so_far["finish_reason"] = part["finish_reason"] or so_far["finish_reason"]


@dataclass(slots=True)
class Wrong:
    """A request that did not end as it would have undisturbed."""

    index: int
    """Of `Load.asked`; what `phases` asks comes after those."""
    began: float
    """Seconds since 1970."""
    what: str
    lost: int = 0
    """Characters that are missing from the reply; all of it, if the request is lost."""
    duplicated: int = 0
    """That are in it once more, or should not be there."""
    changed: int = 0


@dataclass(slots=True)
class Load:
    """`streams` requests at a time, until `over` is set."""

    client: httpx.AsyncClient
    asked: list[Body]
    expected: list[Choices]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    num_done: int = 0
    num_refused: int = 0
    num_unheard: int = 0
    num_returns: int = 0
    wrong: list[Wrong] = field(default_factory=list)
    tokens_at: list[tuple[float, int]] = field(default_factory=list)
    """When each request ended, and how many characters it had: for the timeline."""

    async def run(self, streams: int) -> None:
        await asyncio.gather(*[self._stream(first, streams) for first in range(streams)])

    async def _stream(self, index: int, step: int) -> None:
        while not self.over.is_set():
            await self._once(index % len(self.asked))
            index += step

    async def _once(self, index: int) -> None:
        visit = Visit(self.client, self.asked[index])
        try:
            await self.compare(index, visit.reply(), self.expected[index])
        except (Refused, Unheard) as error:
            self.num_refused += isinstance(error, Refused)
            self.num_unheard += isinstance(error, Unheard)
            await asyncio.sleep(0.05)
        finally:
            self.num_returns += visit.num_returns

    async def compare(self, index: int, reply: Awaitable[Choices], expected: Choices) -> None:
        """Wait for the reply to a request, and hold it against an undisturbed one. Raises `Refused` or `Unheard`."""
        began = time.time()
        try:
            found = await reply
        except (httpx.HTTPError, ValueError) as error:
            lost = sum(len(choice["text"]) for choice in expected.values())
            self.wrong.append(Wrong(index, began, f"lost: {type(error).__name__}: {error}", lost))
            return
        self.num_done += 1
        self.tokens_at.append((time.time(), sum(len(choice["text"]) for choice in found.values())))
        if found != expected:
            what = f"changed: {expected} became {found}"
            self.wrong.append(Wrong(index, began, what, *differences(expected, found)))


def differences(expected: Choices, found: Choices) -> tuple[int, int, int]:
    """Characters of the text that were lost, that are there once too often, and that are others."""
    lost = duplicated = changed = 0
    for index, choice in expected.items():
        text = found[index]["text"] if index in found else ""
        for what, *ends in SequenceMatcher(None, choice["text"], text, autojunk=False).get_opcodes():
            there, here = ends[1] - ends[0], ends[3] - ends[2]
            lost += there if what == "delete" else 0
            duplicated += here if what == "insert" else 0
            changed += max(there, here) if what == "replace" else 0
    return lost, duplicated, changed
