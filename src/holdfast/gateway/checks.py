"""Checks of the weights in memory: every rank is asked, and a replica whose weights have changed is started anew.

What it has computed since they were last right may be wrong, and so may what others have taken of it from the
checkpoint store: the store forgets all it has, and replicas that took anything from there are started anew, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

from holdfast.core.errors import InvalidRequest, Unavailable
from holdfast.core.lifecycle import Replace
from holdfast.core.wire import CheckWeights, EngineReady, WeightsChecked
from holdfast.gateway.metrics import Metrics
from holdfast.gateway.router import Router

logger = logging.getLogger(__name__)

MOST_SECONDS = 540.0
"""That ranks have for an answer; less than `holdfast check` waits."""
SETTLE_SECONDS = 1.0
"""After which whoever took blocks from the store just before it forgot them has said so."""
_LOOK_SECONDS = 0.5


@dataclass(slots=True)
class _Check:
    """`changed`: something was heard."""

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
        self._settling: set[asyncio.Task[None]] = set()
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
            for task in (*self._settling, *([periodic] if periodic is not None else [])):
                task.cancel()

    async def _again(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            with contextlib.suppress(Unavailable):
                await self.check()

    async def check(self) -> tuple[list[WeightsChecked], list[int]]:
        """Have all ranks of the replicas that serve checked: what they report, and the replicas that do not serve, or
        were lost or too slow before all of theirs had. Raises `Unavailable` when there is none, `InvalidRequest` when
        it cannot be."""
        if self._shared:
            raise InvalidRequest("weights that replicas hold together (--shard-weights) cannot be checked yet")
        key = str(next(self._keys))
        ready = self._router.ask_all(CheckWeights(key, self._router.epoch))
        if not ready:
            raise Unavailable("no replica serves", retry_after=1)
        check, deadline = _Check(), time.monotonic() + MOST_SECONDS
        self._pending[key] = check
        try:
            while self._awaited(check, ready) and time.monotonic() < deadline:
                check.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(check.changed.wait(), _LOOK_SECONDS)
        finally:
            del self._pending[key]
        whole = ready.keys() - set(_incomplete(check, ready))
        missing = [replica for replica in self._router.numbers if replica not in whole]
        return sorted(check.reports, key=lambda report: report.rank), missing

    def _awaited(self, check: _Check, ready: dict[int, EngineReady]) -> bool:
        """Whether a replica that lives as it was asked has not answered with all its ranks."""
        now = self._router.epochs()
        return any(now.get(replica) == ready[replica].epoch for replica in _incomplete(check, ready))

    async def _replace(self, report: WeightsChecked) -> None:
        number = report.replica
        reason = f"worker {report.rank}: weights have changed in memory ({', '.join(report.wrong[:3])})"
        logger.error("%s", reason)
        others, epochs = self._metrics.restoring() - {number}, self._router.epochs()
        await self._tell(Replace(number, reason, "corruption", f"worker {report.rank}"))
        for other in others:
            await self._tell(Replace(other, f"it may have taken blocks of replica {number}: {reason}", "corruption"))
        self._settling.add(settling := asyncio.create_task(self._replace_late(number, reason, epochs)))
        settling.add_done_callback(self._settling.discard)

    async def _replace_late(self, number: int, reason: str, epochs: dict[int, int]) -> None:
        """By then the store has forgotten all, and replicas that lived before have said what they took until then."""
        await asyncio.sleep(SETTLE_SECONDS)
        now = self._router.epochs()
        same = {replica for replica, epoch in epochs.items() if now.get(replica) == epoch}
        for other in (self._metrics.restoring() & same) - {number}:
            await self._tell(Replace(other, f"it may have taken blocks of replica {number}: {reason}", "corruption"))


def _incomplete(check: _Check, ready: dict[int, EngineReady]) -> list[int]:
    """Replicas of which reports are missing."""
    counts = Counter(report.replica for report in check.reports)
    return [replica for replica, each in ready.items() if counts[replica] < each.num_ranks]
