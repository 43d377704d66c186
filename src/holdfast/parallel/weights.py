"""Weights that replicas of one machine hold together: each fills a share of the memory, all multiply with all of it.

ZeRO's idea for inference: of n replicas each keeps 1/n of every layer's weights. Where processes share memory, a
layer is gathered by being mapped: nothing is copied before its use, and nobody waits for anybody after the start.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time

import numpy as np

from holdfast.core.errors import StartupError
from holdfast.core.plan import Range
from holdfast.parallel.segment import LINE, PAGE

HEADER = PAGE
"""Bytes before the weights: how much each process has taken."""
_POLL_SECONDS = 0.01


class SharedWeights:
    """`WeightMemory` of process `index` of `count`, which must all take the same sizes in the same order. The file
    behind `descriptor` is larger than what they take; only what is written to takes memory."""

    def __init__(self, descriptor: int, index: int, count: int) -> None:
        assert 0 <= index < count <= HEADER // 8, (index, count)
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        with contextlib.suppress(OSError):  # where the system has none, or gives them to nobody
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._taken_by = self._bytes[: 8 * count].view(np.int64)
        """Of each process: bytes it took in all, once it has filled its share."""
        self._index = index
        self._count = count
        self._used = HEADER

    def take(self, size: int) -> np.ndarray:
        """`size` bytes on a cache line's border; the same for whoever takes them as the same matrix."""
        start = self._used + -self._used % LINE
        if start + size > self._bytes.size:
            raise StartupError(f"the weights take more than the {self._bytes.size} bytes of memory made for them")
        self._used = start + size
        return self._bytes[start : self._used]

    def share(self, panels: int) -> Range:
        """Of a matrix's panels, those that this process fills: none, when one that died has left them here."""
        if self._taken_by[self._index]:
            return 0, 0
        return panels * self._index // self._count, panels * (self._index + 1) // self._count

    def wait_for_others(self) -> None:
        """Until every process has filled its share. Whoever started them ends this one if another fails."""
        self._taken_by[self._index] = self._used
        while not self._taken_by.all():
            time.sleep(_POLL_SECONDS)
        if len(set(self._taken_by.tolist())) > 1:
            raise StartupError(f"replicas that hold their weights together packed {self._taken_by.tolist()} bytes")
