"""What the processes of a service are started with: the plan, and the memory they share."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from holdfast.cache.disk import remove
from holdfast.cache.store import StoreLayout, StoreMemory
from holdfast.cluster.children import Children
from holdfast.cluster.members import GATEWAY, STORE, WORKER_MODULE, Member, replica_processes
from holdfast.cluster.orders import Order, What
from holdfast.cluster.process import Child
from holdfast.cluster.spares import Spares
from holdfast.core.boot import Boot
from holdfast.core.plan import ReplicaPlan, places
from holdfast.models.inspect import stamp_of
from holdfast.models.parameters import packed_room
from holdfast.parallel.segment import create, layout_of
from holdfast.parallel.weights import HEADER

log = logging.getLogger(__name__)


class Starter:
    """Starts members, each with what belongs to it, and spare workers. `boot` is what they read; its stamp is made
    here."""

    def __init__(self, children: Children, boot: Boot, listener: socket.socket | None) -> None:
        self.children = children
        self.boot = msgspec.structs.replace(boot, stamp=stamp_of(boot.model))
        self._listener = listener
        self._shared: dict[str, int] = {}
        """Descriptors of memory that stays as long as we live, for those that come back: what the store keeps; the
        weights that replicas hold together, by the name of a place."""
        if boot.config.cache.checkpoint_memory_bytes:
            self._shared["store"] = create(StoreLayout.of(boot.config, boot.model).num_bytes, "holdfast-store")
        if boot.plan.shard_weights:
            for place in places(boot.plan.replicas[0]):
                self._shared[place.name] = create(HEADER + packed_room(boot.model.spec, place))
        self.spares = Spares(children, boot.config.server.spare_workers)

    def use(self, member: Member, plan: ReplicaPlan, devices: tuple[int, ...]) -> None:
        """Cut this replica so, over these devices, when it is started next."""
        assert member.number is not None
        replicas, all_devices = list(self.boot.plan.replicas), list(self.boot.plan.devices)
        replicas[member.number], all_devices[member.number] = plan, devices
        changed = msgspec.structs.replace(self.boot.plan, replicas=tuple(replicas), devices=tuple(all_devices))
        self.boot = msgspec.structs.replace(self.boot, plan=changed)
        member.processes = replica_processes(member.number, plan)

    def forget_blocks(self) -> None:
        """Nothing that the checkpoint store has, in memory or on disk, counts any more, whether its process lives or
        not."""
        if self.boot.config.cache.checkpoint_disk is not None:
            remove(Path(self.boot.config.cache.checkpoint_disk))
        if "store" in self._shared:
            StoreMemory(self._shared["store"], StoreLayout.of(self.boot.config, self.boot.model)).checksums[:] = 0

    def start(self, member: Member, stay: Mapping[str, Child] | None = None) -> None:
        """All its processes, those of a replica with new memory between them. `stay`: released workers that take
        part again, by the names they get. Raises `OSError` when there are no processes, no memory or no descriptors
        to be had."""
        member.epoch += 1
        stay, own = dict(stay or {}), dict[What, int]()
        try:
            own["boot"] = self._boot_file()
            if member.name == GATEWAY and self._listener is not None:
                own["listener"] = os.dup(self._listener.fileno())
            elif member.number is not None:
                boot = self.boot
                layout = layout_of(boot.plan.replicas[member.number], boot.model.spec, boot.config.scheduler)
                own["replica"] = create(layout.num_bytes)
            for name, module in member.processes.items():
                order = Order(name, member.epoch, own | self._shared_with(name))
                child = stay.pop(name, None)
                if child is None and module == WORKER_MODULE and (child := self.spares.take()) is not None:
                    log.info("%s becomes %s", child.name, name)
                self.children.start(module, order, child)
        finally:
            self.children.end(stay.values())  # those that could not be told, or are too many
            for number in own.values():
                os.close(number)  # what is behind it lives as long as a child has it
        member.become("starting")

    def start_spares(self) -> None:
        """Those that are missing. Raises `OSError`."""
        if not self.spares.is_full:
            file = self._boot_file()
            try:
                self.spares.fill({"boot": file})
            finally:
                os.close(file)

    def _boot_file(self) -> int:
        file = create(0, "holdfast-boot")
        os.write(file, msgspec.json.encode(self.boot))
        return file

    def _shared_with(self, name: str) -> dict[What, int]:
        role, _, place = name.partition(" ")
        found: dict[What, int | None] = {"store": self._shared.get("store") if role in {"worker", STORE} else None}
        found["weights"] = self._shared.get(place.partition(".")[2]) if role == "worker" else None
        return {what: number for what, number in found.items() if number is not None}
