"""Where packed weights and the intermediate results of a recorded step live."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_CHUNK = 64 << 20
_ALIGNMENT = 64


class WeightMemory(Protocol):
    """Where packed weights live."""

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, uninitialised, on a cache line's border. Thread-safe where several threads pack."""
        ...

    def share(self, panels: int) -> tuple[int, int]:
        """Of a matrix's panels: the first, and the end, of those that are to be filled here."""
        ...


class Arena:
    """Memory of this process alone: cut from large pieces, so that the system can back it with huge pages (reading
    weights from 4 KB pages costs some 15 % of the bandwidth). numpy asks for them for large arrays by itself. What
    is no longer referred to goes to the next that takes as much; views of it do not count. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._chunk = np.empty(0, dtype=np.uint8)
        self._used = 0

    def take(self, size: int) -> np.ndarray:
        with self._lock:
            if free := self._free[size]:
                return self._lend(free.pop())
            start = self._used + -(self._chunk.ctypes.data + self._used) % _ALIGNMENT
            if start + size > self._chunk.size:
                self._chunk = np.empty(max(_CHUNK, size + _ALIGNMENT), dtype=np.uint8)
                start = -self._chunk.ctypes.data % _ALIGNMENT
            self._used = start + size
            return self._lend(self._chunk[start : start + size])

    def share(self, panels: int) -> tuple[int, int]:
        return 0, panels

    def _lend(self, memory: np.ndarray) -> np.ndarray:
        lent = memory.view()
        weakref.finalize(lent, self._free[memory.size].append, memory).atexit = False
        return lent


class Workspace:
    """Tensors of a recorded step. One that is no longer referred to while the step is being recorded gives its memory
    to the next of its size, in the replay as well: operations run in the recorded order."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def tensor(self, rows: int, width: int, dtype: torch.dtype, *, dense: bool = False) -> Tensor:
        """[rows, width], uninitialised; `dense`: without room between the rows."""
        stride = width if dense else padded(width, dtype)
        size = rows * stride * dtype.itemsize
        free = self._free[size]
        memory = free.pop() if free else _aligned(size)
        lent = memory.view()  # dies with the last tensor that shares its storage
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(rows, stride)[:, :width]


def new_tensor(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width], uninitialised, as the kernels like it."""
    return torch.empty(rows, padded(width, dtype), dtype=dtype)[:, :width]


def padded(width: int, dtype: torch.dtype) -> int:
    """The distance between rows: never a multiple of 1 KB, or a tile's rows share a few lines of the L1 cache."""
    return width + _ALIGNMENT // dtype.itemsize if width * dtype.itemsize % 1024 == 0 else width


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
