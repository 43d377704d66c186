"""What our own runtime allocates on CPUs for one rank of a plan, counted as it packs, pads and shares.

`planner.memory` knows any model on any device; here is the form that the CPU kernels give to weights, pages and
buffers, for a decoder the runtime serves. Each figure has its source in the code that allocates: named with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from holdfast.core.config import SchedulerConfig
from holdfast.core.plan import Place, ReplicaPlan
from holdfast.core.spec import DecoderSpec
from holdfast.models.parameters import Packing, Parameter, norms_at, packings_at, parameters
from holdfast.parallel.segment import StageTrees, layout_of

_PANEL = 32
"""Output columns of a panel, which are padded to whole ones (kernels.cpu.packing)."""
_GROUP = 32
_GROUP_BYTES: Mapping[str, int] = MappingProxyType({"Q8_0": 34, "Q4_0": 18, "Q4_1": 20})
"""Of 32 numbers that share a scale (kernels.interface.GROUP_BYTES): those that stay quantized."""
_LINE = 64
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
    split_states: int = _SPLIT_STATES

    @property
    def total(self) -> int:
        return sum(int(getattr(self, part.name)) for part in fields(self))


@dataclass(frozen=True, slots=True)
class RuntimeFormat:
    """How a service holds its numbers."""

    itemsize: int = 2
    """Bytes of a number in the model's dtype: 2 (bfloat16) or 4 (float32)."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Of matrices by the names of `models.parameters`, "layers.0.attn.q.weight": Q8_0, Q4_0 or Q4_1, where the
    checkpoint has them so."""
    repeated_head: bool = False
    """The checkpoint stores the embeddings again as the head, which is then not held twice."""
    block_size: int = 16
    max_tokens: int = 512
    """Of a step (`--max-num-batched-tokens`)."""
    activation_bits: int = 16
    """Of rows that meet quantized weights (`--quantized-activations`)."""
    multiplies_bfloat16: bool = True
    """Whether the instruction set has products of bfloat16; without, rows are converted to float32 for them."""


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
    ropes = sum(positions * rope.rotary_dim // 2 * 2 * 4 for rope in spec.ropes)
    weights = sum(packed_bytes(packing, wanted, how) for packing in packs.values())
    return RuntimeMemory(
        weights=-(-weights // shared_by),
        norms=sum(4 * math.prod(wanted[name].shape) for name in norms_at(spec, place)),
        tables=ropes + 4 * spec.num_heads * spec.alibi,
        kv_cache=num_blocks * runtime_block_bytes(spec, place, how),
        workspace=_workspace_bytes(spec, place, packs, wanted, how),
    )


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
    rows, columns = _shape_of(packing, wanted)
    sets = 2 if packing.gated else 1
    panels = -(-(rows // sets) // _PANEL) * sets
    bias = any(f"{module}.bias" in wanted for module in packing.modules)
    if packing.pieces is None:
        matrix = panels * _panel_bytes(_format_of(packing, how), packing.shards or (columns,), how)
        return matrix + (panels * _PANEL * 4 if bias else 0)
    borders, total = (0, *(packing.shards or (columns,))), 0
    for first, last in packing.pieces:  # each a matrix of its own
        ends = tuple(border - borders[first] for border in borders[first + 1 : last + 1])
        total += panels * _panel_bytes(_format_of(packing, how), ends, how)
    return total + (rows * 4 if bias else 0)


def _shape_of(packing: Packing, wanted: Mapping[str, Parameter]) -> tuple[int, int]:
    """Rows of all modules together that are here, and all columns."""
    rows = 0
    for index, module in enumerate(packing.modules):
        some = packing.rows_of(index)
        rows += wanted[f"{module}.weight"].shape[0] if some is None else some[1] - some[0]
    return rows, wanted[f"{packing.modules[0]}.weight"].shape[1]


def _format_of(packing: Packing, how: RuntimeFormat) -> str:
    """In which the matrices are packed: as stored, if they are quantized alike, are to stay so, and no virtual shard
    ends within a group; else "dense"."""
    kinds = {how.stored.get(f"{module}.weight", "dense") for module in packing.modules}
    if len(kinds) > 1 or how.itemsize == 4 or any(end % _GROUP for end in packing.shards):
        return "dense"
    kind = kinds.pop()
    return kind if kind in _GROUP_BYTES else "dense"


def _panel_bytes(kind: str, ends: tuple[int, ...], how: RuntimeFormat) -> int:
    """Of 32 rows, whose virtual shards end at `ends`."""
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    if kind in _GROUP_BYTES:
        return sum(sizes) // _GROUP * _PANEL * _GROUP_BYTES[kind]
    if how.itemsize == 4:
        return sum(sizes) * _PANEL * 4
    return sum(-(-size // 2) for size in sizes) * _PANEL * 4


# --- workspace ---


def _workspace_bytes(
    spec: DecoderSpec, place: Place, packs: Mapping[str, Packing], wanted: Mapping[str, Parameter], how: RuntimeFormat
) -> int:
    """Of a recorded step (kernels.cpu.memory.Workspace): a result's memory goes to the next of its very size, so
    what counts is how many of a size there are at once, and sizes add up."""
    most: Counter[tuple[int, int]] = Counter()
    for layer in range(*place.layers):
        for live in _live_at_once(spec, place, layer, packs, wanted, how):
            counts = Counter(live)
            for size, count in counts.items():
                most[size] = max(most[size], count)
    return sum(count * _row_bytes(width, itemsize) * how.max_tokens for (width, itemsize), count in most.items())


def _row_bytes(width: int, itemsize: int) -> int:
    """With the room between rows that keeps them off a multiple of 1 KB (kernels.cpu.memory.padded)."""
    size = width * itemsize
    return size + _LINE if size % 1024 == 0 else size


def _live_at_once(  # noqa: PLR0917
    spec: DecoderSpec,
    place: Place,
    layer: int,
    packs: Mapping[str, Packing],
    wanted: Mapping[str, Parameter],
    how: RuntimeFormat,
) -> list[list[tuple[int, int]]]:
    """Of one layer, the rows (width, bytes of a number) that are held at once: at its attention, and at its MLP."""
    size, hidden, name = how.itemsize, spec.hidden_size, f"layers.{layer}"
    alone = len(place.ranks) == 1
    stream, normed = (hidden, 4), (hidden, size)
    queries = place.shard.query_heads[1] - place.shard.query_heads[0]
    qkv, heads = _shape_of(packs[f"{name}.attn.qkv"], wanted)[0], queries * spec.head_dim
    trees = StageTrees.of(place.replica, place.stage, spec)
    base = [stream, normed] if spec.block != "parallel" or spec.shared_parallel_norm else [stream, normed, normed]
    into = _operands(packs[f"{name}.attn.qkv"], hidden, how)
    out = _operands(packs[f"{name}.attn.o"], heads, how)
    sums = [] if alone else [stream] * len(trees.attention.pieces[place.index])
    attention = [*base, (qkv, size), (heads, size)]
    moments = [[*base, (qkv, size), *into], [*attention, *sums, *out]]
    if spec.layers[layer].moe:
        return moments
    up = packs[f"{name}.mlp.up"]
    columns = _shape_of(up, wanted)[0] // (2 if up.gated else 1)
    sums = [] if alone else [stream] * len(trees.mlp.pieces[place.index])
    moments.append([*base, (columns, size), *_operands(up, hidden, how)])
    moments.append([*base, (columns, size), *sums, *_operands(packs[f"{name}.mlp.down"], columns, how)])
    return moments


def _operands(packing: Packing, columns: int, how: RuntimeFormat) -> list[tuple[int, int]]:
    """What a product makes of its rows first: codes and scales for quantized weights, float32 where bfloat16 cannot
    be multiplied."""
    if _format_of(packing, how) != "dense":
        return [(columns // _GROUP * 2, 4), (how.activation_bits // 8 * columns, 1)]
    return [(columns, 4)] if how.itemsize == 2 and not how.multiplies_bfloat16 else []
