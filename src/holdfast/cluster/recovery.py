"""What is done about losses. The ladder, from the top:

    its requests go on in other replicas, or wait            (the gateway decides: `gateway.router`)
    the member is started again, as it was                   up to --max-restarts times in a row
    the replica is started again without the lost rank       as often as that, at once if its device is gone for good,
                                                             and as long as any rank is left
    definite errors, and the end of the service

A member is fenced before it is replaced: all its processes are killed. What is lost with a process, `plans.impact_of`
says; requests keep what they have in the token log, and blocks in the checkpoint store.
"""

from __future__ import annotations

import logging
import time

from holdfast.cluster.children import Children, Ended, Said
from holdfast.cluster.gpus import GpuEvent, GpuWatch
from holdfast.cluster.leak import LeakWatch, private_memory
from holdfast.cluster.members import GATEWAY, STORE, Member
from holdfast.cluster.plans import impact_of
from holdfast.cluster.starter import Starter
from holdfast.core import lifecycle
from holdfast.core.errors import ConfigError, ProcessDied
from holdfast.core.plan import Place
from holdfast.planner.replan import replan

log = logging.getLogger(__name__)

STOPPED_SECONDS = {"starting": 1.0, "serving": 5.0}
"""That a process may be held by the system. One that serves is found out sooner, if it has something to do."""
LONGEST_REGROWTH = 3600.0
"""Seconds between two attempts to serve with all ranks again, at most."""


class Recovery:
    """Of the members of one service that has been ready."""

    def __init__(self, starter: Starter, members: list[Member]) -> None:
        self.starter = starter
        self.children: Children = starter.children
        self.config = starter.boot.config
        self.members = members
        self.replicas = [member for member in members if member.number is not None]
        self.gateway = members[-1]
        self._whole = starter.boot.plan
        self._regrows: dict[str, tuple[float, float]] = {}
        """By name, of replicas with fewer ranks: when they are to have all again, and how long that was waited."""
        self._untold: lifecycle.Replaces | None = None
        """What a new gateway is told once it is heard."""
        self.drain_until: float | None = None
        self._leaks: dict[str, LeakWatch] = {}
        """Of each worker, as it is now."""
        self._gpu_watch = GpuWatch()
        self._gpus: dict[str, str] = {}
        """Of each worker that has one: the UUID."""
        self._stopped: dict[str, float] = {}
        """Processes that are held by the system: since when."""

    # --- what happens ---

    def take(self, event: Said | Ended) -> None:
        """What a child says, or its end. Raises `ProcessDied` when there is nobody left to serve."""
        member = self._member_of(event.child)
        if member is None or member.state == "lost":
            return  # the rest of it
        if member is self.gateway and isinstance(event, Said) and self._untold is not None:
            self._tell_gateway(self._untold)
        match event:
            case Said(_, lifecycle.Beat()):
                member.heard = time.monotonic()
            case Said(_, lifecycle.DiskTier() as state):
                self.children.send(GATEWAY, state)
            case Said(name, lifecycle.Ready() as ready):
                self.watch_memory(name, ready)
                self._welcome_back(member, name)
            case Said(_, lifecycle.Replace(number, reason, kind, process)):
                self.replace(self.replicas[number], reason, kind, process)
            case Said(name, lifecycle.Failed() as failed):  # others fail because of it, perhaps before it
                log.error("%s failed: %s", name, failed.traceback)
                if not failed.follows:
                    member.failure = member.failure or (name, failed)
            case Ended(name):
                how = self.children.by_name[name].how_it_ended()
                self._lose(member, name, f"{name} died ({how})")

    def look(self, now: float) -> None:
        """Whether someone is late, to start or to give a sign of life; whether a replica can have all its ranks
        again."""
        for member in self.members:
            if member.state != "lost" and now >= member.due(self.config.server.startup_timeout):
                self._lose_late(member)
            elif member.state != "lost":
                self._lose_stopped(member, now)
        for event in self._gpu_watch.look():
            self._lose_gpu(event)
        for member in self.replicas:
            due, waited = self._regrows.get(member.name, (0.0, 0.0))
            if due and member.state == "serving" and now >= due:
                self._regrows[member.name] = (0.0, waited)
                self.replace(member, "it is to have all its ranks again")
            self._look_for_leaks(member, now)

    def watch_memory(self, name: str, ready: lifecycle.Ready) -> None:
        """A worker is ready: from now on it is to take no more than it says, and its GPU is to work."""
        self._gpus[name] = ready.gpu
        if ready.gpu:
            self._gpu_watch.watch(ready.gpu)
        if name.startswith("worker") and self.config.server.leak_window:
            expected = private_memory(self.children.by_name[name].process.pid) + ready.may_take
            self._leaks[name] = LeakWatch(expected, self.config.server.leak_window)

    def _look_for_leaks(self, member: Member, now: float) -> None:
        """A replica whose worker leaks is started anew before it takes the memory of all."""
        for name in member.processes if member.state == "serving" else ():
            watch = self._leaks.get(name)
            if watch is None or not watch.is_due(now):
                continue
            has = private_memory(self.children.by_name[name].process.pid)
            if (slope := watch.look(has, now)) is not None:
                expected, per_second = watch.expected / 1e6, slope / 1e6
                reason = f"{name} leaks: {has / 1e6:.0f} MB, {expected:.0f} expected, {per_second:.1f} MB/s more"
                self.replace(member, reason, "leak", name)
                return

    def stood_still(self, now: float) -> None:
        """We did ourselves: perhaps everything did, and nobody is late."""
        self._stopped.clear()
        for member in self.members:
            member.heard = now

    def _member_of(self, process: str) -> Member | None:
        return next((member for member in self.members if process in member.processes), None)

    def _tell_gateway(self, replaces: lifecycle.Replaces) -> None:
        """What a new one has to know, now that it hears us."""
        self._untold = None
        self.children.send(GATEWAY, replaces)
        for replica in self.replicas:
            if replica.state != "serving":
                assert replica.number is not None
                comes_back = replica.state == "starting"
                epoch = self.children.by_name[replica.speaker].epoch - comes_back
                self.children.send(
                    GATEWAY, lifecycle.ReplicaLost(replica.number, "it is gone", epoch, comes_back=comes_back)
                )
        if self.drain_until is not None:
            self.children.send(GATEWAY, lifecycle.Drain(max(0.0, self.drain_until - time.monotonic())))

    def _welcome_back(self, member: Member, name: str) -> None:
        self.children.by_name[name].ready = True
        if all(self.children.by_name[other].ready for other in member.processes):
            log.warning("%s serves again, after %.1f s", member.name, time.monotonic() - member.since)
            member.become("serving")
            if member.number is None and member is not self.gateway:
                self.children.send(GATEWAY, lifecycle.StoreBack())
            elif member.number is not None and self._is_smaller(member) and self.config.server.regrow_interval:
                _, waited = self._regrows.get(member.name, (0.0, 0.0))
                wait = min(2 * waited or self.config.server.regrow_interval, LONGEST_REGROWTH)
                self._regrows[member.name] = (time.monotonic() + wait, wait)

    # --- what is done about it ---

    def replace(
        self, member: Member, reason: str, kind: lifecycle.LossKind = "planned", process: str | None = None
    ) -> None:
        """Start a replica that serves anew, with all ranks of the plan; its requests go on as after a loss."""
        if member.state != "serving" or member.number is None:
            return
        loss = impact_of(self.starter.boot.plan, process or member.speaker, kind, time.time())
        epoch = self.children.by_name[member.speaker].epoch
        self.children.kill(member.processes)
        if kind == "corruption":
            self._distrust()
        if self._is_smaller(member):
            self.starter.use(member, self._whole.replicas[member.number], self._whole.devices[member.number])
        log.warning("%s is started anew: %s", member.name, reason)
        self.children.send(GATEWAY, lifecycle.ReplicaLost(member.number, reason, epoch, comes_back=True, loss=loss))
        self._start_again(member)

    def _distrust(self) -> None:
        """What weights have computed that were wrong: all blocks that were kept."""
        self.starter.forget_blocks()
        if STORE in self.children.by_name:
            self.children.send(STORE, lifecycle.Distrust())

    def _lose_late(self, member: Member) -> None:
        if member.state == "starting":
            late = next((name for name in member.processes if not self.children.by_name[name].ready), member.speaker)
            self._lose(member, late, f"{late} was not ready in time")
        else:
            reason = f"{member.speaker} has not been heard for {member.most_silent:g} s"
            self._lose(member, member.speaker, reason, hangs=True)

    def _lose_stopped(self, member: Member, now: float) -> None:
        """Who starts gives no sign of life yet, and may take its time; a rank with nothing to do gives none at all.
        But that one was stopped, the system says."""
        most = STOPPED_SECONDS[member.state]
        if member.state == "serving":
            most = max(most, member.most_silent)
        for name in member.processes:
            if not self.children.by_name[name].is_stopped():
                self._stopped.pop(name, None)
            elif now - self._stopped.setdefault(name, now) > most:
                del self._stopped[name]
                self._lose(member, name, f"{name} was stopped (SIGSTOP)", hangs=True)
                return

    def _lose_gpu(self, event: GpuEvent) -> None:
        """Who serves with this GPU has lost it. One that starts will fail by itself."""
        for member in self.replicas:
            hit = [name for name in member.processes if self._gpus.get(name) == event.uuid]
            if hit and member.state == "serving":
                self._lose(member, hit[0], f"{hit[0]}: {event.reason}", kind="device")

    def _lose(
        self,
        member: Member,
        process: str,
        reason: str,
        *,
        hangs: bool = False,
        kind: lifecycle.LossKind = "death",
    ) -> None:
        """A process of it has ended that should not. The rest is killed: nobody waits for the dead. Then, down the
        ladder. Raises `ProcessDied` when there is nobody left to serve."""
        detected: float = time.time()
        kind = "hang" if hangs else kind
        gone = False
        if member.failure is not None and kind != "device":  # who failed first is the cause, whoever ended first
            process, failed = member.failure
            reason, kind = f"{process} died ({failed.error})", "hang" if failed.hangs else "error"
            gone = failed.for_good
        loss = impact_of(self.starter.boot.plan, process, kind, detected)
        epoch = self.children.by_name[member.speaker].epoch
        self.children.kill(member.processes)
        deaths, most = member.count_death(), self.config.server.max_restarts
        reshapes = (deaths > most or gone) and self._reshape(member, process)
        comes_back = deaths <= most or reshapes
        if not comes_back and self._nobody_without(member):
            raise ProcessDied(reason)
        serving = sum(other.state == "serving" for other in self.replicas if other is not member)
        after = f"; it is started again ({deaths} of --max-restarts {most})" if comes_back else ""
        if reshapes:
            after = f"; it goes on with the {len(member.processes) - 1} ranks that are left"
        plural = ("s", "") if serving != 1 else ("", "s")
        log.error("%s: %s is lost, %d replica%s serve%s%s", reason, member.name, serving, *plural, after)
        if member is self.gateway:
            self._untold = lifecycle.Replaces(reason, loss)
        elif member.number is None:
            self.children.send(GATEWAY, lifecycle.StoreLost(reason, loss))
        else:
            self.children.send(
                GATEWAY, lifecycle.ReplicaLost(member.number, reason, epoch, comes_back, reshapes, loss)
            )
        member.become("lost")
        if comes_back:
            self._start_again(member)

    def _reshape(self, member: Member, process: str) -> bool:
        """Cut a replica anew, without the rank that does not live: whether it can be."""
        role, _, where = process.partition(" ")
        if role != "worker" or member.number is None or self._whole.shard_weights:
            return False
        _, stage, index = map(int, where.split("."))
        replica = self.starter.boot.plan.replicas[member.number]
        try:
            smaller = replan(self.starter.boot.model.spec, Place(replica, stage, index))
        except ConfigError as error:
            log.warning("%s cannot be cut without %s: %s", member.name, process, error)
            return False
        if smaller is None:
            return False
        devices = self.starter.boot.plan.devices[member.number]
        rank = replica.stages[stage].ranks[index].rank
        self.starter.use(member, smaller, devices[:rank] + devices[rank + 1 :])
        member.deaths = 0
        return True

    def _start_again(self, member: Member) -> None:
        try:
            self.starter.start(member)
        except OSError as error:  # no process, no memory, no descriptor to be had
            self._give_up(member, f"{member.name} cannot be started again: {error}")

    def _give_up(self, member: Member, reason: str) -> None:
        """It does not come back after all."""
        self.children.kill(name for name in member.processes if name in self.children.by_name)
        member.become("lost")
        if self._nobody_without(member):
            raise ProcessDied(reason)
        log.error("%s", reason)
        if member.number is not None:
            self.children.send(GATEWAY, lifecycle.ReplicaLost(member.number, reason))

    def _is_smaller(self, member: Member) -> bool:
        assert member.number is not None
        return self.starter.boot.plan.replicas[member.number] != self._whole.replicas[member.number]

    def _nobody_without(self, member: Member) -> bool:
        """Whether the service cannot go on without it."""
        others = [other for other in self.replicas if other is not member]
        return member is self.gateway or all(other.state == "lost" for other in others)
