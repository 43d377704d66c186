"""Copies of full blocks, in memory that outlives whoever fills it: what lies where, and which block is in which slot.

    names: per slot the prefix hash of its block, and of the block before │ checksums: per slot and cell │ slots

A slot holds one block over all layers and KV heads in one order, [L layers][G heads][K, V][S · D numbers], whatever
the plan: each rank writes and reads its own cells. A cell's checksum is seeded with the prefix hash and the cell's
place, so nothing else passes for it: not an older block, not half of one, not the cell of another head.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from xxhash import xxh3_64_intdigest

from holdfast.core.config import ServeConfig
from holdfast.core.plan import Range
from holdfast.core.points import Points
from holdfast.core.spec import DecoderSpec, ModelInfo

HASH_BYTES = 16
_ALIGNMENT = 4096
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """Sizes: all that tells where something is. `cell_bytes`: of K, and as many of V."""

    num_slots: int
    num_layers: int
    num_kv_heads: int
    cell_bytes: int

    @classmethod
    def within(cls, num_bytes: int, spec: DecoderSpec, block_size: int, itemsize: int) -> StoreLayout:
        """As many slots as fit."""
        cell_bytes = block_size * spec.head_dim * itemsize
        one = cls(1, spec.num_layers, spec.num_kv_heads, cell_bytes)
        most = num_bytes // (one.slot_bytes + 2 * HASH_BYTES + 8 * one.num_cells)  # but for what aligns the slots
        num_slots = most if replace(one, num_slots=most).num_bytes <= num_bytes else most - 1
        return replace(one, num_slots=num_slots)

    @classmethod
    def of(cls, config: ServeConfig, model: ModelInfo) -> StoreLayout:
        """That of a service: the same in every process."""
        dtype = model.dtype if config.model.dtype == "auto" else config.model.dtype
        itemsize = 4 if dtype == "float32" else 2
        return cls.within(config.cache.checkpoint_memory_bytes or 0, model.spec, config.cache.block_size, itemsize)

    @property
    def num_cells(self) -> int:
        """Of a slot."""
        return self.num_layers * self.num_kv_heads

    @property
    def slot_bytes(self) -> int:
        return self.num_cells * 2 * self.cell_bytes

    @property
    def slots_at(self) -> int:
        """Where the first slot begins."""
        head = self.num_slots * (2 * HASH_BYTES + 8 * self.num_cells)
        return head + -head % _ALIGNMENT

    @property
    def num_bytes(self) -> int:
        return self.slots_at + self.num_slots * self.slot_bytes


class StoreMemory:
    """The memory behind a descriptor. Nobody locks: whoever reads a slot copies it first and checks the copy."""

    def __init__(self, descriptor: int, layout: StoreLayout, points: Points | None = None) -> None:
        assert os.fstat(descriptor).st_size == layout.num_bytes, "the store is made for another layout"
        self.layout = layout
        self._descriptor = descriptor
        self._points = points or Points("store")
        data = np.frombuffer(mmap.mmap(descriptor, layout.num_bytes), np.uint8)
        count, cells = layout.num_slots, layout.num_cells
        names_end = count * 2 * HASH_BYTES
        self.names = data[:names_end].reshape(count, 2, HASH_BYTES)
        self.checksums = data[names_end : names_end + 8 * count * cells].view(np.uint64)
        self.checksums = self.checksums.reshape(count, layout.num_layers, layout.num_kv_heads)
        shape = (count, layout.num_layers, layout.num_kv_heads, 2, layout.cell_bytes)
        self.slots = data[layout.slots_at :].reshape(shape)

    def clear(self, slot: int) -> None:
        """Nothing in it counts any more."""
        self.checksums[slot] = 0

    def is_complete(self, slot: int) -> bool:
        """Whether every cell has been written, by whomever."""
        return bool(self.checksums[slot].all())

    def write(self, slot: int, prefix_hash: bytes, cells: np.ndarray, layers: Range, heads: Range) -> bool:
        """Fill these cells of a slot with `cells`, uint8 [layers, heads, K and V, bytes], in one piece; from now on
        they count. False: the system has no memory for them.

        They go through the file, not through the mapping: the first touch of mapped memory costs twice the copy."""
        numbers, size = _cells(layers, heads, self.layout), 2 * self.layout.cell_bytes
        start, per_layer = self._start(slot), self.layout.num_kv_heads
        parts = [cells] if heads == (0, per_layer) else list(cells)
        try:
            for part, first in zip(parts, numbers[:: len(numbers) // len(parts)], strict=True):
                os.pwrite(self._descriptor, part.data, start + first * size)
        except OSError:
            return False
        self._points.reach("checkpoint")
        sums = sums_of(cells.data.cast("B"), range(0, cells.size, size), size, prefix_hash, numbers)
        target = self.checksums[slot, slice(*layers), slice(*heads)]
        target[...] = np.array(sums, np.uint64).reshape(target.shape)
        return True

    def take(self, slot: int, prefix_hash: bytes) -> tuple[np.ndarray, bytes] | None:
        """Checksums (uint64 of each) and bytes of all cells, if they are what was sealed as this block."""
        checksums, size = self.checksums[slot].ravel().copy(), 2 * self.layout.cell_bytes
        found = os.pread(self._descriptor, self.layout.slot_bytes, self._start(slot))
        numbers = range(self.layout.num_cells)
        sums = sums_of(memoryview(found), range(0, len(found), size), size, prefix_hash, numbers)
        return (checksums, found) if sums == checksums.tolist() else None

    def fill(self, slot: int, cells: bytes) -> bool:
        """All cells of a slot; they count once its `checksums` are set. False: the system has no memory for them."""
        try:
            os.pwrite(self._descriptor, cells, self._start(slot))
        except OSError:
            return False
        return True

    def is_sealed(self, prefix_hash: bytes, checksums: np.ndarray, cells: bytes) -> bool:
        """Whether these, from elsewhere, are all cells of this block, and their checksums."""
        size, numbers = 2 * self.layout.cell_bytes, range(self.layout.num_cells)
        if len(cells) != self.layout.slot_bytes or checksums.shape != (len(numbers),) or not checksums.all():
            return False
        expected: list[int] = checksums.tolist()
        return sums_of(memoryview(cells), range(0, len(cells), size), size, prefix_hash, numbers) == expected

    def _start(self, slot: int) -> int:
        return self.layout.slots_at + slot * self.layout.slot_bytes

    def copy(self, slot: int, prefix_hash: bytes, layers: Range, heads: Range) -> np.ndarray | None:
        """These cells, uint8 [layers, heads, K and V, bytes], if they are what was sealed as this block."""
        checksums = self.checksums[slot, slice(*layers), slice(*heads)].ravel().tolist()
        found = self.slots[slot, slice(*layers), slice(*heads)].copy()
        cells, size = _cells(layers, heads, self.layout), 2 * self.layout.cell_bytes
        self._points.reach("restore")
        sums = sums_of(found.data.cast("B"), range(0, found.size, size), size, prefix_hash, cells)
        return found if sums == checksums else None


def _cells(layers: Range, heads: Range, layout: StoreLayout) -> list[int]:
    """Numbers of these cells in their slot."""
    return [layer * layout.num_kv_heads + head for layer in range(*layers) for head in range(*heads)]


def sums_of(
    data: memoryview, starts: Iterable[int], size: int, prefix_hash: bytes, cells: Iterable[int]
) -> list[int]:
    """Checksums (XXH3) of `size` bytes from each start, as these cells of the block."""
    seed = int.from_bytes(prefix_hash[:8], "little")
    return [
        xxh3_64_intdigest(data[start : start + size], (seed + cell) & _MASK)
        for start, cell in zip(starts, cells, strict=True)
    ]


class StoreIndex:
    """Which block is in which slot; the names in the memory say the same, for the next process that keeps an index.

    When there is room for no more, a block goes that none of the others follows: of these the one that was asked for
    or followed longest ago. For a block is of use only with all that come before it.
    """

    def __init__(self, names: np.ndarray, oldest_first: Iterable[int] | None = None) -> None:
        """`names`: what is here already, in these slots; by default in any."""
        self._names = names
        self._slots: dict[bytes, int] = {}
        self._followers: dict[bytes, int] = {}
        """Of blocks that are here: how many that are here come next."""
        self._last: OrderedDict[bytes, None] = OrderedDict()
        """Those without followers, the next to go first."""
        for slot in np.flatnonzero(names.any(axis=(1, 2))).tolist() if oldest_first is None else oldest_first:
            self._slots[self._name(slot)[0]] = slot
            self._followers[self._name(slot)[0]] = 0
        for slot in self._slots.values():
            if (before := self._name(slot)[1]) in self._slots:
                self._followers[before] += 1
        self._last = OrderedDict.fromkeys(block for block, count in self._followers.items() if not count)

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, blocks: Sequence[bytes]) -> list[int]:
        """The slots of the longest run of them, from the first on, that is here."""
        slots = []
        for block in blocks:
            if (slot := self._slots.get(block)) is None:
                break
            slots.append(slot)
        if slots and blocks[len(slots) - 1] in self._last:
            self._last.move_to_end(blocks[len(slots) - 1])
        return slots

    def add(self, block: bytes, before: bytes, slot: int) -> None:
        """`block`, which is not here, is in `slot`, which is free."""
        assert block not in self._slots
        self._slots[block] = slot
        self._followers[block] = 0
        self._last[block] = None
        if before in self._slots:
            self._followers[before] += 1
            self._last.pop(before, None)
        self._names[slot] = np.frombuffer(block + before.ljust(HASH_BYTES, b"\0"), np.uint8).reshape(2, HASH_BYTES)

    def __contains__(self, block: bytes) -> bool:
        return block in self._slots

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._slots)

    def slot_of(self, block: bytes) -> int | None:
        return self._slots.get(block)

    def before(self, block: bytes) -> bytes:
        """The one before a block that is here."""
        return self._name(self._slots[block])[1]

    def drop_last(self, keep: Container[bytes] = ()) -> int | None:
        """Free the slot of the block that is to go, but for those that are to be kept; None when nothing is."""
        block = next((block for block in self._last if block not in keep), None)
        return None if block is None else self.remove(block)

    def remove(self, block: bytes) -> int | None:
        """Free its slot, if it is here."""
        if block not in self._slots:
            return None
        slot = self._slots.pop(block)
        before = self._name(slot)[1]
        self._names[slot] = 0
        del self._followers[block]
        self._last.pop(block, None)
        if before in self._slots:
            self._followers[before] = max(self._followers[before] - 1, 0)
            if not self._followers[before]:
                self._last[before] = None
                self._last.move_to_end(before, last=False)
        return slot

    def remove_from(self, slot: int) -> None:
        """All that is in this slot or a later one."""
        for block in [block for block, at in self._slots.items() if at >= slot]:
            self.remove(block)

    def used(self) -> Iterator[int]:
        """Slots."""
        return iter(self._slots.values())

    def _name(self, slot: int) -> tuple[bytes, bytes]:
        """Of the block in a slot, and of the one before it."""
        block, before = self._names[slot]
        return block.tobytes(), before.tobytes()
