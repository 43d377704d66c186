"""Blocks in a file that outlives the service: slots like those in memory (`cache.store`), behind them.

    head: whose blocks these are │ segment │ segment │ …        segment: names │ slots        slot: checksums │ cells

The file grows by a segment, whose room on the disk is taken at once. A name says which block a slot holds, which one
comes before it, and how old that is; its checksums, of the checksums of the cells and of the name itself, are seeded
with the owner, as those of the cells are with the block. A slot is written after its name is cleared, and named when
it is written: whatever kills the writer, a name stands for a whole block. Nothing waits for the disk; what a loss of
power has left half written does not match.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from holdfast.cache.store import HASH_BYTES, StoreIndex, StoreLayout, sums_of
from holdfast.core.errors import ConfigError

SEGMENT_BYTES = 64_000_000
"""About: whole slots."""
LOCK_SECONDS = 2.0
"""That the file is waited for when another service has it."""
_PAGE = 4096
_HEAD_BYTES = _PAGE
_MAGIC = b"holdfast blocks 1\n"
_SHAPE = struct.Struct("<QQQH")
"""Cells of a slot, bytes of a cell (K and V), slots of a segment; length of the owner, which comes next. Magic and a
checksum go before."""
_NAME = struct.Struct(f"<{HASH_BYTES}s{HASH_BYTES}sQQQ8x")
"""Block, the one before, age (a later one is larger), checksum of the cells' checksums, checksum of all this."""
_MOST_OWNER = 2000


class DiskFile:
    """`blocks` in a folder, both made if they are not there; for its owner's eyes, and one process at a time. `owner`
    says what the blocks depend on, beside their tokens.

    `index` and `free` are the caller's to keep: blocks in slots, and slots of nobody. All else reads and writes, may
    take long, and raises `OSError` when the disk does not do it.
    """

    def __init__(
        self, folder: Path, owner: str, layout: StoreLayout, num_bytes: int, is_distrusted: bool = False
    ) -> None:
        """Takes up what is there, `num_bytes` at most; nothing if it is distrusted. Raises `ConfigError` when the
        file cannot be had, or holds something else."""
        self._layout = layout
        self._owner = owner[:_MOST_OWNER].encode()
        self._seed = xxh3_64_intdigest(owner.encode())
        self._record = 8 * layout.num_cells + layout.slot_bytes
        self.segment_slots, self._segment_bytes = _segment(layout)
        self._most = (num_bytes - _HEAD_BYTES) // self._segment_bytes
        assert self._most > 0, "less than `least_bytes`"
        self.path = _path(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--checkpoint-disk {folder}: {error.strerror}") from error
        try:
            self._begin(folder, is_distrusted)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raises `OSError` when somebody has removed the file, or put another in its place."""
        here, there = os.fstat(self._fd), self.path.stat()
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(f"{self.path} is another file by now")

    def _begin(self, folder: Path, is_distrusted: bool) -> None:
        self._lock(folder)
        os.fchmod(self._fd, 0o600)
        head, is_ours = self._head(), False
        found = os.pread(self._fd, _HEAD_BYTES, 0)
        if found.rstrip(b"\0") and not found.startswith(_MAGIC):
            raise ConfigError(f"--checkpoint-disk {folder}: {self.path} is no file of blocks")
        if len(found) == _HEAD_BYTES and (whose := _owner_in(found)) is not None:
            is_ours = found == head and not is_distrusted
            if found != head:
                raise ConfigError(
                    f"--checkpoint-disk {folder}: holds blocks of another model or other settings ({whose}); give "
                    "another folder, or remove the file"
                )
        size = os.fstat(self._fd).st_size - _HEAD_BYTES
        self._num_segments = min(max(size, 0) // self._segment_bytes, self._most) if is_ours else 0
        os.ftruncate(self._fd, self._at(self._num_segments))
        if not is_ours:
            _write(self._fd, head, 0)
        self._read_names()

    def _lock(self, folder: Path) -> None:
        """A service that was killed may still be about to end."""
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"--checkpoint-disk {folder}: another service writes it") from None
            time.sleep(0.05)

    def _head(self) -> bytes:
        shape = (self._layout.num_cells, 2 * self._layout.cell_bytes, self.segment_slots)
        body = _SHAPE.pack(*shape, len(self._owner)) + self._owner
        return (_MAGIC + xxh3_64_intdigest(body).to_bytes(8, "little") + body).ljust(_HEAD_BYTES, b"\0")

    def _read_names(self) -> None:
        """What each slot holds. One of two that hold the same is free."""
        names = np.zeros((self._most * self.segment_slots, 2, HASH_BYTES), np.uint8)
        ages: dict[bytes, tuple[int, int]] = {}
        for segment in range(self._num_segments):
            table = os.pread(self._fd, self.segment_slots * _NAME.size, self._at(segment))
            for place in range(len(table) // _NAME.size):
                entry = table[place * _NAME.size : (place + 1) * _NAME.size]
                block, before, age, sums, checksum = _NAME.unpack(entry)
                if block.strip(b"\0") and checksum == self._name_sum(block, before, age, sums):
                    slot = segment * self.segment_slots + place
                    names[slot] = np.frombuffer(entry[: 2 * HASH_BYTES], np.uint8).reshape(2, HASH_BYTES)
                    if block in ages:
                        names[ages[block][1]] = 0
                    ages[block] = (age, slot)
        in_order = [slot for _, slot in sorted(ages.values())]
        self.index = StoreIndex(names, in_order)
        self._age = max((age for age, _ in ages.values()), default=0)
        used = set(in_order)
        self.free = [slot for slot in range(self._num_segments * self.segment_slots) if slot not in used]

    def _at(self, segment: int) -> int:
        """Where it begins."""
        return _HEAD_BYTES + segment * self._segment_bytes

    def _name_at(self, slot: int) -> int:
        segment, place = divmod(slot, self.segment_slots)
        return self._at(segment) + place * _NAME.size

    def _record_at(self, slot: int) -> int:
        segment, place = divmod(slot, self.segment_slots)
        return self._at(segment) + self.segment_slots * _NAME.size + place * self._record

    def _name_sum(self, block: bytes, before: bytes, age: int, sums: int) -> int:
        body = block + before + age.to_bytes(8, "little") + sums.to_bytes(8, "little")
        return int(xxh3_64_intdigest(body, self._seed))

    @property
    def can_grow(self) -> bool:
        return self._num_segments < self._most

    def grow(self) -> range:
        """One segment more: its slots. The disk has the room for it then; else it stays as it was."""
        start, end = self._at(self._num_segments), self._at(self._num_segments + 1)
        try:
            os.posix_fallocate(self._fd, start, end - start)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
            raise
        first = self._num_segments * self.segment_slots
        self._num_segments += 1
        return range(first, first + self.segment_slots)

    def write(self, slot: int, block: bytes, before: bytes, checksums: np.ndarray, cells: bytes) -> None:
        """`block` into a slot: uint64 of each cell, and the cells."""
        sums = checksums.astype("<u8").tobytes()
        assert len(sums) + len(cells) == self._record, "a slot's cells"
        self.clear(slot)
        _write(self._fd, sums, self._record_at(slot))
        _write(self._fd, cells, self._record_at(slot) + len(sums))
        self._age += 1
        before, digest = before.ljust(HASH_BYTES, b"\0"), xxh3_64_intdigest(sums, self._seed)
        name = _NAME.pack(block, before, self._age, digest, self._name_sum(block, before, self._age, digest))
        _write(self._fd, name, self._name_at(slot))

    def clear(self, slot: int) -> None:
        """Nothing in it counts any more."""
        _write(self._fd, bytes(_NAME.size), self._name_at(slot))

    def read(self, slot: int, block: bytes) -> tuple[np.ndarray, bytes] | None:
        """Checksums and cells, if they are what was written as this block."""
        name = os.pread(self._fd, _NAME.size, self._name_at(slot))
        data = os.pread(self._fd, self._record, self._record_at(slot))
        if len(name) < _NAME.size or len(data) < self._record:
            return None
        found, before, age, digest, checksum = _NAME.unpack(name)
        sums, cells = data[: 8 * self._layout.num_cells], data[8 * self._layout.num_cells :]
        if found != block or checksum != self._name_sum(found, before, age, digest):
            return None
        if digest != xxh3_64_intdigest(sums, self._seed):
            return None
        checksums, size = np.frombuffer(sums, "<u8"), 2 * self._layout.cell_bytes
        numbers = range(self._layout.num_cells)
        right = sums_of(memoryview(cells), range(0, len(cells), size), size, block, numbers)
        return (checksums, cells) if right == checksums.tolist() else None

    def close(self) -> None:
        os.close(self._fd)


def remove(folder: Path) -> None:
    """Have a service that begins find nothing there. One that has the file goes on with what nobody else sees."""
    with contextlib.suppress(OSError):
        _path(folder).unlink()


def _path(folder: Path) -> Path:
    return folder / "blocks"


def least_bytes(layout: StoreLayout) -> int:
    """That a file takes which holds anything."""
    return _HEAD_BYTES + _segment(layout)[1]


def _segment(layout: StoreLayout) -> tuple[int, int]:
    """Slots of a segment, and its bytes."""
    slot = _NAME.size + 8 * layout.num_cells + layout.slot_bytes
    slots = max(SEGMENT_BYTES // slot, 1)
    return slots, slots * slot + -(slots * slot) % _PAGE


def _owner_in(head: bytes) -> str | None:
    """Whose file it is; None for a head that is damaged."""
    checksum, body = int.from_bytes(head[len(_MAGIC) : len(_MAGIC) + 8], "little"), head[len(_MAGIC) + 8 :]
    *_, length = _SHAPE.unpack_from(body)
    if checksum != xxh3_64_intdigest(body[: _SHAPE.size + length]):
        return None
    return body[_SHAPE.size : _SHAPE.size + length].decode(errors="replace")


def _write(fd: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, at)
        rest, at = rest[written:], at + written
