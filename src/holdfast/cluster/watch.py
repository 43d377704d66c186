"""Who is late, stands still, takes too much memory or has a broken GPU: what no pidfd tells."""

from __future__ import annotations

import time
from typing import NamedTuple

from holdfast.cluster.children import Children
from holdfast.cluster.gpus import GpuEvent, GpuWatch
from holdfast.cluster.leak import LeakWatch, private_memory
from holdfast.cluster.members import Member
from holdfast.core import lifecycle
from holdfast.core.config import ServerConfig

STOPPED_SECONDS = {"starting": 1.0, "serving": 5.0}
"""That a process may be held by the system. One that serves is found out sooner, if it has something to do."""
ANSWER_SECONDS = 10.0
"""That a worker may take to leave its place for the next: it may be in a long step, and cores may be scarce."""


class Suspect(NamedTuple):
    """Its member must do without it."""

    process: str
    reason: str
    kind: lifecycle.LossKind
    for_good: bool = False
    """Its device does not come back."""


class Watch:
    """Over the processes of members that were started."""

    def __init__(self, children: Children, config: ServerConfig) -> None:
        self._children = children
        self._config = config
        self._leaks: dict[str, LeakWatch] = {}
        """Of each worker, as it is now."""
        self._gpu_watch = GpuWatch()
        self._gpus: dict[str, str] = {}
        """Of each worker that has one: the UUID."""
        self._broken: dict[str, GpuEvent] = {}
        """The last that was heard of a GPU, by its UUID."""
        self._stopped: dict[str, float] = {}
        """Processes that are held by the system: since when."""

    def expect(self, name: str, ready: lifecycle.Ready) -> None:
        """A worker is ready: from now on it is to take no more than it says, and its GPU is to work."""
        self._gpus[name] = ready.gpu
        if ready.gpu:
            self._gpu_watch.watch(ready.gpu)
        if name.startswith("worker") and self._config.leak_window:
            expected = private_memory(self._children.by_name[name].process.pid) + ready.may_take
            self._leaks[name] = LeakWatch(expected, self._config.leak_window)

    def stood_still(self) -> None:
        """We did ourselves: perhaps everything did, and nobody was stopped for long."""
        self._stopped.clear()
        for child in self._children.by_name.values():
            child.ordered = time.monotonic()

    def look(self, member: Member, now: float) -> Suspect | None:
        """At a member that is not lost."""
        found = self._on_broken_gpu(member)
        return found or self._late(member, now) or self._held(member, now) or self._leaking(member, now)

    def _on_broken_gpu(self, member: Member) -> Suspect | None:
        """What was heard before a worker got its order is of the past. One that starts has not named its GPU yet."""
        self._broken |= {event.uuid: event for event in self._gpu_watch.look()}
        for name in member.workers if member.state == "serving" else ():
            event = self._broken.get(self._gpus.get(name, ""))
            if event is not None and event.heard > self._children.by_name[name].ordered:
                return Suspect(name, f"{name}: {event.reason}", "device", event.for_good)
        return None

    def _late(self, member: Member, now: float) -> Suspect | None:
        late = now >= member.due(self._config.startup_timeout)
        if member.state == "serving":
            reason = f"{member.speaker} has not been heard for {member.most_silent:g} s"
            return Suspect(member.speaker, reason, "hang") if late else None
        for name in member.processes:
            child = self._children.by_name[name]
            if late and not child.ready:
                return Suspect(name, f"{name} was not ready in time", "hang")
            if child.was_heard and not child.answers and now - child.ordered > ANSWER_SECONDS:
                return Suspect(name, f"{name} did not take its place within {ANSWER_SECONDS:g} s", "hang")
        return None

    def _held(self, member: Member, now: float) -> Suspect | None:
        """Who starts gives no sign of life yet, and may take its time; a rank with nothing to do gives none at all.
        But that one was stopped, the system says."""
        most = STOPPED_SECONDS[member.state]
        if member.state == "serving":
            most = max(most, member.most_silent)
        for name in member.processes:
            if not self._children.by_name[name].is_stopped():
                self._stopped.pop(name, None)
            elif now - self._stopped.setdefault(name, now) > most:
                del self._stopped[name]
                return Suspect(name, f"{name} was stopped (SIGSTOP)", "hang")
        return None

    def _leaking(self, member: Member, now: float) -> Suspect | None:
        """It must go before it takes the memory of all."""
        for name in member.workers if member.state == "serving" else ():
            watch = self._leaks.get(name)
            if watch is None or not watch.is_due(now):
                continue
            has = private_memory(self._children.by_name[name].process.pid)
            if (slope := watch.look(has, now)) is not None:
                expected, per_second = watch.expected / 1e6, slope / 1e6
                reason = f"{name} leaks: {has / 1e6:.0f} MB, {expected:.0f} expected, {per_second:.1f} MB/s more"
                return Suspect(name, reason, "leak")
        return None
