"""Other machines (nodes) as the supervisor of the first one knows them, by what its hub says. Their replicas are no
members of ours: each node's own supervisor mends what it can, and says so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from holdfast.core import lifecycle
from holdfast.core.plan import Plan, places

log = logging.getLogger(__name__)

Said = lifecycle.NodeJoined | lifecycle.NodeLost | lifecycle.NodeSays


class Nodes:
    """`tell`: the gateway."""

    def __init__(self, plan: Plan, tell: Callable[[lifecycle.ToChild], None]) -> None:
        self._plan = plan
        self._tell = tell
        self._machines: dict[str, lifecycle.Machine] = {}
        self._there: dict[int, str] = {}
        """Replicas that a node serves, or starts: whose they are."""

    def __contains__(self, replica: int) -> bool:
        return 0 <= replica < len(self._plan.replicas) and replica not in self._plan.here

    @property
    def num_replicas(self) -> int:
        """That are there."""
        return len(self._there)

    @property
    def missing(self) -> list[str]:
        """Replicas that no machine has joined with, by name."""
        count = len(self._plan.replicas)
        return [f"replica {number}" for number in range(count) if number in self and number not in self._there]

    def take(self, message: Said) -> None:
        match message:
            case lifecycle.NodeJoined(node, replicas):
                log.warning("%s has joined, with replicas %s", node, _listed(replicas))
                self._there |= dict.fromkeys(replicas, node)
                self._become(node, replicas, "ready")
                self._tell(message)
            case lifecycle.NodeLost(node, replicas, reason, kind, detected):
                self._lose(node, replicas, reason, kind, detected)
            case lifecycle.NodeSays(node, lost):
                log.error("%s: replica %d is lost: %s", node, lost.replica, lost.reason)
                if not lost.comes_back:
                    self._there.pop(lost.replica, None)  # another node may bring it
                self._tell(msgspec.structs.replace(lost, comes_back=True))

    def hub_lost(self, reason: str, kind: lifecycle.LossKind) -> None:
        """Nobody hears any of them; they join again once it is back."""
        for machine in self._machines.values():
            if replicas := [number for number, node in self._there.items() if node == machine.name]:
                self._lose(machine.name, replicas, reason, kind, time.time())

    def retell(self) -> None:
        """What a new gateway has to know."""
        for number in range(len(self._plan.replicas)):
            if number in self and number not in self._there:
                self._tell(lifecycle.ReplicaLost(number, "it is gone", comes_back=True))
        self.tell_machines()

    def _lose(
        self, node: str, replicas: Sequence[int], reason: str, kind: lifecycle.LossKind, detected: float
    ) -> None:
        for number in replicas:
            self._there.pop(number, None)
            ranks = [f"worker {number}.{place.name}" for place in places(self._plan.replicas[number])]
            loss = lifecycle.Loss(f"node {node}", kind, None, ranks, [], detected)
            text = f"node {node} is lost: {reason}"
            self._tell(lifecycle.ReplicaLost(number, text, comes_back=True, loss=loss))
        self._become(node, replicas, "stopped" if kind == "planned" else "lost")

    def _become(self, node: str, replicas: Sequence[int], status: lifecycle.MachineStatus) -> None:
        if status == "ready":  # in the place of one that was lost
            for name, machine in list(self._machines.items()):
                if machine.status != "ready" and set(machine.replicas) & set(replicas):
                    del self._machines[name]
        self._machines[node] = lifecycle.Machine(node, list(replicas), status)
        self.tell_machines()

    def tell_machines(self) -> None:
        if self._machines:
            self._tell(lifecycle.Machines(list(self._machines.values())))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
