"""One fault: what is done to which processes, and what the service tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from holdfast.chaos.service import SUPERVISOR, Held, Service
from holdfast.core.errors import StartupError

OF_OTHERS = ("node", "outpost", "hub")
"""Beginnings of the names of processes whose loss is that of other machines' replicas."""
PATIENCE = 240.0
"""Seconds that getting over a fault may take."""
_LASTING_SECONDS = 1.0
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
    held: str | None = None
    """The process that was held at the moment's point of its code."""
    in_phase: bool = True
    """Whether it was, when it hit."""
    was_late: bool = False
    """Its victims had died of something else just before."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """As /cluster tells of them: of each member the first."""
    ended: float | None = None
    """Where the supervisor was killed: when no process of the service was left."""
    whole_again: float | None = None
    """When what it hit served again."""
    replicas: list[int] = field(default_factory=list)
    """Of other machines that it hit."""

    @property
    def members(self) -> set[str]:
        """What is lost by it: `replica 0`, `gateway`, `store`. The slow is waited for, the corrupt computed again;
        when the supervisor is lost nobody is left to tell of it."""
        if self.lasts or self.ends_service or self.was_late:
            return set()
        here = [victim for victim in self.victims if not victim.startswith(OF_OTHERS)]
        return {f"replica {number}" for number in self.replicas} | {
            f"replica {victim.split(' ')[1].partition('.')[0]}" if " " in victim else victim for victim in here
        }

    @property
    def is_let_go(self) -> bool:
        """Once it was noticed: a machine that stands still, or that nobody reaches, comes back."""
        return self.kind in {"stop-node", "cut-node"}

    @property
    def lasts(self) -> bool:
        """Until it is ended: nothing dies of it."""
        return self.kind.startswith(("slow", "corrupt"))

    @property
    def ends_service(self) -> bool:
        return SUPERVISOR in self.victims

    @property
    def detected(self) -> float | None:
        """Seconds until the first was noticed; of the supervisor's death, until the last had ended because of it.
        None: there was nothing to notice."""
        if self.ended is not None:
            return self.ended - self.at
        return min((incident["loss"]["detected"] - self.at for incident in self.incidents), default=None)

    @property
    def was_noticed(self) -> bool:
        """All that it hit."""
        return self.members <= {incident["member"] for incident in self.incidents}

    def after(self, name: str) -> list[float]:
        """Seconds from the fault to this moment of its incidents, where there was one."""
        return [incident[name] - self.at for incident in self.incidents if incident[name] is not None]

    def learn(self, told: list[dict[str, Any]]) -> None:
        """What /cluster tells now. What only an earlier gateway knew stays as it was."""
        known = {incident["member"]: incident for incident in self.incidents}
        for incident in told:
            member, detected = key_of(incident)
            is_ours = member in self.members and detected >= self.at - 0.001
            is_ours &= self.kind == "leave-node" or not _is_planned(incident)
            if is_ours and detected <= key_of(known.setdefault(member, incident))[1]:
                known[member] = incident
        self.incidents = list(known.values())
        if self.whole_again is None and self.members and self.was_noticed and all(i["back"] for i in known.values()):
            self.whole_again = max(incident["back"] for incident in known.values())


def key_of(incident: dict[str, Any]) -> tuple[str, float]:
    return incident["member"], incident["loss"]["detected"]


def _is_planned(incident: dict[str, Any]) -> bool:
    """A drain, or the end of one with fewer ranks."""
    return bool(incident["loss"]["kind"] == "planned")


@dataclass(frozen=True, slots=True)
class Aim:
    """What is to be done to whom, while who is held."""

    kind: str
    victims: dict[str, psutil.Process]
    held: Held | None = None
    replicas: list[int] = field(default_factory=list)
    """Of other machines, that will be lost."""


async def aim(  # noqa: PLR0917
    service: Service, kind: str, dice: random.Random, pair_percent: int = 0, where: str = "", held: Held | None = None
) -> Aim:
    """At whom is `held`, if it is such a process, else at processes that are drawn. `where`: those whose numbers
    begin so. Raises `StartupError` when there is none for long."""
    await service.look()
    victims: dict[str, psutil.Process] = {}
    for role in kind.partition("-")[2].split("+"):
        if held is not None and held.name.startswith(role):
            victims[held.name] = held.process
        else:
            victims |= await _draw(service, role + where, dice)
        if dice.randrange(100) < pair_percent:
            others = {name: each for name, each in service.processes().items() if name.startswith(role + where)}
            victims |= dict([dice.choice(sorted(others.items(), key=lambda each: each[0]))] if others else [])
    replicas = {number for name in victims if name.startswith(OF_OTHERS) for number in service.replicas_of(name)}
    return Aim(kind, victims, held, sorted(replicas))


async def _draw(service: Service, beginning: str, dice: random.Random) -> dict[str, psutil.Process]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = {name: process for name, process in service.processes().items() if name.startswith(beginning)}
        if found:
            name = dice.choice(sorted(found))
            return {name: found[name]}
        await service.look()
        await asyncio.sleep(_POLL_SECONDS)  # one that is just being started has no name yet
    raise StartupError(f"there is no {beginning}:\n{service.said()[-3000:]}")


def strike(service: Service, aimed: Aim, dice: random.Random) -> Fault:
    """Let it happen now; then who is held goes on, unless that is what it was."""
    action, held = aimed.kind.partition("-")[0], aimed.held
    if action == "spoil":
        service.spoil(dice)
    fault = Fault(aimed.kind, list(aimed.victims), time.time(), held=None if held is None else held.name)
    fault.replicas = aimed.replicas
    fault.was_late = not any(process.is_running() for process in aimed.victims.values())
    for name, process in aimed.victims.items():
        if action not in _SIGNALS or (action == "stop" and name.startswith("node")):
            service.afflict(name, action)
            continue
        with contextlib.suppress(psutil.NoSuchProcess):  # it died by itself, which is noticed as well
            process.send_signal(_SIGNALS[action])
    if held is not None and (action != "stop" or held.name not in aimed.victims):
        held.let_go()
    return fault


async def get_over(
    service: Service, client: httpx.AsyncClient, faults: Sequence[Fault], *, whole: bool = True
) -> list[Fault]:
    """Until these faults, one after the other, have been noticed and the service serves; `whole`: until all that they
    hit does. Those of which something does not serve yet. Raises `StartupError` when that takes too long: then the
    service hangs."""
    awaited = list(faults)
    for number, fault in enumerate(faults, start=1):
        if fault.ends_service:
            fault.ended = await service.ended()
            await service.start()
            for each in faults[:number]:
                each.whole_again = time.time()
            awaited = list(faults[number:])  # nobody tells of those before it any more
    until_let_go = any(fault.is_let_go for fault in awaited)
    await _serves(service, client, awaited, whole=whole and not until_let_go)
    for fault in awaited if until_let_go else ():
        for victim in fault.victims if fault.is_let_go else ():
            service.relieve(victim)
    if whole and until_let_go:
        await _serves(service, client, awaited, whole=True)
    for fault in awaited:
        if fault.lasts:
            await asyncio.sleep(_LASTING_SECONDS)
            for victim in fault.victims:
                service.relieve(victim)
            await _serves(service, client, awaited, whole=whole)
            fault.whole_again = time.time()
    return [fault for fault in awaited if fault.whole_again is None]


async def _serves(service: Service, client: httpx.AsyncClient, faults: list[Fault], *, whole: bool) -> None:
    """Until what was lost has been noticed, and some replica serves, or all is there again."""
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
        ready = [replica["status"] == "ready" for replica in state["replicas"]]
        is_whole = all(ready) and all(incident["back"] is not None for incident in state["incidents"])
        if all(fault.was_noticed for fault in faults) and (is_whole or (any(ready) and not whole)):
            for fault in faults:
                if is_whole and not fault.lasts:  # a gateway that went may have been the only one to know when
                    fault.whole_again = fault.whole_again or time.time()
            return
    what = ", ".join(f"{fault.kind} of {fault.victims}" for fault in faults) or "the start after it"
    raise StartupError(f"{what} was not got over in {PATIENCE:g} s:\n{service.said()[-3000:]}")
