"""Requests of all kinds, asked over and over while things die; every reply is held against an undisturbed one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
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
    {"temperature": 0.9, "top_k": 40, "stop": [" of", "zq"]},
    {"temperature": 0, "logprobs": 0, "ignore_eos": True},
)
_AT_THE_DOOR = {"recovering", "starting", "queue_full"}
"""Codes of refusals; any other 503 is the end of a request that was accepted."""
_SENTENCE = "The harbour lay quiet that morning, and the boats came in one by one. "


def bodies(model: str, count: int, max_tokens: int, seed: int) -> list[Body]:
    """Short and long prompts; some share their beginning; every second one is streamed."""
    return [
        {
            "model": model,
            "prompt": _SENTENCE * (1 + 5 * (index % 3)) + f"Number {index} of them",
            "max_tokens": max_tokens,
            "seed": seed * 10_000 + index,
            "stream": index % 2 == 1,
            **_KINDS[index % len(_KINDS)],
        }
        for index in range(count)
    ]


class Refused(Exception):
    """Not accepted: the service is recovering, or full."""


async def ask(client: httpx.AsyncClient, body: Body) -> Choices:
    """One request to its end. Raises `Refused`, or `httpx.HTTPError` or `ValueError` when it was lost."""
    if not body["stream"]:
        reply = await client.post("/v1/completions", json=body)
        _check(reply.status_code, reply.text)
        return {choice["index"]: _part(choice) for choice in reply.json()["choices"]}
    choices: Choices = {}
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            _check(reply.status_code, (await reply.aread()).decode())
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return choices
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            for choice in event["choices"]:
                _extend(choices, choice)
    raise ValueError("the stream ended without [DONE]")


def _check(status: int, text: str) -> None:
    if status in {429, 503} and _code_of(text) in _AT_THE_DOOR:
        raise Refused(text)
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
    began: float
    """Seconds since 1970."""
    what: str


@dataclass(slots=True)
class Load:
    """`streams` requests at a time, until `over` is set."""

    client: httpx.AsyncClient
    asked: list[Body]
    expected: list[Choices]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    num_done: int = 0
    num_refused: int = 0
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
        began = time.time()
        try:
            found = await ask(self.client, self.asked[index])
        except Refused:
            self.num_refused += 1
            await asyncio.sleep(0.05)
            return
        except (httpx.HTTPError, ValueError) as error:
            self.wrong.append(Wrong(index, began, f"lost: {type(error).__name__}: {error}"))
            return
        self.num_done += 1
        self.tokens_at.append((time.time(), sum(len(choice["text"]) for choice in found.values())))
        if found != self.expected[index]:
            self.wrong.append(Wrong(index, began, f"changed: {self.expected[index]} became {found}"))
