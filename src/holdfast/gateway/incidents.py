"""What was lost while serving, and how it went on: for operators, and for whoever tests us."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

import msgspec

from holdfast.core.lifecycle import Loss, Machine
from holdfast.core.wire import EngineReady

KEPT = 10_000
"""Incidents, the latest."""


Rung = Literal["failover", "restart", "reshape", "error", "none"]
"""What the live requests of a lost replica do: go on in others, wait until it is back, wait until it is back on the
ranks that are left, end. None: no request needs what was lost."""


class Incident(msgspec.Struct):
    """One loss of a replica, the gateway or the store. Times: seconds since 1970; None: not yet, or never."""

    member: str
    """`replica 0`, `gateway`, `store`."""
    reason: str
    loss: Loss
    rung: Rung
    requests: int
    """That were live in it."""
    decided: float
    """When they were told."""
    resumed: int = 0
    """Of them: that have got a token since."""
    first_token: float | None = None
    """When the first of them did."""
    last_token: float | None = None
    """When the last of them did, for the first time."""
    back: float | None = None
    """When the member served again."""
    recomputed: int = 0
    """Tokens whose keys and values had been there before, and were neither cached nor restored."""
    recomputed_most: int = 0
    """Of one request."""
    weights_kept: int | None = None
    """Bytes of weights that its workers still had in memory when it served again."""
    weights_loaded: int | None = None
    """And that they had to read."""

    def went_on(self, recomputed: int) -> None:
        """One of its requests has got a token, after so many were computed again."""
        now = time.time()
        self.resumed += 1
        self.recomputed += recomputed
        self.recomputed_most = max(self.recomputed_most, recomputed)
        self.first_token, self.last_token = self.first_token or now, now


class Incidents:
    """In order."""

    def __init__(self) -> None:
        self.spare_workers = 0
        """That wait to take the place of one that is lost."""
        self.machines: list[Machine] = []
        """That have joined so far, of a service on several."""
        self._kept: deque[Incident] = deque(maxlen=KEPT)

    def __iter__(self) -> Iterator[Incident]:
        return iter(self._kept)

    def begin(
        self, member: str, reason: str, loss: Loss, rung: Rung, *, requests: int = 0, back: float | None = None
    ) -> Incident:
        """A new one, decided now."""
        incident = Incident(member, reason, loss, rung, requests, time.time(), back=back)
        self._kept.append(incident)
        return incident

    def came_back(self, member: str, ready: EngineReady | None = None) -> None:
        """It serves again; of a replica, what it says."""
        for incident in self._kept:
            if incident.member == member and incident.back is None:
                incident.back = time.time()
                if ready is not None:
                    incident.weights_kept, incident.weights_loaded = ready.weights_kept, ready.weights_loaded
