"""What is done about losses. The ladder, from the top:

    its requests go on in other replicas, or wait            (the gateway decides: `gateway.router`)
    the member is started again, as it was                   up to --max-restarts times in a row
        on the workers that stay, with a spare worker or else a new process for each that is lost
        with new processes alone, where that failed
    the replica is started again without the lost ranks      as often as that, at once if a device is gone for good,
        on the workers that stay; with new processes,        and as long as any rank is left
        where that failed
    definite errors, and the end of the service

Who is lost is fenced before it is replaced: killed. So is all else of its member, but for a replica's workers that
nothing is wrong with: they *stay*, leave their places with the weights they hold, and get others.
What is lost with a process, `plans.impact_of` says; requests keep what they have in the token log, and blocks in the
checkpoint store.
"""

from __future__ import annotations

import logging
import time

from holdfast.cluster.children import Children, Ended, Said
from holdfast.cluster.members import GATEWAY, HUB, STORE, Member
from holdfast.cluster.nodes import Nodes
from holdfast.cluster.plans import impact_of, seats
from holdfast.cluster.process import Child
from holdfast.cluster.starter import Starter
from holdfast.cluster.watch import Watch
from holdfast.core import lifecycle
from holdfast.core.errors import ConfigError, ProcessDied
from holdfast.core.plan import Place, places
from holdfast.planner.replan import replan

log = logging.getLogger(__name__)

LONGEST_REGROWTH = 3600.0
"""Seconds between two attempts to serve with all ranks again, at most."""

Stay = list[tuple[Place, Child]]
"""Workers that stay, with the places they have left, in order."""


class Recovery:
    """Of the members of one service that has been ready."""

    def __init__(self, starter: Starter, members: list[Member]) -> None:
        self.starter = starter
        self.children: Children = starter.children
        self.config = starter.boot.config
        self.members = members
        self.replicas = {member.number: member for member in members if member.number is not None}
        """Of this machine, by number."""
        self.gateway = members[-1]
        self.nodes = Nodes(starter.boot.plan, lambda message: self.children.send(GATEWAY, message))
        self.watch = Watch(self.children, self.config.server)
        self._whole = starter.boot.plan
        self._regrows: dict[str, tuple[float, float]] = {}
        """By name, of replicas with fewer ranks: when they are to have all again, and how long that was waited."""
        self._untold: lifecycle.Replaces | None = None
        """What a new gateway is told once it is heard."""
        self.drain_until: float | None = None
        self._may_stay = False
        """Workers can, on their devices."""
        self._distrusts = False
        """The store is to forget all it has once it is heard."""

    # --- what happens ---

    def take(self, event: Said | Ended) -> None:
        """What a child says, or its end. Raises `ProcessDied` when there is nobody left to serve."""
        if event.child in self.starter.spares:
            self._take_spare(event)
        member = self._member_of(event.child)
        if member is None or member.state == "lost":
            return  # the rest of it
        if member is self.gateway and isinstance(event, Said) and self._untold is not None:
            self._tell_gateway(self._untold)
        match event:
            case Said(name, message):
                self._hear(member, name, message)
            case Ended(name):
                how = self.children.by_name[name].how_it_ended()
                self._lose(member, name, f"{name} died ({how})")

    def _hear(self, member: Member, name: str, message: object) -> None:
        match message:
            case lifecycle.Beat():
                member.heard = time.monotonic()
            case lifecycle.DiskTier() | lifecycle.CopiesKept() as state:
                self.children.send(GATEWAY, state)
            case lifecycle.Ready() as ready:
                self.is_ready(name, ready)
                self._welcome_back(member)
            case lifecycle.Replace() as wanted:
                self._replace(wanted)
            case lifecycle.Failed() as failed:  # others fail because of it, perhaps before it
                log.error("%s failed: %s", name, failed.error if failed.hangs else failed.traceback)
                member.failing.add(name)
                if not failed.follows:
                    member.failure = member.failure or (name, failed)
            case lifecycle.Distrust():
                self._distrust()
            case lifecycle.NodeJoined() | lifecycle.NodeLost() | lifecycle.NodeSays() as said:
                self.nodes.take(said)
                if not self.nodes.num_replicas and all(each.state == "lost" for each in self.replicas.values()):
                    raise ProcessDied("the last replica is lost, with its machine")

    def _replace(self, wanted: lifecycle.Replace) -> None:
        """A replica, here or elsewhere."""
        if wanted.replica in self.nodes:
            self.children.send(HUB, wanted)
            if wanted.kind == "corruption":
                self._distrust()
            return
        replica = self.replicas[wanted.replica]
        if replica.state == "serving" or (replica.state == "starting" and wanted.kind == "corruption"):
            self._start_anew(replica, wanted.reason, wanted.kind, wanted.process or "", stay=False)

    def look(self, now: float) -> None:
        """Whether someone is late, to start or to give a sign of life, or leaks; whether a replica can have all its
        ranks again, and the spares those that are missing."""
        for member in self.members:
            if member.state != "lost" and (found := self.watch.look(member, now)) is not None:
                if found.kind == "leak":
                    self._start_anew(member, found.reason, "leak", found.process, stay=True)
                else:
                    self._lose(member, found.process, found.reason, found.kind, for_good=found.for_good)
        for member in self.replicas.values():
            due, waited = self._regrows.get(member.name, (0.0, 0.0))
            if due and member.state == "serving" and now >= due:
                self._regrows[member.name] = (0.0, waited)
                self._start_anew(member, "it is to have all its ranks again", stay=True)
            elif waited and not due and member.is_steady(now):  # it has them for good
                del self._regrows[member.name]
        is_calm = self.drain_until is None and all(member.state != "starting" for member in self.members)
        if is_calm:  # else they would take the cores from those that start
            try:
                self.starter.start_spares()
            except OSError as error:
                log.warning("no spare worker can be started: %s", error)

    def is_ready(self, name: str, ready: lifecycle.Ready) -> None:
        """A child does its work from now on."""
        self.children.by_name[name].ready = True
        if name == GATEWAY:  # which hears us from now on
            self.nodes.tell_machines()
        self.watch.expect(name, ready)
        self._may_stay |= ready.may_stay

    def stood_still(self, now: float) -> None:
        """We did ourselves: perhaps everything did, and nobody is late."""
        self.watch.stood_still()
        for member in self.members:
            member.heard = now

    def _member_of(self, process: str) -> Member | None:
        return next((member for member in self.members if process in member.processes), None)

    def _take_spare(self, event: Said | Ended) -> None:
        match event:
            case Said(name, lifecycle.Ready()):
                self.children.by_name[name].ready = True
            case Said(name, lifecycle.Failed() as failed):
                log.error("%s failed: %s", name, failed.traceback)
            case Ended(name):
                self.starter.spares.ended(name)
        self._tell_spares()

    def _tell_spares(self) -> None:
        self.children.send(GATEWAY, lifecycle.Spares(self.starter.spares.num_ready))

    def _tell_gateway(self, replaces: lifecycle.Replaces) -> None:
        """What a new one has to know, now that it hears us."""
        self._untold = None
        self.children.send(GATEWAY, replaces)
        self._tell_spares()
        self.nodes.retell()
        for replica in self.replicas.values():
            if replica.state != "serving":
                assert replica.number is not None
                comes_back = replica.state == "starting"
                lost = lifecycle.ReplicaLost(
                    replica.number, "it is gone", replica.epoch - comes_back, comes_back=comes_back
                )
                self.children.send(GATEWAY, lost)
        if self.drain_until is not None:
            self.children.send(GATEWAY, lifecycle.Drain(max(0.0, self.drain_until - time.monotonic())))

    def _welcome_back(self, member: Member) -> None:
        if not all(self.children.by_name[name].ready for name in member.processes):
            return
        log.warning("%s serves again, after %.1f s", member.name, time.monotonic() - member.since)
        member.become("serving")
        if member.name == STORE:
            self.children.send(GATEWAY, lifecycle.StoreBack())
            if self._distrusts:
                self._distrusts = False
                self.children.send(STORE, lifecycle.Distrust())
        elif member.number is not None and self._is_smaller(member) and self.config.server.regrow_interval:
            _, waited = self._regrows.get(member.name, (0.0, 0.0))
            wait = min(2 * waited or self.config.server.regrow_interval, LONGEST_REGROWTH)
            self._regrows[member.name] = (time.monotonic() + wait, wait)

    # --- the ladder ---

    def _lose(
        self,
        member: Member,
        process: str,
        reason: str,
        kind: lifecycle.LossKind = "death",
        *,
        for_good: bool = False,
    ) -> None:
        """A process of it has ended that should not, or stands still. Nobody waits for it: the rest is let go or
        killed. Then, down the ladder. `for_good`: its device does not come back. Raises `ProcessDied` when there is
        nobody left to serve."""
        detected = time.time()
        if member.failure is not None and kind != "device":  # who failed first is the cause, whoever ended first
            process, failed = member.failure
            reason, kind = f"{process} died ({failed.error})", "hang" if failed.hangs else "error"
            for_good = failed.for_good
        stopped = [name for name in member.processes if self.children.by_name[name].is_stopped()]
        if kind == "hang" and stopped:
            process = stopped[0]
        gone = self._gone(member) | {process}
        loss = impact_of(self.starter.boot.plan, process, kind, detected)
        # nobody stays where it is not known who is at fault, or where one was to take its place and did not
        is_known = kind != "hang" or process in stopped
        left = self._left(member, gone) if is_known and (member.state == "serving" or kind == "death") else []
        old, epoch = list(member.processes), member.epoch
        deaths, most = member.count_death(), self.config.server.max_restarts
        reshapes = (deaths > most or for_good) and self._reshape(member, gone)
        comes_back = deaths <= most or reshapes
        stay = self._release(left) if comes_back else []
        self.children.kill(name for name in old if name in self.children.by_name)
        if not comes_back and self._nobody_without(member):
            raise ProcessDied(reason)
        after = f"; it is started again ({deaths} of --max-restarts {most})" if comes_back else ""
        if reshapes:
            ranks = len(member.workers)
            after = f"; it goes on with the {ranks} ranks left" if ranks > 1 else "; it goes on with the last rank"
            after += "; when its device is mended: holdfast drain" if for_good else ""
        self._say_lost(member, reason, after)
        if member is self.gateway:
            self._untold = lifecycle.Replaces(reason, loss)
        elif member.name == HUB:
            self.nodes.hub_lost(reason, kind)
        elif member.name == STORE:
            self.children.send(GATEWAY, lifecycle.StoreLost(reason, loss))
        elif member.number is not None:
            lost = lifecycle.ReplicaLost(member.number, reason, epoch, comes_back, reshapes, loss)
            self.children.send(GATEWAY, lost)
        member.become("lost")
        if comes_back:
            self._start(member, stay)

    def _start_anew(
        self, member: Member, reason: str, kind: lifecycle.LossKind = "planned", without: str = "", *, stay: bool
    ) -> None:
        """A replica that serves, with all ranks of the plan; its requests go on as after a loss. `stay`: all workers
        but one, if there is one to do without."""
        assert member.number is not None
        loss = impact_of(self.starter.boot.plan, without or member.speaker, kind, time.time())
        old, left = list(member.processes), self._left(member, self._gone(member) | {without}) if stay else []
        if self._is_smaller(member):
            self.starter.use(member, self._whole.replicas[member.number], self._whole.devices[member.number])
        staying = self._release(left)
        self.children.kill(name for name in old if name in self.children.by_name)
        if kind == "corruption":
            self._distrust()
        log.warning("%s is started anew: %s", member.name, reason)
        lost = lifecycle.ReplicaLost(member.number, reason, member.epoch, comes_back=True, loss=loss)
        self.children.send(GATEWAY, lost)
        self._start(member, staying)

    def _distrust(self) -> None:
        """What weights have computed that were wrong: all blocks that were kept."""
        self.starter.forget_blocks()
        self.children.send(HUB, lifecycle.Distrust())
        for member in self.members:
            if member.name == STORE and member.state == "serving":
                self.children.send(STORE, lifecycle.Distrust())
            elif member.name == STORE:
                self._distrusts = True

    def _gone(self, member: Member) -> set[str]:
        """Processes of it that have ended or are about to, or that the system holds."""
        alive, by_name = self.children.is_alive, self.children.by_name
        ended = {name for name in member.processes if not alive(name) or by_name[name].is_stopped()}
        return ended | member.failing

    def _left(self, member: Member, gone: set[str]) -> list[tuple[Place, str]]:
        """Workers of a replica that nothing is wrong with, with their places. The engine is not worth keeping: it
        starts in less time than it takes to be sure of its state."""
        if not self._may_stay or member.number is None:
            return []
        here = places(self.starter.boot.plan.replicas[member.number])
        return [(place, name) for place, name in zip(here, member.workers, strict=True) if name not in gone]

    def _release(self, left: list[tuple[Place, str]]) -> Stay:
        return [(place, self.children.release(name)) for place, name in left]

    def _reshape(self, member: Member, gone: set[str]) -> bool:
        """Cut a replica anew, without the ranks that are gone: whether it can be."""
        lost = [index for index, name in enumerate(member.workers) if name in gone]
        if not lost or member.number is None or self._whole.shard_weights:
            return False
        before = self.starter.boot.plan.replicas[member.number]
        smaller = before
        for index in reversed(lost):  # the last first: the others keep their numbers
            try:
                found = replan(self.starter.boot.model.spec, places(smaller)[index])
            except ConfigError as error:
                log.warning("%s cannot be cut without %s: %s", member.name, member.workers[index], error)
                return False
            if found is None:
                return False
            smaller = found
        devices = self.starter.boot.plan.devices[member.number]
        kept = [place for index, place in enumerate(places(before)) if index not in lost]
        self.starter.use(member, smaller, tuple(devices[place.shard.rank] for place in kept))
        member.deaths = 0
        return True

    def _start(self, member: Member, stay: Stay) -> None:
        """All of it; those that stay have places again."""
        by_name = {}
        if stay:
            assert member.number is not None
            there = places(self.starter.boot.plan.replicas[member.number])
            chosen = seats([place for place, _ in stay], there)
            by_name = {member.workers[seat]: child for seat, (_, child) in zip(chosen, stay, strict=True)}
            log.warning("%s: %d of its %d workers stay", member.name, len(stay), len(there))
        try:
            self.starter.start(member, by_name)
        except OSError as error:  # no process, no memory, no descriptor to be had
            self._give_up(member, f"{member.name} cannot be started again: {error}")
        self._tell_spares()

    def _give_up(self, member: Member, reason: str) -> None:
        """It does not come back after all."""
        self.children.kill(name for name in member.processes if name in self.children.by_name)
        member.become("lost")
        if self._nobody_without(member):
            raise ProcessDied(reason)
        log.error("%s", reason)
        if member.number is not None:
            self.children.send(GATEWAY, lifecycle.ReplicaLost(member.number, reason))

    def _say_lost(self, member: Member, reason: str, after: str) -> None:
        serving = sum(other.state == "serving" for other in self.replicas.values() if other is not member)
        serving += self.nodes.num_replicas
        plural = ("s", "") if serving != 1 else ("", "s")
        log.error("%s: %s is lost, %d replica%s serve%s%s", reason, member.name, serving, *plural, after)

    def _is_smaller(self, member: Member) -> bool:
        assert member.number is not None
        return self.starter.boot.plan.replicas[member.number] != self._whole.replicas[member.number]

    def _nobody_without(self, member: Member) -> bool:
        """Whether the service cannot go on without it."""
        others = [other for other in self.replicas.values() if other is not member]
        return member is self.gateway or not (
            self.nodes.num_replicas or any(other.state != "lost" for other in others)
        )
