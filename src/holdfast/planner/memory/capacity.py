"""What fits into the memory of a plan's devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.planner.memory.engines import PLAIN, EngineMemory
from holdfast.planner.memory.ranks import (
    RankMemory,
    ServingLoad,
    ShapeTable,
    kv_bytes_of_sequence,
    kv_bytes_per_block,
    plan_memory,
)
from holdfast.planner.memory.shares import RankShare

MOST_SEQUENCES = 1 << 20
"""A number for no limit."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a replica's ranks have room for. The rank with the least decides: a sequence lives on all of them."""

    memory: tuple[RankMemory, ...]
    """Of each rank, for the load that was asked about."""
    spare: tuple[int, ...]
    """Of each rank: bytes left when the load is there; negative: missing."""
    kv_tokens: int
    """Tokens whose blocks fit beside everything else, over all sequences, none beyond a window given back."""
    max_context: int
    """Tokens of a single sequence, at most what the model knows."""
    max_sequences: int
    """Of the load's context, at a time."""

    @property
    def fits(self) -> bool:
        return min(self.spare) >= 0

    @property
    def tightest(self) -> int:
        """Index of the rank with the least to spare."""
        return self.spare.index(min(self.spare))


def kv_room(memory: RankMemory, device_bytes: int, engine: EngineMemory = PLAIN) -> int:
    """Bytes that an engine has for its KV cache on a rank; negative: it cannot even start."""
    return int((device_bytes * engine.utilization - memory.without_kv) * engine.kv_fraction)


def capacity_of(
    table: ShapeTable,
    shares: Sequence[RankShare],
    device_bytes: int | Sequence[int],
    load: ServingLoad,
    engine: EngineMemory = PLAIN,
    *,
    linked: bool = True,
    spread_over: int = 1,
) -> Capacity:
    """What the devices, of so many bytes each or all alike, have room for. See `rank_memory` for the switches."""
    sizes = [device_bytes] * len(shares) if isinstance(device_bytes, int) else list(device_bytes)
    memory = plan_memory(table, shares, load, engine, linked=linked, spread_over=spread_over)
    rooms = [kv_room(some, size, engine) for some, size in zip(memory, sizes, strict=True)]
    return Capacity(
        memory=memory,
        spare=tuple(room - some.kv_cache for room, some in zip(rooms, memory, strict=True)),
        kv_tokens=kv_capacity_tokens(table, shares, rooms, load),
        max_context=max_context(table, shares, rooms, load, engine),
        max_sequences=min(
            _max_sequences(table, share, some, size, load, engine)
            for share, some, size in zip(shares, memory, sizes, strict=True)
        ),
    )


def kv_capacity_tokens(
    table: ShapeTable, shares: Sequence[RankShare], rooms: Sequence[int], load: ServingLoad
) -> int:
    """Tokens whose blocks fit into `rooms`, bytes for the KV cache of each rank. A rank whose layers cache no tokens
    sets no limit; where none does, as many as the model knows."""
    fewest: int | None = None
    for share, room in zip(shares, rooms, strict=True):
        if size := kv_bytes_per_block(table, share, load):
            blocks = max(room, 0) // size
            fewest = blocks if fewest is None else min(fewest, blocks)
    return table.shape.max_context if fewest is None else fewest * load.block_size


def max_context(
    table: ShapeTable,
    shares: Sequence[RankShare],
    rooms: Sequence[int],
    load: ServingLoad,
    engine: EngineMemory = PLAIN,
) -> int:
    """Tokens of the longest single sequence that fits into `rooms`; 0: none does."""

    def fits(context: int) -> bool:
        return all(
            kv_bytes_of_sequence(table, share, context, load, engine) <= room
            for share, room in zip(shares, rooms, strict=True)
        )

    return _largest(fits, table.shape.max_context)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1 … most that fits, where all below one that does fit too; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _max_sequences(  # noqa: PLR0917
    table: ShapeTable, share: RankShare, memory: RankMemory, size: int, load: ServingLoad, engine: EngineMemory
) -> int:
    """On one rank, of `size` bytes. Each sequence brings its keys and values, and on the last stage a row of logits;
    one that brings nothing to this rank is not held up by it."""
    room = size * engine.utilization - (memory.without_kv - memory.logits)
    logits = table.shape.vocab * engine.bytes_per_logit if share.is_last else 0
    each = kv_bytes_of_sequence(table, share, load.context, load, engine) / engine.kv_fraction + logits
    if room <= 0:
        return 0
    return int(room / each) if each else MOST_SEQUENCES
