"""What each rank of a plan needs of memory: weights, KV cache, activations, communication, reserve.

Pure arithmetic over a `ModelShape` and a `RankShare`. `table_of` adds up the shape once; from then on a rank costs a
few multiplications per *kind* of layer, so that a search can ask thousands of times. What fits then says
`memory.capacity`; what differs between serving engines, `memory.engines`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from types import MappingProxyType

from holdfast.planner.memory.engines import PLAIN, EngineMemory
from holdfast.planner.memory.shares import RankShare
from holdfast.planner.shapes.shape import Attention, Layer, Matrix, ModelShape

_WHOLE = 1e-9
"""Less than any share of a head: 1/3 of 48 heads is 16, whatever the last bit of 1/3 says."""
_HALF = 2
"""Bytes of 16 bits: of embeddings, norms, activations and states."""
GATHERED_LAYERS = 2
"""Of weights that are spread over replicas: layers that a rank has whole, the one in use and the next."""


# --- formats of the KV cache ---


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a number of the KV cache is kept: `bits`, and for every `group` numbers `scale_bits` more."""

    bits: int = 16
    scale_bits: int = 0
    group: int = 1

    @property
    def bytes_per_number(self) -> float:
        return (self.bits + self.scale_bits / self.group) / 8


KV_FORMATS: Mapping[str, KVFormat] = MappingProxyType(
    {
        "float32": KVFormat(32),
        "bfloat16": KVFormat(16),
        "float16": KVFormat(16),
        "fp8": KVFormat(8),
        "int8": KVFormat(8, scale_bits=16, group=32),
        "int4": KVFormat(4, scale_bits=16, group=32),
    }
)
"""`int8` and `int4` are laid out as GGUF's Q8_0 and Q4_0: a float16 scale for 32 numbers (ggml-common.h, block_q8_0
and block_q4_0). Scales of fp8 are one per layer: no bytes to speak of."""


@dataclass(frozen=True, slots=True)
class ServingLoad:
    """What a rank must have memory for."""

    context: int = 2048
    """Tokens of each sequence, its output included."""
    sequences: int = 1
    """At a time, in one replica; as many rows of logits."""
    batched_tokens: int = 2048
    """In a step, at most."""
    kv_format: KVFormat = KVFormat()
    block_size: int = 16
    """Tokens of a block; a sequence takes whole blocks."""


# --- what a rank needs ---


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank needs, by what for."""

    attention_weights: int = 0
    mlp_weights: int = 0
    """Shared experts and routers among them."""
    expert_weights: int = 0
    embedding_weights: int = 0
    """Embeddings, head, positions; towers for images or sound."""
    other_weights: int = 0
    """Norms, biases, convolutions."""
    gathered_weights: int = 0
    """Copies of layers whose weights are spread over replicas and gathered before their use."""
    kv_cache: int = 0
    """Keys and values, latents, and the states of linear attention."""
    activations: int = 0
    logits: int = 0
    communication: int = 0
    reserve: int = 0
    """Device context, code of kernels, libraries' workspace, graphs."""

    @property
    def weights(self) -> int:
        return (
            self.attention_weights
            + self.mlp_weights
            + self.expert_weights
            + self.embedding_weights
            + self.other_weights
            + self.gathered_weights
        )

    @property
    def without_kv(self) -> int:
        return self.weights + self.activations + self.logits + self.communication + self.reserve

    @property
    def total(self) -> int:
        return self.without_kv + self.kv_cache

    def parts(self) -> dict[str, int]:
        """Name → bytes, in order, of those that are there."""
        named = {field.name: int(getattr(self, field.name)) for field in fields(self)}
        return {name: size for name, size in named.items() if size}


# --- a shape, added up ---


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One kind of layer: numbers of its weights by what cuts them, and what its steps need per token."""

    attention: Attention | None
    by_query_heads: int
    """Queries, their gates, and the output; what a linear attention cuts by heads."""
    per_kv_head: int
    """Columns of q, k and v's matrix that make one KV head's keys and values, with all their inputs."""
    attention_replicated: int
    by_columns: int
    mlp_replicated: int
    """The router."""
    other: int
    expert: int
    """Of one routed expert's matrices."""
    expert_biases: int
    num_experts: int
    num_chosen: int
    attention_live: int
    """Numbers per token that lie between the products of the attention, cut by query heads."""
    mlp_live: int
    """The same of the MLP, cut by columns."""
    expert_made: int
    """What the up product of one chosen expert makes of a token, and its gate."""
    expert_taken: int
    """What its down product takes. Both cut by the expert's columns."""


@dataclass(frozen=True, slots=True)
class ShapeTable:
    """A `ModelShape` as the arithmetic wants it. Made once per model by `table_of`."""

    shape: ModelShape
    kinds: tuple[LayerSizes, ...]
    layers_before: tuple[tuple[int, ...], ...]
    """Of each kind: how many layers are of it before layer 0, 1, … L."""
    table: int
    """Numbers of the embedding table; of the head as well."""

    def counts(self, first: int, last: int) -> list[tuple[LayerSizes, int]]:
        """The kinds among layers first … last - 1, and how many there are of each."""
        some = [
            (kind, before[last] - before[first]) for kind, before in zip(self.kinds, self.layers_before, strict=True)
        ]
        return [(kind, count) for kind, count in some if count]


def table_of(shape: ModelShape) -> ShapeTable:
    """Add up a shape, equal layers once."""
    numbers: dict[Layer, int] = {}
    by_id: dict[int, int] = {}  # a layer's hash walks through all of it; equal layers are mostly one object
    kind_of = []
    for layer in shape.layers:
        if id(layer) not in by_id:
            by_id[id(layer)] = numbers.setdefault(layer, len(numbers))
        kind_of.append(by_id[id(layer)])
    before = [tuple(accumulate((kind == number for kind in kind_of), initial=0)) for number in range(len(numbers))]
    return ShapeTable(
        shape=shape,
        kinds=tuple(_sizes(layer) for layer in numbers),
        layers_before=tuple(before),
        table=shape.vocab * shape.hidden,
    )


def is_mlp_matrix(name: str) -> bool:
    """By the names that shapes give: of MLPs and shared experts (`shape.mlp_matrices`), and of what leads to routed
    ones. All others are the attention's."""
    return name.removeprefix("shared ") in {"gate_up", "up", "down", "router", "latent up", "latent down"}


def _sizes(layer: Layer) -> LayerSizes:
    attention, experts = layer.attention, layer.experts
    mlp = [matrix for matrix in layer.matrices if is_mlp_matrix(matrix.name)]
    attending = [matrix for matrix in layer.matrices if not is_mlp_matrix(matrix.name)]
    per_kv_head = 0
    if attention is not None and attention.kind == "softmax":
        width = attention.head_dim + attention.value_dim
        per_kv_head = sum(matrix.inputs * width for matrix in attending if matrix.name == "qkv")
    kv_numbers = per_kv_head * attention.num_kv_heads if attention else 0
    return LayerSizes(
        attention=attention,
        by_query_heads=_params(attending, cut=True) - kv_numbers,
        per_kv_head=per_kv_head,
        attention_replicated=_params(attending, cut=False),
        by_columns=_params(mlp, cut=True),
        mlp_replicated=_params(mlp, cut=False),
        other=layer.other_params,
        expert=experts.params_each - experts.biases if experts else 0,
        expert_biases=experts.biases if experts else 0,
        num_experts=experts.num_experts if experts else 0,
        num_chosen=experts.num_chosen if experts else 0,
        attention_live=_made(attending) + _taken(attending),
        mlp_live=_made(mlp) + _taken(mlp),
        expert_made=_made(experts.matrices) if experts else 0,
        expert_taken=_taken(experts.matrices) if experts else 0,
    )


def _params(matrices: Sequence[Matrix], *, cut: bool) -> int:
    return sum(matrix.params for matrix in matrices if (matrix.cut != "replicated") == cut)


def _made(matrices: Sequence[Matrix]) -> int:
    """Outputs of the products that are cut by columns: q, k, v; gate and up."""
    return sum(matrix.outputs for matrix in matrices if matrix.cut == "column")


def _taken(matrices: Sequence[Matrix]) -> int:
    """Inputs of those that are cut by rows: the attention's result; the activated columns."""
    return sum(matrix.inputs for matrix in matrices if matrix.cut == "row")


# --- a rank ---


def _whole(count: int, share: float) -> int:
    """Whole things that a share of them takes hold of."""
    return math.ceil(count * share - _WHOLE)


def kv_numbers_per_token(attention: Attention | None, share: RankShare) -> int:
    """Numbers that a rank caches of a token in one layer: of the KV heads that its query heads read, which with fewer
    KV heads than ranks several ranks hold; of a latent and an index, which all heads share, everything."""
    if attention is None or attention.kind == "linear":
        return 0
    if attention.kind == "latent":
        return attention.latent_dim + attention.index_dim
    heads = _whole(attention.num_kv_heads, share.kv_heads)
    return heads * (attention.head_dim + attention.value_dim) + attention.index_dim


def kv_bytes_per_block(table: ShapeTable, share: RankShare, load: ServingLoad) -> int:
    """Bytes of one block of tokens over all of a rank's layers that cache tokens."""
    numbers = sum(count * kv_numbers_per_token(kind.attention, share) for kind, count in table.counts(*share.layers))
    return math.ceil(numbers * load.block_size * load.kv_format.bytes_per_number)


def kv_bytes_of_sequence(
    table: ShapeTable, share: RankShare, context: int, load: ServingLoad, engine: EngineMemory = PLAIN
) -> int:
    """Bytes that a rank keeps of one sequence of `context` tokens: whole blocks of keys and values, of a window no
    more than can reach into it, and states of linear attention in 16 bits."""
    size, total = load.block_size, 0.0
    for kind, count in table.counts(*share.layers):
        attention = kind.attention
        if attention is None:
            continue
        blocks = -(-context // size)
        if engine.frees_windows and attention.window is not None:
            blocks = min(blocks, -(-attention.window // size) + (size > 1))  # it may begin within a block
        numbers = blocks * size * kv_numbers_per_token(attention, share)
        states = _whole(attention.state_numbers, share.query_heads) * _HALF
        total += count * (numbers * load.kv_format.bytes_per_number + states)
    return math.ceil(total)


def live_numbers_per_token(table: ShapeTable, share: RankShare) -> int:
    """Numbers that a rank holds of each token of a step at once, at the worst place of its layers: the residual
    stream, its norm and a layer's result, and what lies between the products of attention or MLP. Pairs of tokens
    and chosen experts lie side by side, before the up and after the down product in the same place (vLLM's
    fused_experts)."""
    hidden, widest = table.shape.hidden, 0
    for kind, _ in table.counts(*share.layers):
        mlp = math.ceil(kind.mlp_live * share.columns)
        pairs = max(math.ceil(kind.expert_made * share.expert_columns), hidden if kind.num_experts else 0)
        pairs += math.ceil(kind.expert_taken * share.expert_columns)
        attention = math.ceil(kind.attention_live * share.query_heads)
        widest = max(widest, attention, mlp + kind.num_chosen * pairs)
    return 3 * hidden + widest


def _query_numbers(kind: LayerSizes, share: RankShare) -> int:
    if kind.attention is None:
        return _whole(kind.by_query_heads, share.query_heads)
    heads = kind.attention.num_heads
    return kind.by_query_heads * _whole(heads, share.query_heads) // heads


def _layer_numbers(kind: LayerSizes, share: RankShare) -> tuple[int, int, int, int]:
    """Of the weights of one layer that a rank holds: attention, MLP, experts, others."""
    kv_heads = _whole(kind.attention.num_kv_heads, share.kv_heads) if kind.per_kv_head and kind.attention else 0
    attention = _query_numbers(kind, share) + kind.per_kv_head * kv_heads + kind.attention_replicated
    mlp = _whole(kind.by_columns, share.columns) + kind.mlp_replicated
    held = _whole(kind.num_experts, share.experts)
    experts = held * _whole(kind.expert, share.expert_columns)
    return attention, mlp, experts, kind.other + held * kind.expert_biases


def _embedding_numbers(table: ShapeTable, share: RankShare) -> int:
    shape, rows = table.shape, _whole(table.shape.vocab, share.vocab) * table.shape.hidden
    numbers = shape.other_params + shape.tower_params + rows if share.is_first else 0
    if share.is_last and not (shape.tied and share.is_first):
        numbers += rows
    return numbers


def rank_memory(
    table: ShapeTable,
    share: RankShare,
    load: ServingLoad = ServingLoad(),
    engine: EngineMemory = PLAIN,
    *,
    linked: bool = True,
    spread_over: int = 1,
    gathered_layers: int = GATHERED_LAYERS,
) -> RankMemory:
    """What a rank needs to serve a load.

    Biases, norms and the router are whole on every rank, and what the shape has outside its layers on the first
    stage: at most some hundred KB too many for a rank. `linked`: the rank's links are NVLink. `spread_over`:
    data-parallel replicas that hold their weights once between them (ZeRO's stage 3, arXiv:1910.02054), each rank 1/n
    and `gathered_layers` layers whole, for the time of their use; 0 where all can read all of it in place.
    """
    shape = table.shape
    attention = mlp = experts = other = largest = 0
    plain, routed = shape.weight_bits / 8, shape.expert_bits / 8
    for kind, count in table.counts(*share.layers):
        numbers = _layer_numbers(kind, share)
        attention += count * numbers[0]
        mlp += count * numbers[1]
        experts += count * numbers[2]
        other += count * numbers[3]
        layer = (numbers[0] + numbers[1]) * plain + numbers[2] * routed + numbers[3] * _HALF
        largest = max(largest, math.ceil(layer))
    stage = engine.communicator if linked else engine.slow_communicator
    border = 0 if share.is_first and share.is_last else engine.slow_communicator
    return RankMemory(
        attention_weights=_part_of(attention * plain, spread_over),
        mlp_weights=_part_of(mlp * plain, spread_over),
        expert_weights=_part_of(experts * routed, spread_over),
        embedding_weights=_part_of(_embedding_numbers(table, share) * _HALF, spread_over),
        other_weights=_part_of(other * _HALF, spread_over),
        gathered_weights=gathered_layers * largest if spread_over > 1 else 0,
        kv_cache=load.sequences * kv_bytes_of_sequence(table, share, load.context, load, engine),
        activations=load.batched_tokens * live_numbers_per_token(table, share) * _HALF,
        logits=load.sequences * shape.vocab * engine.bytes_per_logit if share.is_last else 0,
        communication=(stage if share.ranks_in_stage > 1 else 0) + border,
        reserve=engine.reserve,
    )


def _part_of(size: float, ranks: int) -> int:
    return math.ceil(size / ranks)


def plan_memory(
    table: ShapeTable,
    shares: Sequence[RankShare],
    load: ServingLoad = ServingLoad(),
    engine: EngineMemory = PLAIN,
    *,
    linked: bool = True,
    spread_over: int = 1,
) -> tuple[RankMemory, ...]:
    """`rank_memory` of each share, in order."""
    return tuple(rank_memory(table, share, load, engine, linked=linked, spread_over=spread_over) for share in shares)
