"""The disk tier of the checkpoint store: which blocks are on disk, and what is on its way there or back.

What touches the disk runs on two threads, one that reads and one that writes, so that a disk that is slow, or does
not answer at all, holds up neither the store nor each other. A disk that fails is left alone for a while.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from holdfast.cache.disk import DiskFile
from holdfast.cache.store import StoreMemory
from holdfast.core.errors import HoldfastError
from holdfast.core.lifecycle import DiskTier

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""After which a disk that failed, or was full, is tried again."""
PART_BYTES = 4_000_000
"""About what is read, or written, in one go."""


class Copied(NamedTuple):
    """A block came from disk into a slot in memory, or (`ok` False) is not what it should be."""

    block: bytes
    slot: int
    ok: bool


class Tier:
    """`open` makes the file, anew if its argument says so. `holds` says whether a block is in this slot of the
    memory. `fd` is readable when `look` has something to do; it is to be called now and then in any case."""

    def __init__(
        self, open: Callable[[bool], DiskFile], memory: StoreMemory, holds: Callable[[bytes, int], bool]
    ) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._open = open
        self._memory = memory
        self._holds = holds
        self._file: DiskFile | None = None
        self._failed: DiskFile | None = None
        """To be closed when nobody is at it any more."""
        self._reader, self._writer = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "write")
        self._jobs: dict[Future[Any], Callable[[Any], None]] = {}
        """What is under way, and what is done with what comes of it."""
        self.reading: set[bytes] = set()
        self.writing: set[bytes] = set()
        """On their way: their slots, here and there, may not be given away."""
        self._forgotten: set[bytes] = set()
        """Of those: what is not to be found again."""
        self._copied: list[Copied] = []
        self._failure = ""
        self._retry_at = self._check_at = 0.0
        self._is_growing = self._is_full = self._is_distrusted = False
        self._num_written = self._num_read = self._num_broken = 0

    def start(self) -> None:
        """Open the file now. Raises `ConfigError` for a folder that must not be used."""
        try:
            self._opened(self._open(False), anew=False)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """What is under way is done first."""
        self._reader.shutdown()
        self._writer.shutdown()
        if self._file is not None:
            self._file.close()
        os.close(self.fd)

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def state(self) -> DiskTier:
        blocks = len(self._file.index) if self._file else 0
        return DiskTier(blocks, self._num_written, self._num_read, self._num_broken, self._failure or None)

    def __contains__(self, block: bytes) -> bool:
        return self._file is not None and block in self._file.index

    def before(self, block: bytes) -> bytes:
        """The one before a block that is on disk."""
        assert self._file is not None
        return self._file.index.before(block)

    def touch(self, block: bytes) -> None:
        """It has been asked for."""
        if self._file is not None:
            self._file.index.find([block])

    # --- what is wanted ---

    @property
    def can_write(self) -> bool:
        """A part at a time, so that little is under way at the end."""
        return self._file is not None and not self.writing and not self._is_growing

    def write(self, blocks: Sequence[tuple[bytes, bytes, int]]) -> int:
        """Copy blocks that are not on disk, each with the one before and its slot in memory; how many of them. When
        there is no room left, the oldest make way."""
        file, entries = self._file, []
        assert file is not None
        for block, before, slot in blocks:
            if not file.free and file.can_grow and not self._is_full:
                self._is_growing = True
                self._submit(self._writer, lambda: _grow(file), self._grown)
                break
            there = file.free.pop() if file.free else file.index.drop_last(self.reading)
            if there is None:
                break
            entries.append((there, block, before, slot))

        def copy() -> list[bool]:
            done = []
            for there, block, before, slot in entries:
                found = self._memory.take(slot, block)
                if found is not None:
                    file.write(there, block, before, *found)
                done.append(found is not None)
            return done

        if entries:
            self.writing |= {block for _, block, _, _ in entries}
            self._submit(self._writer, copy, lambda done: self._wrote(entries, done))
        return len(entries)

    def read(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Copy blocks that are on disk into slots of the memory."""
        file = self._file
        assert file is not None
        self.reading |= {block for block, _ in blocks}
        self.touch(blocks[-1][0])
        entries = [(file.index.find([block])[0], block, slot) for block, slot in blocks]

        def copy() -> list[tuple[bytes, int, np.ndarray | None, bool]]:
            found = []
            for there, block, slot in entries:
                data = file.read(there, block)
                has_room = data is not None and self._memory.fill(slot, data[1])
                found.append((block, slot, None if data is None else data[0], has_room))
            return found

        self._submit(self._reader, copy, self._has_read)

    def forget(self, block: bytes) -> None:
        """It is not what it should be."""
        if block in self.reading or block in self.writing:
            self._forgotten.add(block)
        if self._file is not None and (there := self._file.index.remove(block)) is not None:
            self._clear(there)

    def forget_all(self) -> None:
        """Nothing on disk is to be trusted: the file is begun anew once nobody is at it."""
        self._forgotten |= self.reading | self.writing
        self._is_distrusted, self._retry_at = True, 0.0
        self._failed, self._file = self._failed or self._file, None

    # --- what comes of it ---

    def look(self) -> list[Copied]:
        """What has been read. A disk that failed is tried again when it is time."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        for job in [job for job in self._jobs if job.done()]:
            then = self._jobs.pop(job)
            try:
                then(job.result())
            except (OSError, HoldfastError) as error:
                self._fail(error)
        now = time.monotonic()
        if self._file is None and not self._jobs:
            self._start_anew(now)
        if self._is_full and now >= self._retry_at:
            self._is_full = False
        if self._file is not None and now >= self._check_at:
            self._check_at = now + RETRY_SECONDS
            self._submit(self._writer, self._file.check, lambda _: None)
        copied, self._copied = self._copied, []
        return copied

    def _start_anew(self, now: float) -> None:
        self.reading, self.writing, self._forgotten, self._is_growing = set(), set(), set(), False
        if self._failed is not None:
            self._failed.close()
            self._failed = None
        if now >= self._retry_at:
            anew = self._is_distrusted
            self._submit(self._writer, partial(self._open, anew), partial(self._opened, anew=anew))

    def _submit(self, pool: ThreadPoolExecutor, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        job = pool.submit(do)
        self._jobs[job] = then
        job.add_done_callback(lambda _: os.eventfd_write(self.fd, 1))

    def _opened(self, file: DiskFile, *, anew: bool) -> None:
        if self._is_distrusted and not anew:  # since it was asked for
            self._failed = file
            return
        if self._failure:
            log.warning("the disk tier of the checkpoint store is there: %s", file.path)
        self._file, self._failure, self._is_full, self._is_distrusted = file, "", False, False
        if len(file.index):
            log.info("%d blocks are on disk: %s", len(file.index), file.path)

    def _grown(self, result: range | OSError) -> None:
        self._is_growing = False
        if isinstance(result, OSError):
            self._is_full = True
            self._note(result)
        elif self._file is not None:
            self._failure = ""
            self._file.free += reversed(result)

    def _wrote(self, entries: Sequence[tuple[int, bytes, bytes, int]], done: Sequence[bool]) -> None:
        """One that was not what it should be stays in memory alone: a worker that was late wrote another there."""
        for (there, block, before, slot), is_there in zip(entries, done, strict=True):
            if self._file is None:
                return
            self.writing.discard(block)
            if is_there and block not in self._forgotten and self._holds(block, slot):
                self._file.index.add(block, before, there)
                self._num_written += 1
            else:
                self._forgotten.discard(block)
                self._clear(there)

    def _has_read(self, found: Sequence[tuple[bytes, int, np.ndarray | None, bool]]) -> None:
        for block, slot, checksums, has_room in found:
            is_wanted = block not in self._forgotten and self._holds(block, slot)
            self.reading.discard(block)
            self._forgotten.discard(block)
            if checksums is not None and has_room and is_wanted:
                self._memory.checksums[slot] = checksums.reshape(self._memory.checksums[slot].shape)
                self._num_read += 1
            elif checksums is None and is_wanted:
                self._num_broken += 1
                log.warning("a block on disk is not what it should be: it is forgotten")
                self.forget(block)
            self._copied.append(Copied(block, slot, checksums is not None and has_room and is_wanted))

    def _clear(self, there: int) -> None:
        file = self._file
        assert file is not None
        self._submit(self._writer, lambda: file.clear(there), lambda _: None)
        file.free.append(there)  # who writes there comes after it

    def _fail(self, error: Exception) -> None:
        self._note(error)
        self._failed, self._file = self._failed or self._file, None

    def _note(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._failure:
            log.error("the disk tier of the checkpoint store does without its disk for now: %s", error)
        self._failure = str(error)


def _grow(file: DiskFile) -> range | OSError:
    """The new slots; or why there are none, which is no reason to leave the others alone."""
    try:
        return file.grow()
    except OSError as error:
        return error
