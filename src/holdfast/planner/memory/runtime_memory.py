"""What our own runtime allocates on CPUs for one rank of a plan, counted as it packs, pads and shares.

`memory.ranks` knows any model on any device; here is the form that the CPU kernels give to weights, pages and
buffers, for a decoder the runtime serves. Each figure has its source in the code that allocates: named with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from holdfast.core.config import SchedulerConfig
from holdfast.core.plan import Place, ReplicaPlan
from holdfast.core.spec import DecoderSpec
from holdfast.models.parameters import Packing, Parameter, norms_at, packings_at, parameters
from holdfast.parallel.segment import layout_of
from holdfast.planner.memory.runtime_format import GROUP, GROUP_BYTES, RuntimeFormat, format_of
from holdfast.planner.memory.runtime_workspace import workspace_bytes

_PANEL = 32
"""Output columns of a panel, which are padded to whole ones (kernels.cpu.packing)."""
_SPLIT_STATES = 4 << 21
"""Of the attention's splits (kernels.cpu.step.PARTIAL_FLOATS)."""


@dataclass(frozen=True, slots=True)
class RuntimeMemory:
    """Bytes that the worker of one rank allocates beside the interpreter and its libraries."""

    weights: int
    """Packed matrices, their padding and biases."""
    norms: int
    tables: int
    """Of rotary positions, and ALiBi's slopes."""
    kv_cache: int
    workspace: int
    """Results between the operations of a step."""
    logits: int
    """Of as many rows as can be scored at once, for the time of a step; of a vocabulary that is cut, the rank's share
    as well."""
    split_states: int = _SPLIT_STATES
    """Backed by memory as far as splits of long contexts have reached into it."""

    @property
    def total(self) -> int:
        return sum(int(getattr(self, part.name)) for part in fields(self))


def runtime_memory(
    spec: DecoderSpec,
    place: Place,
    num_blocks: int,
    how: RuntimeFormat,
    *,
    max_positions: int | None = None,
    shared_by: int = 1,
) -> RuntimeMemory:
    """Of the rank at `place` with `num_blocks` blocks of KV cache. `max_positions`: of the longest request, if that
    is less than the model's. `shared_by`: replicas that hold their weights once between them (`--shard-weights`)."""
    wanted, packs = parameters(spec), packings_at(spec, place)
    if how.repeated_head and place.is_first:
        packs.pop("head", None)
    positions = max_positions or spec.max_positions
    used = {layer.rope for layer in spec.layers[slice(*place.layers)]} - {None}
    ropes = sum(positions * rope.rotary_dim * 4 for index, rope in enumerate(spec.ropes) if index in used)
    weights = sum(packed_bytes(packing, wanted, how) for packing in packs.values())
    return RuntimeMemory(
        weights=-(-weights // shared_by),
        norms=sum(4 * math.prod(wanted[name].shape) for name in norms_at(spec, place)),
        tables=ropes + 4 * spec.num_heads * spec.alibi,
        kv_cache=num_blocks * runtime_block_bytes(spec, place, how),
        workspace=workspace_bytes(spec, place, packs, how),
        logits=4 * how.logit_rows * _logit_columns(spec, place) if place.is_last else 0,
    )


def _logit_columns(spec: DecoderSpec, place: Place) -> int:
    own = place.shard.vocab[1] - place.shard.vocab[0]
    return spec.vocab_size + (own if len(place.ranks) > 1 else 0)


def runtime_block_bytes(spec: DecoderSpec, place: Place, how: RuntimeFormat) -> int:
    """Bytes of a block of KV cache on a rank, over its layers (cache.pages.bytes_per_block); what lies outside a
    sliding window stays."""
    (first, last), (first_head, last_head) = place.layers, place.shard.kv_heads
    return 2 * (last - first) * (last_head - first_head) * spec.head_dim * how.block_size * how.itemsize


def runtime_num_blocks(  # noqa: PLR0917
    spec: DecoderSpec, place: Place, how: RuntimeFormat, budget: int, scheduler: SchedulerConfig, longest: int
) -> int:
    """Blocks that a rank makes of `budget` bytes (`--kv-cache-memory-bytes`): no more than all requests can fill,
    each `longest` tokens (worker.start)."""
    enough = scheduler.max_num_seqs * -(-longest // how.block_size)
    return min(enough, budget // runtime_block_bytes(spec, place, how))


def exchange_bytes(replica: ReplicaPlan, spec: DecoderSpec, scheduler: SchedulerConfig) -> int:
    """Of the memory that the ranks of a replica share, once for all of them (parallel.segment); only what is written
    to is backed by memory."""
    return layout_of(replica, spec, scheduler).num_bytes


# --- weights ---


def packed_bytes(packing: Packing, wanted: Mapping[str, Parameter], how: RuntimeFormat) -> int:
    """Bytes of a packing as the CPU kernels hold it (kernels.cpu.packing): whole panels of 32 rows; in bfloat16 an
    even number of inputs per virtual shard; biases in float32."""
    rows, columns = packed_shape(packing, wanted)
    sets = 2 if packing.gated else 1
    panels = -(-(rows // sets) // _PANEL) * sets
    bias = any(f"{module}.bias" in wanted for module in packing.modules)
    if packing.pieces is None:
        matrix = panels * _panel_bytes(format_of(packing, how), packing.shards or (columns,), how)
        return matrix + (panels * _PANEL * 4 if bias else 0)
    borders, total = (0, *(packing.shards or (columns,))), 0
    for first, last in packing.pieces:  # each a matrix of its own
        ends = tuple(border - borders[first] for border in borders[first + 1 : last + 1])
        total += panels * _panel_bytes(format_of(packing, how), ends, how)
    return total + (rows * 4 if bias else 0)


def packed_shape(packing: Packing, wanted: Mapping[str, Parameter]) -> tuple[int, int]:
    """Rows of all modules together that are here, and all columns."""
    rows = 0
    for index, module in enumerate(packing.modules):
        some = packing.rows_of(index)
        rows += wanted[f"{module}.weight"].shape[0] if some is None else some[1] - some[0]
    return rows, wanted[f"{packing.modules[0]}.weight"].shape[1]


def _panel_bytes(kind: str, ends: tuple[int, ...], how: RuntimeFormat) -> int:
    """Of 32 rows, whose virtual shards end at `ends`."""
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    if kind in GROUP_BYTES:
        return sum(sizes) // GROUP * _PANEL * GROUP_BYTES[kind]
    if how.itemsize == 4:
        return sum(sizes) * _PANEL * 4
    return sum(-(-size // 2) for size in sizes) * _PANEL * 4
