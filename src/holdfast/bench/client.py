"""The HTTP side: ask an OpenAI-compatible server what it serves, and stream requests from it.

httpx costs about 50 µs per chunk on a 2026 core (15 % of one at 32 streams of 100 chunks a second); every run
reports what the tool itself used.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import httpx
import msgspec

from holdfast.bench.config import TargetConfig
from holdfast.bench.measure import Outcome
from holdfast.bench.stream import NOT_JSON, StreamReader, error_text
from holdfast.core.errors import ConfigError

WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment
air teacher force education the and for are but not you all any can had her was one our out get has him his how its
may new now old see two who boy did let put say she too use about after again could every first found great large
learn never other plant point right small sound spell still study their there these thing think three water where
which world would write before between country different follow sentence through together without another because
""".split()  # noqa: SIM905 — a list of words reads as one
"""What prompts made of words consist of: common ones, a token each in most vocabularies."""


class Client:
    """One server. Use as `async with`; raises `ConfigError` where the server cannot be used at all."""

    def __init__(self, target: TargetConfig) -> None:
        self._base = target.base_url.rstrip("/")
        self._path = "/v1/chat/completions" if target.endpoint == "chat" else "/v1/completions"
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if target.api_key is not None:
            headers["Authorization"] = f"Bearer {target.api_key}"
        try:
            self._http = httpx.AsyncClient(
                base_url=self._base,
                headers=headers,
                timeout=target.request_timeout,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=False,  # a proxy in between would be measured too
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"--base-url {self._base}: {error}") from error

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The name of the first model the server has."""
        response = await self._ask("GET", "/v1/models")
        try:
            return str(msgspec.json.decode(response.content)["data"][0]["id"])
        except (*NOT_JSON, LookupError, TypeError) as error:
            raise ConfigError(
                f"--base-url {self._base}: GET /v1/models names no model (HTTP {response.status_code}: "
                f"{_error_of(response.content)}); give --model, or --api-key if the server wants one"
            ) from error

    async def token_pool(self, model: str) -> list[int]:
        """Ids of ordinary tokens of the model's vocabulary: those of common words, by the server's /tokenize."""
        text = " ".join(WORDS)
        for body in ({"model": model, "prompt": text, "add_special_tokens": False}, {"content": text}):
            response = await self._ask("POST", "/tokenize", body)
            try:
                tokens = msgspec.json.decode(response.content)["tokens"]
            except (*NOT_JSON, LookupError, TypeError):
                continue
            if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
                return sorted(set(tokens))
        raise ConfigError(
            f"--base-url {self._base}: this server has no /tokenize to ask for token ids; give --vocab-size, or "
            "--prompt-format text"
        )

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(f"--base-url {self._base}: no answer from there ({_reason(error)})") from error

    async def stream(self, body: bytes, outcome: Outcome, start: float) -> None:
        """Send one request and read its stream to the end; what becomes of it, errors too, goes into `outcome`.

        `start` is `time.perf_counter()` at the start of the run.
        """
        sent = time.perf_counter()
        outcome.started = sent - start
        reader = StreamReader(outcome, sent)
        try:
            async with self._http.stream("POST", self._path, content=body) as response:
                if response.status_code == 200:
                    async for data in response.aiter_bytes():
                        reader.feed(data, time.perf_counter())
                    reader.close()
                else:
                    outcome.error = f"HTTP {response.status_code}: {_error_of(await response.aread())}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            outcome.error = _reason(error)
        except NOT_JSON as error:
            outcome.error = f"not an event of an OpenAI stream: {error}"
        if not outcome.ok:
            outcome.e2el = time.perf_counter() - sent


def _error_of(content: bytes) -> str:
    try:
        return error_text(msgspec.json.decode(content))
    except NOT_JSON:
        return error_text(content.decode(errors="replace"))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
