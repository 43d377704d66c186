"""One fault: what is done to which processes, and what the service tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from holdfast.chaos.service import SUPERVISOR, Service
from holdfast.core.errors import StartupError

PATIENCE = 120.0
"""Seconds that getting over a fault may take."""
_SLOW_SECONDS = 2.0
_POLL_SECONDS = 0.02
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "spoil": signal.SIGKILL}


@dataclass(slots=True)
class Fault:
    """What was done to whom, and how it was got over. Times: seconds since 1970."""

    kind: str
    victims: list[str]
    at: float
    phase: str = "any"
    """The moment it was to hit."""
    in_phase: bool = True
    """Whether it was still that moment when it hit."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """As /cluster tells of them."""
    ended: float | None = None
    """Where the supervisor was killed: when no process of the service was left."""
    whole_again: float | None = None
    """When every replica served again."""

    @property
    def members(self) -> set[str]:
        """What is lost by it: `replica 0`, `gateway`, `store`. The slow is waited for, the corrupt computed again;
        when the supervisor is lost nobody is left to tell of it."""
        if self.lasts or self.ends_service:
            return set()
        return {
            f"replica {victim.split(' ')[1].partition('.')[0]}" if " " in victim else victim
            for victim in self.victims
        }

    @property
    def lasts(self) -> bool:
        """Until it is ended: nothing dies of it."""
        return self.kind.startswith(("slow", "corrupt"))

    @property
    def ends_service(self) -> bool:
        return SUPERVISOR in self.victims

    @property
    def detected(self) -> float:
        """Seconds until the first was noticed; of the supervisor's death, until the last had ended because of it."""
        if self.ended is not None:
            return self.ended - self.at
        return min((incident["loss"]["detected"] for incident in self.incidents), default=self.at) - self.at

    @property
    def was_noticed(self) -> bool:
        return bool(self.incidents) or self.ended is not None

    def after(self, name: str) -> list[float]:
        """Seconds from the fault to this moment of its incidents, where there was one."""
        return [incident[name] - self.at for incident in self.incidents if incident[name] is not None]

    def learn(self, told: list[dict[str, Any]]) -> None:
        """What /cluster tells now. What only an earlier gateway knew stays as it was."""
        now = {key_of(incident): incident for incident in told if incident["loss"]["detected"] >= self.at - 0.001}
        known = {key_of(incident): incident for incident in self.incidents}
        self.incidents = list((known | now).values())


def key_of(incident: dict[str, Any]) -> tuple[str, float]:
    return incident["member"], incident["loss"]["detected"]


@dataclass(frozen=True, slots=True)
class Aim:
    """What is to be done to whom."""

    kind: str
    victims: dict[str, psutil.Process]


async def aim(service: Service, kind: str, dice: random.Random, pair_percent: int, where: str = "") -> Aim:
    """At processes that are drawn; `where`: those whose numbers begin so. Raises `StartupError` when there is none
    for long."""
    action, _, roles = kind.partition("-")
    deadline = time.monotonic() + PATIENCE
    while True:  # one that is just being started has no name yet
        living = service.processes()
        found = [sorted(name for name in living if name.startswith(role + where)) for role in roles.split("+")]
        if all(found):
            break
        if time.monotonic() > deadline:
            raise StartupError(f"there is no {roles} to {action}:\n{service.said()[-3000:]}")
        await asyncio.sleep(_POLL_SECONDS)
    victims: list[str] = []
    for names in found:
        victims += dice.sample(names, 2 if len(names) > 1 and dice.randrange(100) < pair_percent else 1)
    return Aim(kind, {name: living[name] for name in victims})


def strike(service: Service, aimed: Aim, dice: random.Random, still: Callable[[], bool] = lambda: True) -> Fault:
    """Let it happen now. `still`: whether it is the moment that was waited for."""
    action = aimed.kind.partition("-")[0]
    if action == "spoil":
        service.spoil(dice)
    fault = Fault(aimed.kind, list(aimed.victims), time.time(), in_phase=still())
    for name, process in aimed.victims.items():
        if action not in _SIGNALS:
            service.afflict(name, action)
            continue
        with contextlib.suppress(psutil.NoSuchProcess):  # it died by itself, which is noticed as well
            process.send_signal(_SIGNALS[action])
    return fault


async def get_over(service: Service, client: httpx.AsyncClient, faults: list[Fault]) -> None:
    """Until every replica serves again, and those requests that were hit by these faults, one after the other, go on.
    Raises `StartupError` when that takes too long: then the service hangs."""
    awaited = faults
    for number, fault in enumerate(faults, start=1):
        if fault.ends_service:
            fault.ended = await service.ended()
            await service.start()
            awaited = faults[number:]  # nobody tells of those before it any more
    await _all_serve(service, client, awaited)
    for fault in awaited:
        if fault.lasts:
            await asyncio.sleep(_SLOW_SECONDS)
            for victim in fault.victims:
                service.relieve(victim)
            await _all_serve(service, client, awaited)
    for fault in faults:
        fault.whole_again = time.time()


async def _all_serve(service: Service, client: httpx.AsyncClient, faults: list[Fault]) -> None:
    """Until what was lost has been noticed, and is there again."""
    deadline = time.time() + PATIENCE
    while time.time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
        if service.process.returncode is not None:
            raise StartupError(f"the service ended with {service.process.returncode}:\n{service.said()[-3000:]}")
        try:
            state = (await client.get("/cluster")).json()
        except httpx.HTTPError:
            continue
        for fault in faults:
            fault.learn(state["incidents"])
        noticed = all(fault.members <= {each["member"] for each in fault.incidents} for fault in faults)
        whole = all(replica["status"] == "ready" for replica in state["replicas"])
        if noticed and whole and all(incident["back"] is not None for incident in state["incidents"]):
            return
    what = ", ".join(f"{fault.kind} of {fault.victims}" for fault in faults) or "the start after it"
    raise StartupError(f"{what} was not got over in {PATIENCE:g} s:\n{service.said()[-3000:]}")
