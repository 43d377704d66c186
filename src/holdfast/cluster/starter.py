"""What the processes of a service are started with: the plan, the boot file, and the memory they share."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from holdfast.cache.store import StoreLayout, StoreMemory
from holdfast.cluster.children import Children
from holdfast.cluster.members import GATEWAY, Member, replica_processes
from holdfast.core.boot import Boot
from holdfast.core.plan import ReplicaPlan, places
from holdfast.models.inspect import stamp_of
from holdfast.models.parameters import packed_room
from holdfast.parallel.segment import create, layout_of
from holdfast.parallel.weights import HEADER


class Starter:
    """Starts members, each with what belongs to it. `boot` is what they read; its stamp is made here."""

    def __init__(self, children: Children, boot: Boot, listener: socket.socket) -> None:
        self.children = children
        self.boot = msgspec.structs.replace(boot, stamp=stamp_of(boot.model))
        self._listener = listener
        self._file = Path(boot.endpoints.folder) / "boot.json"
        self._shared: dict[str, int] = {}
        """Descriptors of memory that stays as long as we live, for those that come back: what the store keeps; the
        weights that replicas hold together, by the name of a place."""
        if boot.config.cache.checkpoint_memory_bytes:
            self._shared["store"] = create(StoreLayout.of(boot.config, boot.model).num_bytes, "holdfast-store")
        if boot.plan.shard_weights:
            for place in places(boot.plan.replicas[0]):
                self._shared[place.name] = create(HEADER + packed_room(boot.model.spec, place))
        self._write()

    def use(self, member: Member, plan: ReplicaPlan, devices: tuple[int, ...]) -> None:
        """Cut this replica so, over these devices, when it is started next."""
        assert member.number is not None
        replicas, all_devices = list(self.boot.plan.replicas), list(self.boot.plan.devices)
        replicas[member.number], all_devices[member.number] = plan, devices
        changed = msgspec.structs.replace(self.boot.plan, replicas=tuple(replicas), devices=tuple(all_devices))
        self.boot = msgspec.structs.replace(self.boot, plan=changed)
        member.processes = replica_processes(member.number, plan)
        self._write()

    def forget_blocks(self) -> None:
        """Nothing that is in the memory of the checkpoint store counts any more, whether its process lives or not."""
        if "store" in self._shared:
            StoreMemory(self._shared["store"], StoreLayout.of(self.boot.config, self.boot.model)).checksums[:] = 0

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.encode(self.boot))
        new.replace(self._file)  # others may be reading it

    def start(self, member: Member) -> None:
        """All its processes; those of a replica with new memory between them. Raises `OSError` when there are no
        processes, no memory or no descriptors to be had."""
        if member.name == GATEWAY:
            self._start_all(member, {"listener": self._listener.fileno()})
        elif member.number is None:
            self._start_all(member, {"store": self._shared["store"]})
        else:
            boot = self.boot
            layout = layout_of(boot.plan.replicas[member.number], boot.model.spec, boot.config.scheduler)
            descriptor = create(layout.num_bytes)
            try:
                self._start_all(member, {"replica": descriptor})
            finally:
                os.close(descriptor)  # it lives as long as a child has it
        member.become("starting")

    def _start_all(self, member: Member, descriptors: dict[str, int]) -> None:
        for name, module in member.processes.items():
            more = dict(descriptors)
            if name.startswith("worker"):
                found = {"weights": self._shared.get(name.partition(".")[2]), "store": self._shared.get("store")}
                more |= {what: number for what, number in found.items() if number is not None}
            self.children.start(name, module, str(self._file), more)
