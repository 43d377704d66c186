"""One step as the library sees it: `struct batch` and the memory it points to."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from itertools import accumulate

import numpy as np

from holdfast.kernels.cpu.structs import SPLIT, TILE_TOKENS, Batch
from holdfast.kernels.interface import BatchLayout

PARTIAL_FLOATS = 1 << 21
"""Room for the states of splits: 8 MB."""


class StepBatch:
    """A `BatchLayout` on its way into C. `max_items`: attention items whose states there is room for."""

    def __init__(self, layout: BatchLayout, max_items: int) -> None:
        self.layout = layout
        self.query_starts = np.array([0, *accumulate(layout.query_lens)], dtype=np.int32)
        self.context_lens = np.array(layout.context_lens, dtype=np.int32)
        self.items = _items(layout.query_lens, layout.context_lens, max_items)
        self.c = Batch()
        self.fill(self.c)

    def fill(self, batch: Batch) -> None:
        """Point `batch` at this step; it must not outlive it."""
        layout = self.layout
        batch.rows = int(self.query_starts[-1])
        batch.requests = len(layout.query_lens)
        batch.positions = layout.positions.data_ptr()
        batch.slots = layout.slots.data_ptr()
        batch.query_starts = c_void_p(self.query_starts.ctypes.data)
        batch.context_lens = c_void_p(self.context_lens.ctypes.data)
        batch.tables = layout.block_tables.data_ptr()
        batch.table_width = layout.block_tables.stride(0)
        batch.items = c_void_p(self.items.ctypes.data)


def _items(query_lens: Sequence[int], context_lens: Sequence[int], max_items: int) -> np.ndarray:
    """int32 [B + 1]: the first attention item of each request, and their number. A decode over several splits of
    keys gets an item each if there is room for all: more to share out, the same sums."""
    tiles = [-(-length // TILE_TOKENS) for length in query_lens]
    splits = [
        -(-context // SPLIT) if length == 1 else count
        for length, context, count in zip(query_lens, context_lens, tiles, strict=True)
    ]
    counts = splits if sum(splits) <= max_items else tiles
    return np.array([0, *accumulate(counts)], dtype=np.int32)
