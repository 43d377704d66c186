"""The moments at which faults strike. Each but `any` is known by what the service tells, however long that takes:

any        at once
prefill    a request with a long prompt that nobody asked before is accepted, and has not got a token
decode     a stream has told so many events, and goes on
loading    a worker was killed, and one that was started for it begins to load: it has got its name
recovery   a worker was killed, and the gateway has just sent its requests to other replicas, or to the new one

The worker that is killed first belongs to the replica that has most to do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import urlsplit

import httpx
import msgspec

from holdfast.chaos.faults import PATIENCE, Fault, aim, strike
from holdfast.chaos.load import SENTENCE, Body, Choices, Load, Visit
from holdfast.chaos.service import Service
from holdfast.core.errors import StartupError

_POLL_SECONDS = 0.005
AFTER_A_KILL = ("loading", "recovery")
"""Moments that a fault of their own comes before: who lives by then is not known yet."""
_LONGEST_PROMPT = 6000
"""Tokens: of a long prompt, if the service takes so many."""
_PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Moment:
    """It is now. `before`: the fault that it takes, if it does. `still`: whether it has not passed yet."""

    before: list[Fault] = field(default_factory=list)
    still: Callable[[], bool] = lambda: True


@dataclass(slots=True)
class Moments:
    """Waits for them, while `load` is under way."""

    service: Service
    client: httpx.AsyncClient
    load: Load
    dice: random.Random
    probes: list[tuple[Body, asyncio.Task[Choices]]] = field(default_factory=list)
    """Long prompts that were asked; their replies are still to be held against undisturbed ones."""
    _prompt_repeats: int | None = None
    """Of the sentence, in a long prompt."""

    async def wait(self, phase: str) -> Moment:
        """Raises `StartupError` when it does not come."""
        try:
            async with asyncio.timeout(PATIENCE):
                match phase:
                    case "prefill":
                        return await self._prefill()
                    case "decode":
                        await self.load.told(self.dice.randrange(1, 20))
                    case "loading":
                        return await self._loading()
                    case "recovery":
                        return await self._recovery()
                return Moment()
        except TimeoutError as error:
            raise StartupError(
                f"--phase {phase} did not come in {PATIENCE:g} s:\n{self.service.said()[-3000:]}"
            ) from error

    async def _prefill(self) -> Moment:
        if self._prompt_repeats is None:
            self._prompt_repeats = await _repeats(self.client, self.load.asked[0]["model"])
        body = {
            "model": self.load.asked[0]["model"],
            "prompt": f"Log {len(self.probes)}. " + SENTENCE * self._prompt_repeats,
            "max_tokens": _PROBE_TOKENS,
            "temperature": 0,
            "stream": True,
        }
        while True:
            visit = Visit(self.client, body)
            if (probe := ask(self.service.url, visit.body)) is not None:
                visit.is_accepted = True
                self.probes.append((body, asyncio.create_task(visit.rest())))
                return Moment(still=probe.leave)
            await asyncio.sleep(_POLL_SECONDS)

    async def _loading(self) -> Moment:
        begin, (first, replica) = self.service.said_bytes, await self._kill_worker()
        await self._told(first)  # then the one that was killed is gone
        while True:
            if first.victims[0] in self.service.processes():
                break
            await asyncio.sleep(_POLL_SECONDS)
        serves = f"replica {replica} serves again"
        return Moment([first], lambda: serves not in self.service.said(begin))

    async def _recovery(self) -> Moment:
        first, _ = await self._kill_worker()
        while True:
            await self._told(first)
            incident = first.incidents[0]
            if incident["rung"] != "restart" or incident["back"] is not None:
                return Moment([first], partial(bool, incident["resumed"] < incident["requests"]))
            await asyncio.sleep(_POLL_SECONDS)

    async def _kill_worker(self) -> tuple[Fault, int]:
        """Of the replica that has most to do. The fault, and the number of the replica."""
        while True:
            replicas = (await self.client.get("/cluster")).json()["replicas"]
            busiest = max(replicas, key=lambda replica: replica["requests"])
            if busiest["requests"]:
                break
            await asyncio.sleep(_POLL_SECONDS)
        number: int = busiest["replica"]
        aimed = await aim(self.service, "kill-worker", self.dice, pair_percent=0, where=f" {number}.")
        return strike(self.service, aimed, self.dice), number

    async def _told(self, fault: Fault) -> None:
        """Until the service tells of it."""
        while True:
            fault.learn((await self.client.get("/cluster")).json()["incidents"])
            if fault.incidents:
                return
            await asyncio.sleep(_POLL_SECONDS)


class Probe:
    """A streamed request that was just accepted; the client has not looked for tokens yet."""

    def __init__(self, connection: HTTPConnection, reply: HTTPResponse) -> None:
        self._connection = connection
        self._reply = reply

    def leave(self) -> bool:
        """Whether no token has come so far. The connection is closed: somebody else comes back for them."""
        assert self._connection.sock is not None, "it is to be read on"
        self._connection.sock.setblocking(False)
        nothing = not self._reply.fp.peek(1)
        self._connection.close()
        return nothing


def ask(url: str, body: Body) -> Probe | None:
    """None: it is refused now. The loop stands still until that is known, on purpose: with all the streams there are,
    one of its turns may be longer than a prompt is read."""
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
    try:
        connection.request("POST", "/v1/completions", msgspec.json.encode(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status == 200:
            return Probe(connection, reply)
        text = reply.read().decode(errors="replace")
    except (OSError, HTTPException):  # nobody is there
        connection.close()
        return None
    connection.close()
    if reply.status in {429, 503}:
        return None
    raise StartupError(f"a request was not taken: HTTP {reply.status}: {text}")


async def _repeats(client: httpx.AsyncClient, model: str) -> int:
    """How often the sentence fits into a long prompt: one that takes three quarters of what a request may hold."""
    reply = (await client.post("/tokenize", json={"model": model, "prompt": SENTENCE * 8})).json()
    most = min(reply["max_model_len"] * 3 // 4, _LONGEST_PROMPT)
    return max(1, int(most / (reply["count"] / 8)))
