"""What lies between the operations of a step that the CPU kernels have recorded, in bytes.

A result's memory goes to the next of its very size (kernels.cpu.memory.Workspace). So what counts is, of each size,
how many there are at once, and sizes add up. `_moments` says what is there at once, as the decoder's layers hold
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from holdfast.core.plan import Place
from holdfast.core.spec import DecoderSpec
from holdfast.models.parameters import Packing
from holdfast.parallel.segment import StageTrees
from holdfast.planner.memory.runtime_format import GROUP, RuntimeFormat, format_of

_LINE = 64


@dataclass(frozen=True, slots=True)
class _Rank:
    """What the sizes of its results depend on."""

    spec: DecoderSpec
    place: Place
    packs: Mapping[str, Packing]
    how: RuntimeFormat
    trees: StageTrees

    def rows(self, width: int, itemsize: int, *, per_token: int = 1) -> int:
        """Bytes of a result [tokens · per_token, width], with the room between rows that keeps them off a multiple
        of 1 KB (kernels.cpu.memory.padded)."""
        size = width * itemsize
        return self.dense(size + _LINE if size % 1024 == 0 else size, per_token=per_token)

    def dense(self, row_bytes: int, *, per_token: int = 1) -> int:
        """The same without room between the rows."""
        return row_bytes * per_token * self.how.max_tokens

    def operands(self, name: str, columns: int, *, per_token: int = 1) -> list[int]:
        """What a product makes of its rows first: scales and codes for quantized weights, float32 where bfloat16
        cannot be multiplied."""
        if format_of(self.packs[name], self.how) != "dense":
            codes = self.how.activation_bits // 8 * columns
            return [
                self.dense(columns // GROUP * 8, per_token=per_token),
                self.rows(codes, 1, per_token=per_token),
            ]
        converts = self.how.itemsize == 2 and not self.how.multiplies_bfloat16
        return [self.rows(columns, 4, per_token=per_token)] if converts else []


def workspace_bytes(spec: DecoderSpec, place: Place, packs: Mapping[str, Packing], how: RuntimeFormat) -> int:
    """Of the rank at `place`, which holds `packs`, for steps of up to `how.max_tokens` tokens."""
    rank = _Rank(spec, place, packs, how, StageTrees.of(place.replica, place.stage, spec))
    most: Counter[int] = Counter()
    stream = rank.rows(spec.hidden_size, 4)
    if place.is_first and spec.embedding_norm:
        most[stream] = 2
    for layer in range(*place.layers):
        for moment in _moments(rank, layer, stream):
            for size, count in Counter(moment).items():
                most[size] = max(most[size], count)
    return sum(size * count for size, count in most.items())


def _moments(rank: _Rank, layer: int, stream: int) -> Iterator[list[int]]:
    """Of a layer: all that is there at once, at each place where it is most."""
    spec, size, name = rank.spec, rank.how.itemsize, f"layers.{layer}"
    normed = rank.rows(spec.hidden_size, size)
    two_norms = spec.block == "parallel" and not spec.shared_parallel_norm
    base = [stream, normed, normed] if two_norms else [stream, normed]
    result = [normed] if spec.block == "sandwich" else []
    yield from _attention(rank, f"{name}.attn", base, stream, result)
    if spec.block == "post":  # what the last norm made, and what goes into the MLP: the block's own is still held
        base = [stream, stream, normed]
        yield [stream, stream, stream]
    if spec.layers[layer].moe:
        yield from _experts(rank, f"{name}.moe", base, result)
    else:
        yield from _mlp(rank, f"{name}.mlp", base, stream, result)


def _attention(rank: _Rank, name: str, base: list[int], stream: int, result: list[int]) -> Iterator[list[int]]:
    spec, shard, size = rank.spec, rank.place.shard, rank.how.itemsize
    queries = shard.query_heads[1] - shard.query_heads[0]
    keys = shard.kv_heads[1] - shard.kv_heads[0]
    columns = queries * spec.head_dim
    qkv = rank.rows((queries + 2 * keys) * spec.head_dim, size)
    heads = rank.rows(columns, size)
    sums = [] if len(rank.place.ranks) == 1 else [stream] * len(rank.trees.attention.pieces[rank.place.index])
    yield [*base, qkv, *rank.operands(f"{name}.qkv", spec.hidden_size)]
    yield [*base, qkv, heads, *sums, *result]
    yield from (
        [*base, qkv, heads, *sums, *result, *rank.operands(f"{name}.o", some)] for some in _widths(rank, name)
    )


def _widths(rank: _Rank, name: str) -> list[int]:
    """Columns of each of the pieces that the attention's output is packed in on a rank, or of all of it."""
    packing = rank.packs[f"{name}.o"]
    queries = rank.place.shard.query_heads
    return _columns(packing, (queries[1] - queries[0]) * rank.spec.head_dim)


def _columns(packing: Packing, columns: int) -> list[int]:
    if packing.pieces is None:
        return [columns]
    borders = (0, *(packing.shards or (columns,)))
    return [borders[last] - borders[first] for first, last in packing.pieces]


def _mlp(rank: _Rank, name: str, base: list[int], stream: int, result: list[int]) -> Iterator[list[int]]:
    down = rank.packs[f"{name}.down"]
    widths = _columns(down, rank.spec.mlp_size)
    up = rank.rows(sum(widths), rank.how.itemsize)
    sums = [] if len(rank.place.ranks) == 1 else [stream] * len(widths)
    yield [*base, up, *rank.operands(f"{name}.up", rank.spec.hidden_size)]
    yield from ([*base, up, *sums, *result, *rank.operands(f"{name}.down", some)] for some in widths)


def _experts(rank: _Rank, name: str, base: list[int], result: list[int]) -> Iterator[list[int]]:
    """kernels.cpu.experts: every token's pairs with its experts side by side, whoever computes them."""
    spec, how, moe = rank.spec, rank.how, rank.spec.moe
    assert moe is not None, "a layer with experts needs DecoderSpec.moe"
    chosen, hidden = moe.experts_per_token, spec.hidden_size
    scores = rank.rows(moe.num_experts, 4)
    routed = [rank.dense(8, per_token=chosen)] * 3 + [rank.dense(4, per_token=chosen), 8 * (moe.num_experts + 1)]
    base = [*base, scores, *routed]
    first = next(pack for pack in rank.packs if pack.startswith(f"{name}.experts.") and pack.endswith(".up"))
    second = first.removesuffix("up") + "down"
    widths = _columns(rank.packs[second], moe.expert_mlp_size)
    into, out_of = (
        how.itemsize if how.multiplies_bfloat16 or format_of(rank.packs[pack], how) != "dense" else 4
        for pack in (first, second)
    )
    made = rank.rows(sum(widths), out_of, per_token=chosen)
    gathered = [rank.rows(hidden, into, per_token=chosen)]
    converted = [rank.rows(hidden, 4)] if into != how.itemsize else []
    yield [*base, *converted, *gathered, made, *_codes(rank, first, hidden)]
    out = rank.rows(hidden, 4, per_token=chosen)
    outs = [out] * min(len(widths), 2)  # of one piece, and still of the one before
    yield from ([*base, made, *outs, *_codes(rank, second, width)] for width in widths)
    if len(rank.place.ranks) == 1:
        yield [*base, out, *result]


def _codes(rank: _Rank, name: str, columns: int) -> list[int]:
    """Of all pairs of tokens and chosen experts, where the expert's matrix is quantized; else they have been made in
    what the product takes."""
    assert rank.spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
    if format_of(rank.packs[name], rank.how) == "dense":
        return []
    return rank.operands(name, columns, per_token=rank.spec.moe.experts_per_token)
