"""The parts of a service that serve as a whole or not at all: replicas, the checkpoint store, and the gateway."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from holdfast.core import lifecycle
from holdfast.core.machines import Network
from holdfast.core.plan import Plan, ReplicaPlan, places

GATEWAY = "gateway"
STORE = "store"
HUB = "hub"
WORKER_MODULE = "holdfast.cluster.rank"
STEADY_SECONDS = 60.0
"""A member that has served for so long starts with a clean record when it dies."""

State = Literal["starting", "serving", "lost"]


@dataclass(slots=True)
class Member:
    """`processes`: name → module, the slowest to start first. `speaker`: the one whose beats are waited for,
    `most_silent` seconds at most. `number`: of a replica."""

    name: str
    processes: dict[str, str]
    speaker: str
    most_silent: float
    number: int | None = None
    epoch: int = -1
    """How often it was started before: all its processes have it."""
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    """Of the state."""
    deaths: int = 0
    """In a row."""
    heard: float = field(default_factory=time.monotonic)
    """The speaker's last sign of life, once it serves."""
    failure: tuple[str, lifecycle.Failed] | None = None
    """Its first process to fail by itself, this time, and what it said."""
    failing: set[str] = field(default_factory=set)
    """Processes that have said they cannot go on, this time."""

    @property
    def workers(self) -> list[str]:
        """Of a replica, in the order of its places."""
        return [name for name in self.processes if name.startswith("worker")]

    def become(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()
        self.heard = self.since
        if state == "starting":
            self.failure, self.failing = None, set()

    def is_steady(self, now: float) -> bool:
        """Whether it has served for long."""
        return self.state == "serving" and now - self.since > STEADY_SECONDS

    def count_death(self) -> int:
        """How many there were in a row, this one included."""
        self.deaths = 1 if self.is_steady(time.monotonic()) else self.deaths + 1
        return self.deaths

    def due(self, startup_timeout: float) -> float:
        """By when it must have said something."""
        if self.state == "starting":
            return self.since + startup_timeout
        return self.heard + self.most_silent


def replica_processes(number: int, replica: ReplicaPlan) -> dict[str, str]:
    """Of a replica: name → module, the slowest to start first."""
    workers = {f"worker {number}.{place.name}": WORKER_MODULE for place in places(replica)}
    return {**workers, f"engine {number}": "holdfast.cluster.engine"}


def members(plan: Plan, *, has_store: bool, network: Network | None = None) -> list[Member]:
    """Of a service that runs this plan, on this machine; the slowest to start come first. On one that is not the
    first, an outpost is where the gateway would be."""
    replicas = []
    for number in plan.here:
        processes = replica_processes(number, plan.replicas[number])
        silence = 3 * lifecycle.BEAT_SECONDS
        replicas.append(Member(f"replica {number}", processes, f"engine {number}", silence, number))
    silence = 3 * lifecycle.BEAT_SECONDS
    store = [Member(STORE, {STORE: "holdfast.cluster.store"}, STORE, silence)] if has_store else []
    is_first = network is None or network.is_first
    hub = [Member(HUB, {HUB: "holdfast.cluster.hub"}, HUB, silence)] if network is not None and is_first else []
    module = "holdfast.gateway" if is_first else "holdfast.cluster.outpost"
    # a gateway may be busy with a large body for a while, an engine never
    return [*replicas, *store, *hub, Member(GATEWAY, {GATEWAY: module}, GATEWAY, 10 * lifecycle.BEAT_SECONDS)]
