"""Checks of the weights in memory: every rank is asked, and a replica whose weights have changed is started anew.

What it has computed since they were last right may be wrong, and so may what others have taken of it from the
checkpoint store: the store forgets all it has, and replicas that took anything from there are started anew, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

from holdfast.core.errors import InvalidRequest, Unavailable
from holdfast.core.lifecycle import Replace
from holdfast.core.wire import CheckWeights, WeightsChecked
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.router import Router

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


@dataclass(slots=True)
class _Check:
    """`epochs`: of the replicas that were asked. `changed`: something was heard."""

    epochs: dict[int, int]
    reports: list[WeightsChecked] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class WeightChecks:
    """`tell`: the supervisor. `shared`: replicas hold weights together, so none could be repaired alone."""

    def __init__(
        self, router: Router, metrics: Metrics, tell: Callable[[Replace], Awaitable[None]], *, shared: bool
    ) -> None:
        self._router = router
        self._metrics = metrics
        self._tell = tell
        self._shared = shared
        self._keys = count()
        self._pending: dict[str, _Check] = {}

    async def run(self, interval: float) -> None:
        """Hear what ranks report, for ever; `interval`: seconds between two checks that nobody asked for, or 0."""
        periodic = asyncio.create_task(self._again(interval)) if interval else None
        try:
            while True:
                report = await self._router.checked.get()
                if report.wrong:
                    await self._replace(report)
                if (check := self._pending.get(report.key)) is not None:
                    check.reports.append(report)
                    check.changed.set()
        finally:
            if periodic is not None:
                periodic.cancel()

    async def _again(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            with contextlib.suppress(Unavailable):
                await self.check()

    async def check(self) -> tuple[list[WeightsChecked], list[int]]:
        """Have all ranks of the replicas that serve checked: what they report, and the replicas that were lost
        before all of theirs had. Raises `Unavailable` when there is none, `InvalidRequest` when it cannot be."""
        if self._shared:
            raise InvalidRequest("weights that replicas hold together (--shard-weights) cannot be checked yet")
        key = str(next(self._keys))
        ready = self._router.ask_all(CheckWeights(key, self._router.epoch))
        if not ready:
            raise Unavailable("no replica serves", retry_after=1)
        check = self._pending[key] = _Check({replica: each.epoch for replica, each in ready.items()})
        try:
            while missing := {
                replica for replica, each in ready.items() if len(_of(check, replica)) < each.num_ranks
            } - self._gone(check):
                check.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(check.changed.wait(), _LOOK_SECONDS)
        finally:
            del self._pending[key]
        lost = [replica for replica, each in ready.items() if len(_of(check, replica)) < each.num_ranks]
        assert set(lost) >= missing
        return sorted(check.reports, key=lambda report: report.rank), lost

    def _gone(self, check: _Check) -> set[int]:
        """Replicas that do not live any more as they were asked."""
        now = self._router.epochs()
        return {replica for replica, epoch in check.epochs.items() if now.get(replica) != epoch}

    async def _replace(self, report: WeightsChecked) -> None:
        number = report.replica
        reason = f"worker {report.rank}: weights have changed in memory ({', '.join(report.wrong[:3])})"
        logger.error("%s", reason)
        others = self._metrics.restoring() - {number}
        await self._tell(Replace(number, reason, "corruption", f"worker {report.rank}"))
        for other in others:
            await self._tell(Replace(other, f"it may have taken blocks of replica {number}: {reason}", "corruption"))


def _of(check: _Check, replica: int) -> list[WeightsChecked]:
    return [report for report in check.reports if report.replica == replica]
