"""Copies of KV blocks between a device's pages and the checkpoint store.

On CPUs a copy is done when it is asked for, between two steps. On a GPU the blocks are gathered on the stream of the
steps, so no later step can have changed them, and go to pinned memory on a stream beside; when they are there, a look
in passing (`pump`) puts them into the store. A copy that the GPU or the host has no memory for is left out: it is of
use, and nobody waits for it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.cache.pages import KVPages
from holdfast.cache.store import StoreMemory
from holdfast.core.plan import Place
from holdfast.worker.transfer import upload

log = logging.getLogger(__name__)

Entry = tuple[int, int, bytes]
"""Block, slot, prefix hash."""


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    """Blocks that a GPU sends: `cells`, pinned, [N blocks, L, G, K and V], when `there` has happened."""

    there: Any
    cells: Tensor
    entries: list[Entry]


class BlockCopier:
    """One rank's: of the layers and KV heads that `place` has."""

    def __init__(self, pages: KVPages, memory: StoreMemory, place: Place) -> None:
        self._memory = memory
        self._layers, self._heads = place.layers, place.shard.kv_heads
        self._device = pages.data.device
        self._cells = pages.data.view(torch.uint8).flatten(4)
        """[K and V, L, P blocks, G, bytes]."""
        self._on_their_way: deque[_OnItsWay] = deque()
        self._beside = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def is_idle(self) -> bool:
        return not self._on_their_way

    def save(self, entries: list[Entry]) -> None:
        """Copy blocks into their slots; on a GPU: begin to."""
        if self._beside is not None:
            try:
                self._send(entries)
            except RuntimeError as error:  # the host's memory that is to be pinned has no OutOfMemoryError
                if "out of memory" not in str(error):
                    raise
                log.warning(
                    "the device or its host has no memory to send %d blocks to the store: not kept", len(entries)
                )
            return
        for block, slot, prefix_hash in entries:
            cells = self._cells[:, :, block].permute(1, 2, 0, 3).contiguous()
            self._memory.write(slot, prefix_hash, cells.numpy(), self._layers, self._heads)

    @torch.inference_mode()
    def load(self, entries: list[Entry]) -> list[int]:
        """Fill blocks from their slots; places in `entries` of those that are not what they should be."""
        broken = []
        for place, (block, slot, prefix_hash) in enumerate(entries):
            cells = self._memory.copy(slot, prefix_hash, self._layers, self._heads)
            if cells is None or not self._fill(block, cells):
                broken.append(place)
        return broken

    def _fill(self, block: int, cells: np.ndarray) -> bool:
        """Whether the device, and its host, had the memory."""
        try:
            self._cells[:, :, block] = upload(cells, self._device).permute(2, 0, 1, 3)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            return False
        return True

    def pump(self) -> None:
        """Put what has arrived into the store."""
        while self._on_their_way and self._on_their_way[0].there.query():
            arrived = self._on_their_way.popleft()
            for cells, (_, slot, prefix_hash) in zip(arrived.cells.numpy(), arrived.entries, strict=True):
                self._memory.write(slot, prefix_hash, cells, self._layers, self._heads)

    @torch.inference_mode()
    def _send(self, entries: list[Entry]) -> None:
        assert self._beside is not None
        blocks = upload(np.array([block for block, _, _ in entries], dtype=np.int64), self._device)
        gathered = self._cells.index_select(2, blocks).permute(2, 1, 3, 0, 4).contiguous()
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            pinned = torch.empty(gathered.shape, dtype=torch.uint8, pin_memory=True)
            pinned.copy_(gathered, non_blocking=True)
            gathered.record_stream(self._beside)
            self._on_their_way.append(_OnItsWay(self._beside.record_event(), pinned, entries))
