"""What was lost while serving, and how it went on: for operators, and for whoever tests us."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

import msgspec

from holdfast.core.wire import Loss

KEPT = 10_000
"""Incidents, the latest."""


Rung = Literal["failover", "restart", "error"]
"""What the live requests of a lost replica do: go on in others, wait until one is back, end."""


class Incident(msgspec.Struct):
    """One loss of a replica, or of the gateway. Times: seconds since 1970; None: not yet, or never."""

    replica: int | None
    """None: the gateway."""
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
    """When the replica served again."""

    def went_on(self) -> None:
        """One of its requests has got a token."""
        now = time.time()
        self.resumed += 1
        self.first_token, self.last_token = self.first_token or now, now


class Incidents:
    """In order."""

    def __init__(self) -> None:
        self._kept: deque[Incident] = deque(maxlen=KEPT)

    def __iter__(self) -> Iterator[Incident]:
        return iter(self._kept)

    def add(self, incident: Incident) -> None:
        self._kept.append(incident)

    def came_back(self, replica: int | None) -> None:
        """It serves again."""
        for incident in self._kept:
            if incident.replica == replica and incident.back is None:
                incident.back = time.time()
