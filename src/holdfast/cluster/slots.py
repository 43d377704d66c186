"""The slots of the checkpoint store, and what has become of each block: in memory, on disk, on the first machine."""

from __future__ import annotations

import logging
import mmap
import select
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from holdfast.cache.disk import DiskFile
from holdfast.cache.store import StoreIndex, StoreLayout, StoreMemory
from holdfast.cluster.copies import WRITTEN_SECONDS, Partner
from holdfast.cluster.tier import PART_BYTES, Tier
from holdfast.core.checkpoints import Find, Forget, Found, Keep, Kept
from holdfast.hardware.host import available_memory

log = logging.getLogger(__name__)

GROWTH = 64_000_000
"""Bytes of slots that are opened at once, and given back at once."""
RESERVE = 1_000_000_000
"""Bytes of this machine's memory that are left free. Below half of it, some are given back."""
FETCH_SECONDS = 0.15
"""That an engine waits for blocks from disk; less than its patience. What came by then is its answer."""
FLUSH_SECONDS = 3.0
"""That writing the rest to disk may take at the end."""
_LOOK_SECONDS = 1.0
_SOON_SECONDS = 0.02
_AT_ONCE = 64
"""Blocks looked at in one go."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    """An engine waits for blocks, some of which come from disk."""

    engine: bytes
    key: str
    blocks: list[bytes]
    deadline: float


class Store:
    """The slots, and the memory they have. `open_disk`: makes the file of the disk tier, if there is one. `partner`:
    the first machine's store, where this is another."""

    def __init__(
        self,
        descriptor: int,
        layout: StoreLayout,
        open_disk: Callable[[bool], DiskFile] | None = None,
        partner: Partner | None = None,
    ) -> None:
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
        self.tier = None if open_disk is None else Tier(open_disk, self.memory, self._holds)
        self.partner = partner
        self._fetches: list[_Fetch] = []
        self._unsaved: dict[bytes, float] = {}
        """Blocks that are not on disk yet, since when, the first to be written first."""
        self._was_open = False

    def answer(self, message: Keep | Find | Forget, engine: bytes = b"") -> Kept | Found | None:
        """What an engine is told now; None: nothing, or later by `look`."""
        match message:
            case Keep(blocks):
                return Kept([(block, self._keep(block, before)) for block, before in blocks])
            case Find(key, blocks):
                fetch = _Fetch(engine, key, blocks, time.monotonic() + FETCH_SECONDS)
                if self._advance(fetch):
                    return self._found(fetch)
                self._fetches.append(fetch)
                return None
            case Forget(blocks):
                for block in blocks:
                    self._forget(block)
                return None

    def _holds(self, block: bytes, slot: int) -> bool:
        return self.index.slot_of(block) == slot

    def _forget(self, block: bytes) -> None:
        if (slot := self.index.remove(block)) is not None:
            self._free.append(slot)
        if self.tier is not None:
            self.tier.forget(block)

    def forget_all(self) -> None:
        """Nothing that is here is to be trusted."""
        log.warning("all blocks are forgotten: %d", len(self.index))
        self._free += [slot for block in list(self.index) if (slot := self.index.remove(block)) is not None]
        self._unsaved.clear()
        if self.tier is not None:
            self.tier.forget_all()

    def _keep(self, block: bytes, before: bytes) -> int:
        """Where to write it. One that was begun, perhaps by somebody who has died, may be written again: it is the
        same whoever writes it."""
        if begun := self.index.find([block]):
            slot = -1 if self.memory.is_complete(begun[0]) else begun[0]
        else:
            slot = self._take(block, before, self._busy)
        if slot >= 0:
            self._copy_on(block)
        return slot

    def _copy_on(self, block: bytes) -> None:
        """To disk and to the first machine, once it is complete."""
        if self.tier is not None and self.tier.is_open:
            self._unsaved[block] = time.monotonic()
        if self.partner is not None:
            self.partner.note(block)

    def _take(self, block: bytes, before: bytes, keep: Container[bytes]) -> int:
        """A slot for a block, or -1; others make way but for those that are to be kept."""
        slot = self._free.pop() if self._free or self._grow() else self.index.drop_last(keep)
        if slot is None:
            return -1
        self.memory.clear(slot)
        self.index.add(block, before, slot)
        return slot

    # --- for other machines ---

    def is_here(self, block: bytes) -> bool:
        """Begun at least."""
        return block in self.index

    def has(self, block: bytes) -> bool:
        slot = self.index.slot_of(block)
        return slot is not None and self.memory.is_complete(slot)

    def get(self, block: bytes) -> tuple[bytes, np.ndarray, bytes] | None:
        """The block before it, checksums and bytes of its cells; one that is not what was sealed is forgotten."""
        slot = self.index.slot_of(block)
        if slot is None:
            return None
        found = self.memory.take(slot, block)
        return None if found is None else (self.index.before(block), *found)

    def put(self, block: bytes, before: bytes, checksums: np.ndarray, cells: bytes) -> bool | None:
        """Keep a block that came from another machine. False: it is not what it should be; None: there is no room for
        it, or no need."""
        if not self.memory.is_sealed(block, checksums, cells):
            return False
        if self.has(block):
            return None
        slot = self.index.slot_of(block)
        if slot is None:
            wanted = {block for fetch in self._fetches for block in fetch.blocks}
            slot = self._take(block, before, self._busy | wanted)
        if slot < 0:
            return None
        if not self.memory.fill(slot, cells):
            self._forget(block)
            return None
        self.memory.checksums[slot] = checksums.reshape(self.memory.checksums[slot].shape)
        if self.tier is not None and self.tier.is_open:
            self._unsaved[block] = time.monotonic()
        return True

    # --- the disk ---

    @property
    def _busy(self) -> set[bytes]:
        return self.tier.reading | self.tier.writing if self.tier is not None else set()

    def _complete(self, blocks: list[bytes]) -> list[int]:
        return list(takewhile(self.memory.is_complete, self.index.find(blocks)))

    def _found(self, fetch: _Fetch) -> Found:
        slots = self._complete(fetch.blocks)
        if not slots:
            return Found(fetch.key, slots)
        rest = fetch.blocks[len(slots) :]
        more = bool(rest) and self.partner is not None and self.partner.seek(rest)
        if self.tier is not None:
            self.tier.touch(fetch.blocks[len(slots) - 1])  # else what is used from memory would be the oldest on disk
            more |= bool(rest) and rest[0] in self.tier
        return Found(fetch.key, slots, more)

    def _advance(self, fetch: _Fetch) -> bool:
        """Have the next of its blocks read, or sent; whether there is nothing to wait for."""
        rest = fetch.blocks[len(self._complete(fetch.blocks)) :]
        if not rest:
            return True
        if self.tier is not None and (rest[0] in self.tier.reading or self._read(fetch, rest)):
            return False
        return self.partner is None or not self.partner.seek(rest)

    def _read(self, fetch: _Fetch, rest: list[bytes]) -> bool:
        """Whether there is something to read from disk."""
        assert self.tier is not None
        keep, part = self._busy | set(fetch.blocks), []
        for block in rest[: max(PART_BYTES // self.layout.slot_bytes, 1)]:
            if block in self.index or block not in self.tier:
                break
            if (slot := self._take(block, self.tier.before(block), keep)) < 0:
                break
            part.append((block, slot))
        if part:
            self.tier.read(part)
        return bool(part)

    def look(self) -> list[tuple[bytes, Found]]:
        """What engines are told now that waited for the disk, or the first machine. What is new goes there."""
        if self.tier is not None:
            self._take_read(self.tier)
        if self.partner is not None:
            self.partner.look(self, lambda: list(self.index))
        now, told, waiting = time.monotonic(), [], []
        for fetch in self._fetches:
            if now >= fetch.deadline or self._advance(fetch):
                told.append((fetch.engine, self._found(fetch)))
            else:
                waiting.append(fetch)
        self._fetches = waiting
        if self.tier is not None:
            self._save(now, WRITTEN_SECONDS)
        return told

    def _take_read(self, tier: Tier) -> None:
        """What has come from disk; when there is a disk again, all is to go there."""
        for block, slot, ok in tier.look():
            if not ok and self._holds(block, slot):
                self.index.remove(block)
                self._free.append(slot)
            elif ok and self.partner is not None:
                self.partner.note(block)
        if tier.is_open != self._was_open:
            self._was_open = tier.is_open
            self._unsaved = dict.fromkeys(self.index, time.monotonic()) if self._was_open else {}

    def _save(self, now: float, patience: float) -> None:
        """Have some of what is complete written to disk. What is not by then never will be."""
        assert self.tier is not None
        if not self.tier.can_write:
            return
        part: list[tuple[bytes, bytes, int]] = []
        for block, since in list(islice(self._unsaved.items(), _AT_ONCE)):
            slot = self.index.slot_of(block)
            if slot is None or block in self.tier:
                del self._unsaved[block]
            elif self.memory.is_complete(slot):
                part.append((block, self.index.before(block), slot))
                if len(part) * self.layout.slot_bytes >= PART_BYTES:
                    break
            elif now - since > patience:
                del self._unsaved[block]
        for block, _, _ in part[: self.tier.write(part)]:
            del self._unsaved[block]
        if len(self._unsaved) > 2 * self.layout.num_slots:  # the disk takes none
            self._unsaved = {block: since for block, since in self._unsaved.items() if block in self.index}

    @property
    def patience(self) -> float:
        """Seconds until the next `look`, if the tier does not call for it sooner."""
        soonest = min((fetch.deadline - time.monotonic() for fetch in self._fetches), default=_LOOK_SECONDS)
        if self._unsaved and self.tier is not None and self.tier.can_write:
            soonest = min(soonest, _SOON_SECONDS)
        if self.partner is not None and self.partner.is_busy:
            soonest = min(soonest, _SOON_SECONDS)
        return max(soonest, 0.0)

    def close(self) -> None:
        """Write what is not on disk yet, within `FLUSH_SECONDS`."""
        if self.tier is None:
            return
        deadline = time.monotonic() + FLUSH_SECONDS
        while self.tier.is_open and (self._unsaved or self.tier.writing) and time.monotonic() < deadline:
            self.look()
            self._save(time.monotonic(), patience=0.0)
            select.select([self.tier.fd], [], [], _SOON_SECONDS)
        self.tier.close()

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
