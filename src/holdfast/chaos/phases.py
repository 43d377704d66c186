"""The moments at which faults strike. At each but `any` a process of the service is held at a point of its code
(`core.points`), so it is that moment for certain, and lasts until the fault has struck. What makes it come:

queued      a request of more choices than may run at once
chunk, checkpoint
            long prompts that nobody asked before
restore, recovery, loading
            a worker was killed, of the replica that has most to do
reshape     the same, by the loss of its device for good: the replica is cut anew without it, and a worker of it loads
drain       the replica that has most to do is started anew, as by `holdfast drain`, and a worker of it loads
prefill, decode, sampled, logged
            the load
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import httpx
import psutil

from holdfast.chaos.config import POINTS
from holdfast.chaos.faults import PATIENCE, Fault, aim, strike
from holdfast.chaos.load import SENTENCE, Body, Choices, Load, Refused, Unheard, Visit
from holdfast.chaos.service import Held, Service
from holdfast.core.config import SchedulerConfig
from holdfast.core.errors import ConfigError, StartupError

_POLL_SECONDS = 0.005
_LOOK_SECONDS = 0.1
_AGAIN_SECONDS = 5.0
_LONGEST_PROMPT = 6000
"""Tokens: of a long prompt, if the service takes so many."""
_PROBE_TOKENS = 16
NEEDS_ALL = ("restore", "recovery", "loading", "reshape", "drain")
"""Moments that come of a loss: of one when nothing else is lost."""
_RESHAPES = "it goes on with the "
"""In what the supervisor says of a replica that is cut anew."""


@dataclass(frozen=True, slots=True)
class Moment:
    """It is now. `before`: the faults that it takes. `held`: who is held; None at any moment."""

    before: list[Fault] = field(default_factory=list)
    held: Held | None = None
    is_it: Callable[[], bool] = lambda: True
    """Whether it is what was asked for."""

    @property
    def role(self) -> str:
        """Of who is held."""
        return "" if self.held is None else self.held.name.partition(" ")[0]

    @property
    def is_now(self) -> bool:
        return self.is_it() and (self.held is None or self.held.is_held)


@dataclass(slots=True)
class Moments:
    """Waits for them, while `load` is under way."""

    service: Service
    client: httpx.AsyncClient
    load: Load
    dice: random.Random
    probes: list[tuple[Body, asyncio.Task[Choices]]] = field(default_factory=list)
    """What was asked beside the load; the replies are still to be held against undisturbed ones."""
    _long_prompt: str | None = None
    _long_tokens: int = 0

    async def wait(self, phase: str) -> Moment:
        """Raises `StartupError` when it does not come, `ConfigError` when it cannot."""
        if phase == "any":
            await asyncio.sleep(self.dice.uniform(0.0, 1.0))  # anywhere in the load
            return Moment()
        try:
            async with asyncio.timeout(PATIENCE):
                match phase:
                    case "queued" | "chunk" | "checkpoint":
                        return await self._asked_for(phase)
                    case "restore" | "recovery" | "loading":
                        return await self._after(phase, "kill-worker")
                    case "reshape":
                        begin = self.service.said_bytes
                        moment = await self._after("loading", "gone-worker")
                        return Moment(moment.before, moment.held, lambda: _RESHAPES in self.service.said(begin))
                    case "drain":
                        return await self._drained()
                    case _:
                        return Moment(held=await self._held(phase))
        except TimeoutError as error:
            raise StartupError(
                f"--phase {phase} did not come in {PATIENCE:g} s:\n{self.service.said()[-3000:]}"
            ) from error
        finally:
            self.service.hold_nobody()

    async def _held(self, point: str) -> Held:
        """The first process that comes to the point, and is held there."""
        role = self.dice.choice(POINTS[point])
        self.service.hold(role, point)
        while True:
            try:
                held = self.service.held()
                while held is not None:
                    if held.process.status() == psutil.STATUS_STOPPED:
                        return held
                    await asyncio.sleep(0)  # it is about to be
            except psutil.NoSuchProcess:
                self.service.hold(role, point)
            await asyncio.sleep(_POLL_SECONDS)

    async def _asked_for(self, point: str) -> Moment:
        """The load alone may never come to it."""
        holding = asyncio.create_task(self._held(point))
        try:
            while not holding.done():
                reply = self._ask(await self._body_of(point))
                await asyncio.wait([holding, reply], return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(_POLL_SECONDS)  # it may have been refused
            return Moment(held=holding.result())
        finally:
            holding.cancel()

    def _ask(self, body: Body) -> asyncio.Task[Choices]:
        """Its reply is compared in the end; one that is refused was not asked."""
        visit = Visit(self.client, body)
        reply = asyncio.create_task(visit.reply())
        self.probes.append((body, reply))

        def settle(done: asyncio.Task[Choices]) -> None:
            if not done.cancelled() and isinstance(done.exception(), Refused | Unheard):
                self.probes.remove((body, done))

        reply.add_done_callback(settle)
        return reply

    async def _body_of(self, point: str) -> Body:
        shared = {"model": self.load.asked[0]["model"], "max_tokens": _PROBE_TOKENS, "stream": True}
        if point == "queued":
            most = self.service.number("--max-num-seqs", SchedulerConfig().max_num_seqs)
            return shared | {"prompt": SENTENCE, "n": most + 4, "temperature": 0.8, "seed": len(self.probes)}
        if self._long_prompt is None:
            self._long_prompt, self._long_tokens = await self._make_long_prompt(shared["model"])
        budget = self.service.number("--max-num-batched-tokens", SchedulerConfig().max_num_batched_tokens)
        if point == "chunk" and self._long_tokens <= budget:
            raise ConfigError(
                f"--phase chunk: a prompt of {self._long_tokens} tokens is read in one step; "
                f"--max-num-batched-tokens {budget} must be less"
            )
        return shared | {"prompt": f"Log {len(self.probes)}. {self._long_prompt}", "temperature": 0}

    async def _make_long_prompt(self, model: str) -> tuple[str, int]:
        """Three quarters of what a request may hold; tokens."""
        reply = (await self.client.post("/tokenize", json={"model": model, "prompt": SENTENCE * 8})).json()
        most = min(reply["max_model_len"] * 3 // 4, _LONGEST_PROMPT)
        repeats = max(1, int(most / (reply["count"] / 8)))
        return SENTENCE * repeats, repeats * reply["count"] // 8

    async def _after(self, point: str, kind: str) -> Moment:
        """Something happened to a worker of the replica that has most to do, as often as it takes."""
        before: list[Fault] = []
        holding = asyncio.create_task(self._held(point))
        try:
            while True:
                if not before or await self._is_over(before[-1]):
                    number = await self._busiest(least_ranks=1 + (kind == "gone-worker"))
                    aimed = await aim(self.service, kind, self.dice, where=f" {number}.")
                    before.append(strike(self.service, aimed, self.dice))
                await asyncio.wait([holding], timeout=_LOOK_SECONDS)
                if not holding.done():
                    continue
                await self._is_over(before[-1])  # a gateway that is struck takes with it what it knows
                if not holding.result().is_held:  # it came to the point before, and went with the one that was struck
                    holding = asyncio.create_task(self._held(point))
                elif before[-1].was_noticed:
                    return Moment(before, holding.result())
        finally:
            holding.cancel()

    async def _is_over(self, fault: Fault) -> bool:
        """Whether all that it hit has gone on for a while, so that what is waited for will not come of it."""
        fault.learn((await self.client.get("/cluster")).json()["incidents"])
        return fault.was_late or any(
            incident["back"] is not None and time.time() - incident["back"] > _AGAIN_SECONDS
            for incident in fault.incidents
        )

    async def _drained(self) -> Moment:
        holding = asyncio.create_task(self._held("loading"))
        try:
            while not holding.done():
                await self._restart(await self._busiest())
                await asyncio.wait([holding], timeout=_AGAIN_SECONDS)
            return Moment(held=holding.result())
        finally:
            holding.cancel()

    async def _restart(self, number: int) -> None:
        """Unless it cannot be just now: whoever waits for what comes of it looks anew."""
        with contextlib.suppress(httpx.TransportError):
            reply = await self.client.post(f"/cluster/replicas/{number}/restart")
            if reply.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                reply.raise_for_status()

    async def _busiest(self, least_ranks: int = 1) -> int:
        """Number of the replica that has most to do, and so many ranks; if all have fewer, one is made whole."""
        while True:
            replicas = (await self.client.get("/cluster")).json()["replicas"]
            large = [replica for replica in replicas if (replica["ranks"] or 0) >= least_ranks]
            if not large and all(replica["status"] == "ready" for replica in replicas):
                await self._restart(0)
            busiest = max(large, key=lambda replica: replica["requests"], default=None)
            if busiest is not None and busiest["requests"]:
                number: int = busiest["replica"]
                return number
            await asyncio.sleep(_POLL_SECONDS)
