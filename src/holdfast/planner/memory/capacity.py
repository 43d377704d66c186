"""What fits into the memory of a plan's devices, and, where a load does not, what it would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from holdfast.planner.memory.engines import PLAIN, EngineMemory
from holdfast.planner.memory.ranks import (
    KV_FORMATS,
    RankMemory,
    ServingLoad,
    ShapeTable,
    kv_bytes_of_sequence,
    kv_bytes_per_block,
    plan_memory,
)
from holdfast.planner.memory.shares import RankShare, even_shares

_MOST_RANKS = 64
"""Tensor degrees are tried up to here."""
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


# --- when it does not fit ---


@dataclass(frozen=True, slots=True)
class Remedies:
    """Each by itself would make a load fit that does not; None: no such thing would."""

    device_bytes: int
    """Memory that every device would need."""
    tensor: int | None
    """Ranks of each stage."""
    pipeline: int | None
    """Stages."""
    kv_format: str | None
    sequences: int | None
    context: int | None


def remedies(
    table: ShapeTable,
    device_bytes: int,
    load: ServingLoad,
    engine: EngineMemory = PLAIN,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    linked: bool = True,
) -> Remedies:
    """What would make `load` fit devices of so many bytes in an even plan. Tensor degrees are tried by doubling, as
    long as every rank has a query head."""
    num_layers = table.shape.num_layers

    def fits(tensor: int, pipeline: int, load: ServingLoad) -> bool:
        shares = even_shares(num_layers, tensor=tensor, pipeline=pipeline, expert=expert)
        memory = plan_memory(table, shares, load, engine, linked=linked)
        return all(kv_room(some, device_bytes, engine) >= some.kv_cache for some in memory)

    shares = even_shares(num_layers, tensor=tensor, pipeline=pipeline, expert=expert)
    memory = plan_memory(table, shares, load, engine, linked=linked)
    heads = max((kind.attention.num_heads for kind in table.kinds if kind.attention), default=1)
    most = min(heads, _MOST_RANKS)
    degrees = [tensor << double for double in range(1, most.bit_length()) if tensor << double <= most]
    formats = [name for name in ("fp8", "int4") if KV_FORMATS[name].bits < load.kv_format.bits]
    return Remedies(
        device_bytes=max(_device_bytes(some, engine) for some in memory),
        tensor=next((degree for degree in degrees if fits(degree, pipeline, load)), None),
        pipeline=next((count for count in range(pipeline + 1, num_layers + 1) if fits(tensor, count, load)), None),
        kv_format=next(
            (name for name in formats if fits(tensor, pipeline, replace(load, kv_format=KV_FORMATS[name]))), None
        ),
        sequences=_largest(lambda some: fits(tensor, pipeline, replace(load, sequences=some)), load.sequences)
        or None,
        context=_largest(lambda some: fits(tensor, pipeline, replace(load, context=some)), load.context) or None,
    )


def _device_bytes(memory: RankMemory, engine: EngineMemory) -> int:
    return int((memory.kv_cache / engine.kv_fraction + memory.without_kv) / engine.utilization) + 1


def describe_shortfall(
    memory: RankMemory, device_bytes: int, remedies: Remedies, load: ServingLoad, engine: EngineMemory = PLAIN
) -> str:
    """One sentence: what a rank would need, and each thing that would help. Bytes in GB."""
    parts = (
        ("weights", memory.weights),
        ("KV cache", memory.kv_cache),
        ("activations", memory.activations + memory.logits),
        ("communication", memory.communication),
        ("reserve", memory.reserve),
    )
    needs = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size)
    ways = [f"devices of {remedies.device_bytes / 1e9:.1f} GB"]
    if remedies.tensor:
        ways.append(f"tensor degree {remedies.tensor}")
    if remedies.pipeline:
        ways.append(f"{remedies.pipeline} stages")
    if remedies.kv_format:
        ways.append(f"a KV cache in {remedies.kv_format}")
    if remedies.sequences and remedies.sequences < load.sequences:
        ways.append(f"{remedies.sequences} sequences instead of {load.sequences}")
    if remedies.context and remedies.context < load.context:
        ways.append(f"a context of {remedies.context} tokens instead of {load.context}")
    usable = f"{device_bytes / 1e9:.1f} GB"
    if engine.utilization < 1:
        usable += f", of which {engine.name} takes {device_bytes * engine.utilization / 1e9:.1f} GB"
    return (
        f"a rank needs {memory.total / 1e9:.1f} GB ({needs}), a device has {usable}; "
        f"it would fit with {' or '.join(ways)}"
    )
