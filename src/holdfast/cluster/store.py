"""The process of the checkpoint store: gives out slots of the shared memory, and knows which block is in which.

It never reads or writes the slots, and nobody waits for it: an engine that hears nothing goes on without. When it
dies the next one reads from the memory what is there.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import time
from itertools import takewhile

import zmq

from holdfast.cache.store import StoreIndex, StoreLayout, StoreMemory
from holdfast.cluster.child import Control, run_child
from holdfast.cluster.orders import Line, Order
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot
from holdfast.core.checkpoints import Find, Forget, Found, Keep, Kept, ToStore
from holdfast.hardware.host import available_memory

log = logging.getLogger(__name__)

GROWTH = 64_000_000
"""Bytes of slots that are opened at once, and given back at once."""
RESERVE = 1_000_000_000
"""Bytes of this machine's memory that are left free. Below half of it, some are given back."""
_LOOK_SECONDS = 1.0


class Store:
    """The slots, and the memory they have."""

    def __init__(self, descriptor: int, layout: StoreLayout) -> None:
        self.layout = layout
        self._descriptor = descriptor
        self.memory = StoreMemory(descriptor, layout)
        self.index = StoreIndex(self.memory.names)
        used = set(self.index.used())
        self._grown = max(used, default=-1) + 1
        """Slots that may have memory, from the first on."""
        self._free = [slot for slot in range(self._grown) if slot not in used]
        self._unfit = 0.0
        """When there was no more memory (`time.monotonic()`)."""

    def answer(self, message: Keep | Find | Forget) -> Kept | Found | None:
        """What an engine is told; None: nothing."""
        match message:
            case Keep(blocks):
                return Kept([(block, self._keep(block, before)) for block, before in blocks])
            case Find(key, blocks):
                slots = self.index.find(blocks)
                return Found(key, list(takewhile(self.memory.is_complete, slots)))
            case Forget(blocks):
                self._free += [slot for block in blocks if (slot := self.index.remove(block)) is not None]
                return None

    def _keep(self, block: bytes, before: bytes) -> int:
        """Where to write it. One that was begun, perhaps by somebody who has died, may be written again: it is the
        same whoever writes it."""
        if begun := self.index.find([block]):
            return -1 if self.memory.is_complete(begun[0]) else begun[0]
        slot = self._free.pop() if self._free or self._grow() else self.index.drop_last()
        if slot is None:
            return -1
        self.memory.clear(slot)
        self.index.add(block, before, slot)
        return slot

    def _grow(self) -> bool:
        """More slots, if there is memory for what will be written there."""
        more = min(max(GROWTH // self.layout.slot_bytes, 1), self.layout.num_slots - self._grown)
        if more == 0 or time.monotonic() - self._unfit < _LOOK_SECONDS:
            return False
        if available_memory() < RESERVE + more * self.layout.slot_bytes:
            self._unfit = time.monotonic()
            return False
        self._free += range(self._grown + more - 1, self._grown - 1, -1)
        self._grown += more
        return True

    @property
    def _end(self) -> int:
        return self.layout.slots_at + self._grown * self.layout.slot_bytes

    def give_back(self) -> None:
        """When others want memory: some of ours, and what is in it."""
        if self._grown == 0 or available_memory() > RESERVE // 2:
            return
        end = self._end
        self._grown -= min(max(GROWTH // self.layout.slot_bytes, 1), self._grown)
        self._free = [slot for slot in self._free if slot < self._grown]
        self.index.remove_from(self._grown)
        start = self._end + -self._end % mmap.PAGESIZE
        with mmap.mmap(self._descriptor, self.layout.num_bytes) as memory:
            memory.madvise(mmap.MADV_REMOVE, start, max(end - start, 0) // mmap.PAGESIZE * mmap.PAGESIZE)
        self._unfit = time.monotonic()
        log.warning("memory is short: the checkpoint store has %d slots left", self._grown)


def run(boot: Boot, control: Control, order: Order, _: Line) -> None:
    """Answer engines until told to stop."""
    store = Store(order.descriptors["store"], StoreLayout.of(boot.config, boot.model))
    engines = control.context.socket(zmq.ROUTER)
    engines.bind(boot.endpoints.store)
    control.send(wire.encode(lifecycle.Ready()))
    if len(store.index):
        log.warning("%d blocks of an earlier process are there", len(store.index))
    decode = wire.decoder(ToStore).decode
    poller = zmq.Poller()
    poller.register(control, zmq.POLLIN)
    poller.register(engines, zmq.POLLIN)
    looked = time.monotonic()
    while True:
        readable = dict(poller.poll(int(1000 * _LOOK_SECONDS)))
        if control in readable:
            return  # the only word it is sent is Stop
        if engines in readable:
            engine, data = engines.recv_multipart()
            if (answer := store.answer(decode(data))) is not None:
                engines.send_multipart([engine, wire.encode(answer)])
        if time.monotonic() - looked >= _LOOK_SECONDS:
            looked = time.monotonic()
            store.give_back()
            with contextlib.suppress(zmq.Again):
                control.send(wire.encode(lifecycle.Beat()), zmq.NOBLOCK)


if __name__ == "__main__":
    run_child(run)
